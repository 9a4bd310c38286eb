"""`init`: write a commented job file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.job_from_data import JobFromData, draft_job, write_job_file
from pipeline.config import validate_name
from pipeline.errors import InputError
from pipeline.events import ProgressFn

TEMPLATE = """\
# A Trainyard job. `trainyard check {name}.yaml` prints it with every default.
schema: 1
name: {name}
seed: 1                        # or {{all: 1, split: 7}} for separate seeds of random streams

data:
  source: mnist                # mnist, fashion_mnist, cifar10, cifar100, disc, or {{call: module:function, args: {{}}}}
  root: ~/.cache/trainyard     # folder of a named source; it is downloaded there if missing
  # A table:                     (a file, glob or folder, relative to this file, or any fsspec URL)
  # source: parquet
  # url: churn.parquet
  # label: churned
  # features: ["num_*", plan]    # names or patterns; default: all but label, keys and the column of the splits
  # keys: [customer_id]          # not used for training, copied to the predictions
  # categorical: [zip]           # numeric columns that are categories; text columns always are
  # missing: {{numeric: median, categorical: own_level}}   # mean, a number, a category, or fail
  # one_hot_up_to: 16            # categories; a column with more gets an embedding in the mlp
  # Images, one folder per class:
  # source: image_folder
  # url: images/
  # resize: [64, 64]             # crop: 56; mode: rgb or grey; on_error: fail or skip
  normalize: auto              # unit: uint8 images to [0, 1]; scalar; standard: per channel or column; imagenet; none; {{mean: , std: }}
  splits: {{by: random, val: 0.2}}   # fractions or counts; stratify: true; or {{by: range, train: [0, 1024], val: [1024, 2048]}}
         # {{by: group, column: user, val: 0.2}}; {{by: time, column: day, val: 14d}}; {{by: column, column: split}}
  shuffle: true
  # augment: {{crop: 4, flip: true, rotate: 15, jitter: {{brightness: 0.2, contrast: 0.2}}, mixup: 0.2}}
  # cache: {{folder: ~/.cache/trainyard/data, max_gb: 50, in_memory_mb: 256}}   # for data larger than in_memory_mb
  loader: {{processes: 0, pin_memory: auto, eval_batch_size: 1024}}

model: {{kind: mlp, hidden: [32], activation: relu}}   # cnn; torchvision:resnet18 with weights: DEFAULT; mypkg.nets:Net with args:
         # init_from: RUN@best starts from another run; freeze: backbone, or patterns of parameter names
task: multiclass               # or {{kind: binary, positive: ["yes"], class_weights: balanced}}, or {{kind: regression, loss: huber}}
# metrics: [mypkg.metrics:cost]   # in addition to the task's metrics
# code: .                      # folder of your modules, relative to this file; stored with the run

train:
  batch_size: 100              # global batch, over all workers; all: the whole training split
  optimizer: {{kind: sgd, momentum: 0.0, weight_decay: 0.0}}   # sgd, adam, adamw; groups: [{{match: "fc.*", lr_factor: 10}}]
  phases:                      # each a number of epochs or steps with a learning rate
    - {{epochs: 5, lr: 0.5}}     # schedule: constant, step, cosine, one_cycle; warmup_steps; optimizer_state: keep or reset
    - {{epochs: 5, lr: 0.1}}
  clip_norm: null
  precision: fp32              # fp64, fp32, bf16, fp16

evaluate: {{every_epochs: 1, splits: [val]}}   # or every_steps: 100; limit: 1024
best: {{metric: val/loss}}   # val/accuracy, val/auc, val/f1, val/r2, val/rmse, ...; patience: 5 stops after 5 evaluations without a better one
checkpoint: {{every_epochs: 1, every_minutes: 10, keep: 3}}
scale: {{workers: 0, device: auto}}            # workers: 2 trains on two Ray Train workers; {{min: 1, max: 4}}
storage: ./runs                # folder or any fsspec URL, such as s3://bucket/runs
"""


def init(
    name: str,
    *,
    data: str | None = None,
    label: Sequence[str] = (),
    on_progress: ProgressFn = lambda text: None,
) -> JobFromData:
    """Write `NAME.yaml` in the working directory: a commented example, or with `data` a job for that table.

    Parameters
    ----------
    data: URL of a table.
    label: the columns to predict.

    Raises
    ------
    InputError: `name` is not a valid name, the file exists or cannot be written, or the table or the labels cannot be
        used.
    """
    name = name.removesuffix(".yaml")
    try:
        path = Path(f"{validate_name(name)}.yaml")
    except ValueError as error:
        raise InputError(str(error), where="NAME") from None
    if (data is None) != (not label):
        missing, given = ("--data", "--label") if data is None else ("--label", "--data")
        raise InputError(f"{given} needs {missing} too", where=given, fix="such as --data churn.csv --label churned")
    if data is None:
        write_job_file(path, TEMPLATE.format(name=name))
        return JobFromData(str(path), True, ())
    if path.exists():  # before the table is read
        raise InputError("already exists", where=str(path), fix="choose another name or remove it")
    draft = draft_job(name, data, label, on_progress=on_progress)
    write_job_file(path, draft.text)
    return JobFromData(str(path), True, draft.lines)
