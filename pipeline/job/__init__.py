"""The job: what to train, as one tree of typed fields. The reference of the job file.

Every field stands with its default and its meaning. `job_file` turns YAML and overrides into this tree and back.
"""

from pipeline.job.data import Augment, Call, Data, Loader, Normalization, RandomSplits, RangeSplits, Splits
from pipeline.job.keeping import Best, Checkpoint, Evaluate
from pipeline.job.model import Activation, Cnn, Conv, Mlp, Model, OwnModel
from pipeline.job.node import RESERVED_NAMES, Node, plain_name
from pipeline.job.scale import IN_PLACE_WORKERS, Scale, WorkerRange
from pipeline.job.training import Optimizer, Phase, Task, Train
from pipeline.job.tree import NOT_IDENTITY, STREAMS, Job, Seeds, digest, identity

__all__ = [
    "Activation",
    "Augment",
    "Best",
    "Call",
    "Checkpoint",
    "Cnn",
    "Conv",
    "Data",
    "Evaluate",
    "IN_PLACE_WORKERS",
    "Job",
    "Loader",
    "Mlp",
    "Model",
    "NOT_IDENTITY",
    "Node",
    "Normalization",
    "Optimizer",
    "OwnModel",
    "Phase",
    "RESERVED_NAMES",
    "RandomSplits",
    "RangeSplits",
    "STREAMS",
    "Scale",
    "Seeds",
    "Splits",
    "Task",
    "Train",
    "WorkerRange",
    "digest",
    "identity",
    "plain_name",
]
