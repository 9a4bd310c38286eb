"""The job: what to train, as one tree of typed fields. The reference of the job file.

Every field stands with its default and its meaning. `job_file` turns YAML and overrides into this tree and back.
"""

from pipeline.job.data import (
    IMAGENET,
    SOURCES,
    Augment,
    BaseDataConfig,
    Cache,
    Call,
    DataConfig,
    DiscDataConfig,
    FileDataConfig,
    ImageFolderDataConfig,
    Jitter,
    Loader,
    Missing,
    NamedDataConfig,
    Normalization,
    ParquetDataConfig,
    UserFunctionDataConfig,
    sources_with,
)
from pipeline.job.keeping import Best, Checkpoint, Evaluate
from pipeline.job.metrics import METRICS, TARGET_METRICS, own_metric
from pipeline.job.model import Activation, Cnn, Conv, Mlp, Model, OwnModel, TorchvisionModel
from pipeline.job.node import RESERVED_NAMES, Node, plain_name
from pipeline.job.scale import IN_PLACE_WORKERS, Scale, WorkerRange
from pipeline.job.splits import STORED, ColumnSplits, GroupSplits, RandomSplits, RangeSplits, Splits, TimeSplits
from pipeline.job.training import REGRESSION_LOSSES, Group, Optimizer, Phase, Task, Train
from pipeline.job.tree import NOT_IDENTITY, STREAMS, Job, Seeds, digest, identity

__all__ = [
    "Activation",
    "Augment",
    "BaseDataConfig",
    "Best",
    "Cache",
    "Call",
    "Checkpoint",
    "Cnn",
    "ColumnSplits",
    "Conv",
    "DataConfig",
    "DiscDataConfig",
    "Evaluate",
    "FileDataConfig",
    "Group",
    "GroupSplits",
    "IMAGENET",
    "IN_PLACE_WORKERS",
    "ImageFolderDataConfig",
    "Jitter",
    "Job",
    "Loader",
    "METRICS",
    "Missing",
    "Mlp",
    "Model",
    "NOT_IDENTITY",
    "NamedDataConfig",
    "Node",
    "Normalization",
    "Optimizer",
    "OwnModel",
    "ParquetDataConfig",
    "Phase",
    "REGRESSION_LOSSES",
    "RESERVED_NAMES",
    "RandomSplits",
    "RangeSplits",
    "SOURCES",
    "STORED",
    "STREAMS",
    "Scale",
    "Seeds",
    "Splits",
    "TARGET_METRICS",
    "Task",
    "TimeSplits",
    "TorchvisionModel",
    "Train",
    "UserFunctionDataConfig",
    "WorkerRange",
    "digest",
    "identity",
    "own_metric",
    "plain_name",
    "sources_with",
]
