"""`init`: write a commented job file."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError
from pipeline.job import plain_name

TEMPLATE = """\
# A Trainyard job. `trainyard check {name}.yaml` prints it with every default spelled out.
schema: 1
name: {name}
seed: 1                        # or {{all: 1, split: 7}} to set single random streams apart

data:
  source: mnist                # mnist, fashion_mnist, cifar10, cifar100, disc, or {{call: module:function, args: {{}}}}
  root: ~/.cache/trainyard     # where a named source is, or is downloaded to
  normalize: unit              # unit: uint8 images to [0, 1]; scalar; standard; none; {{mean: , std: }}
  splits: {{by: random, val: 0.2}}   # fractions or counts; stratify: true; or {{by: range, train: [0, 1024], val: [1024, 2048]}}
  shuffle: true
  # augment: {{crop: 4, flip: true}}
  loader: {{processes: 0, pin_memory: auto, eval_batch_size: 1024}}

model: {{kind: mlp, hidden: [32], activation: relu}}   # or cnn, or {{kind: mypkg.nets:Net, args: {{width: 8}}}}
task: multiclass               # or {{kind: binary, positive: [0, 1, 2]}}, or regression

train:
  batch_size: 100              # global: over all workers together; all: the whole training split
  optimizer: {{kind: sgd, momentum: 0.0, weight_decay: 0.0}}   # sgd, adam, adamw
  phases:                      # stretches of epochs or steps, each with its own learning rate
    - {{epochs: 5, lr: 0.5}}     # schedule: constant, step, cosine, one_cycle; warmup_steps; optimizer_state: keep or reset
    - {{epochs: 5, lr: 0.1}}
  clip_norm: null
  precision: fp32              # fp64, fp32, bf16, fp16

evaluate: {{every_epochs: 1, splits: [val]}}   # or every_steps: 100; limit: 1024
best: {{metric: val/loss, mode: min}}          # patience: 5 stops after so many evaluations without a better one
checkpoint: {{every_epochs: 1, every_minutes: 10, keep: 3}}
scale: {{workers: 0, device: auto}}            # workers: 2 trains on two Ray Train workers; {{min: 1, max: 4}}
storage: ./runs                # a folder or any fsspec URL, such as s3://bucket/runs
"""


def init(name: str) -> str:
    """Write `NAME.yaml` in the working directory and return its path.

    Raises
    ------
    InputError: not a name, or the file exists.
    """
    name = name.removesuffix(".yaml")
    try:
        path = Path(f"{plain_name(name)}.yaml")
    except ValueError as error:
        raise InputError(str(error), where="NAME") from None
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(name=name))
    except FileExistsError:
        raise InputError("is already there", where=str(path), fix="choose another name or remove it") from None
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path)) from None
    return str(path)
