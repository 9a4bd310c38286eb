"""The job: what to train, as one tree of typed fields. The reference of the job file.

Every field stands with its default and its meaning. `job_file` turns YAML and overrides into this tree and back.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Strict, Tag, field_validator, model_validator

STREAMS = ("split", "init", "shuffle", "augment", "dropout", "data")
"""Names of the independent random streams of a run; `seed: {all: 1, split: 7}` sets one apart."""

IN_PLACE_WORKERS = 0
"""`scale.workers` for a run in this process, without Ray."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Range = Annotated[tuple[int, int], Strict(False)]
"""[first, end]; YAML has lists where Python has tuples."""


class Node(BaseModel):
    """A branch of the tree: unknown keys are errors, `"5"` is no number, values never change once built."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )


class Seeds(Node):
    """`seed: 1`, or `seed: {all: 1, split: 7}` to set single streams apart."""

    all: Annotated[int, Field(ge=0)] = 1
    """The seed of every stream that is not named."""
    split: Annotated[int, Field(ge=0)] | None = None
    """Which rows are in which split."""
    init: Annotated[int, Field(ge=0)] | None = None
    """The untrained weights."""
    shuffle: Annotated[int, Field(ge=0)] | None = None
    """The order of rows in each epoch."""
    augment: Annotated[int, Field(ge=0)] | None = None
    """Crops and flips."""
    dropout: Annotated[int, Field(ge=0)] | None = None
    """What the model itself draws."""
    data: Annotated[int, Field(ge=0)] | None = None
    """What a generated source draws."""

    def of(self, stream: str) -> int:
        """The seed of one of `STREAMS`."""
        own: int | None = getattr(self, stream)
        return self.all if own is None else own


# ---------------------------------------------------------------------------------------------------- data


class Call(Node):
    """A function of your own that returns the data."""

    call: str
    """`module:function`; returns arrays, see `pipeline.data.sources`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function."""

    @field_validator("call")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        return _module_and_name(value)


class RandomSplits(Node):
    """Rows drawn at random: fractions of all rows (below 1) or counts."""

    by: Literal["random"] = "random"
    val: Annotated[float, Field(ge=0)] = 0.2
    """Share or number of rows for validation; 0 for none."""
    test: Annotated[float, Field(ge=0)] = 0
    """Share or number of rows for the test split; 0 leaves the source's own test set, if it has one."""
    train: Annotated[float, Field(gt=0)] | None = None
    """Share or number of rows for training; all that remain if not given."""
    stratify: bool = False
    """Draw from every class in proportion."""

    @model_validator(mode="after")
    def _counts_are_whole(self) -> Self:
        for name in ("train", "val", "test"):
            value = getattr(self, name)
            if value is not None and value >= 1 and value != int(value):
                raise ValueError(f"{name} must be a fraction below 1 or a whole number of rows, not {value}")
        return self


class RangeSplits(Node):
    """Rows by position: `{by: range, train: [0, 1024], val: [1024, 2048]}`, the end excluded."""

    by: Literal["range"]
    train: Range
    val: Range | None = None
    test: Range | None = None

    @model_validator(mode="after")
    def _are_ranges(self) -> Self:
        for name in ("train", "val", "test"):
            value = getattr(self, name)
            if value is not None and not 0 <= value[0] < value[1]:
                raise ValueError(f"{name} must be [first, end] with 0 <= first < end, not {list(value)}")
        return self


Splits = Annotated[RandomSplits | RangeSplits, Field(discriminator="by")]


class Normalization(Node):
    """Fixed numbers: (x - mean) / std, per channel or one for all, in the units of [0, 1] images or raw columns."""

    mean: float | list[float]
    std: float | list[float]


class Augment(Node):
    """Random changes to training images, drawn anew for every sample of every step."""

    crop: Annotated[int, Field(ge=0)] = 0
    """Pad by this many pixels of zero, then cut a random window of the original size."""
    flip: bool = False
    """Mirror left to right, half of the time."""


class Loader(Node):
    """How batches are fetched. Changes speed, never results."""

    processes: Annotated[int, Field(ge=0)] = 0
    """Loader processes a worker; 0 fetches in the worker itself, which is fastest for data in memory."""
    pin_memory: Literal["auto"] | bool = "auto"
    """Page-locked batches for faster copies to a GPU; auto: where there is one."""
    eval_batch_size: Positive = 1024
    """Rows an evaluation takes at once."""


class Data(Node):
    """What to train on."""

    source: Literal["mnist", "fashion_mnist", "cifar10", "cifar100", "disc"] | Call = "mnist"
    """A named source, or `{call: module:function, args: {}}`."""
    root: str = "~/.cache/trainyard"
    """Where named sources are downloaded to, or already are."""
    normalize: Literal["unit", "scalar", "standard", "none"] | Normalization = "unit"
    """unit: uint8 images to [0, 1]. scalar: one mean and deviation; standard: per channel or column. Or fixed ones."""
    splits: Splits = RandomSplits()
    """by: random or range."""
    shuffle: bool = True
    """A new order of the training rows each epoch."""
    augment: Augment = Augment()
    loader: Loader = Loader()

    @field_validator("splits", mode="before")
    @classmethod
    def _random_unless_said(cls, value: Any) -> Any:
        return {"by": "random", **value} if isinstance(value, dict) else value


# --------------------------------------------------------------------------------------------------- model

Activation = Literal["relu", "tanh", "sigmoid", "gelu", "silu", "leaky_relu", "elu"]


class Mlp(Node):
    """Fully connected layers. Tensors are named as in `nn.Sequential(Linear, ReLU, ...)`."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[Positive] | Literal["doubling"] = [32]
    """Widths of the hidden layers; [] is logistic regression; doubling: each layer twice as wide as the one before."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """With `hidden: doubling`: the number of linear layers, the last one included."""
    activation: Activation = "relu"
    dropout: Share = 0.0
    """Share of hidden values set to zero while training."""
    batch_norm: bool = False
    """Batch normalisation before each activation."""

    @model_validator(mode="after")
    def _layers_with_doubling(self) -> Self:
        if (self.hidden == "doubling") != (self.layers is not None):
            raise ValueError("layers goes with hidden: doubling, and doubling needs layers")
        return self


class Conv(Node):
    """One convolution, its activation and its pooling."""

    channels: Positive
    kernel: Positive = 3
    padding: Annotated[int, Field(ge=0)] = 0
    pool: Positive = 2
    """Max-pooling window and stride; 1 for none."""


class Cnn(Node):
    """Convolutions, then fully connected layers."""

    kind: Literal["cnn"]
    conv: Annotated[list[Conv], Field(min_length=1)] = [
        Conv(channels=6, kernel=5),
        Conv(channels=12, kernel=5),
    ]
    hidden: list[Positive] = [120, 60]
    """Widths of the fully connected layers between the convolutions and the output."""
    activation: Activation = "relu"
    dropout: Share = 0.0
    batch_norm: bool = False


class OwnModel(Node):
    """A module of your own: `{kind: mypkg.nets:Net, args: {width: 8}}`."""

    kind: str
    """`module:Class` of an nn.Module; called with a batch of inputs, returns one row of outputs a sample."""
    args: dict[str, Any] = {}
    """Keyword arguments of the class."""

    @field_validator("kind")
    @classmethod
    def _names_a_class(cls, value: str) -> str:
        if ":" not in value:
            near = difflib.get_close_matches(value, ["mlp", "cnn"], n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"must be mlp, cnn or module:Class{hint}")
        return _module_and_name(value)


def _branch_of_model(value: Any) -> str:
    """Which of the three models a mapping describes, so that its errors speak of that one alone."""
    kind = value.get("kind", "mlp") if isinstance(value, dict) else getattr(value, "kind", "mlp")
    return {"mlp": "Mlp", "cnn": "Cnn"}.get(kind, "OwnModel") if isinstance(kind, str) else "OwnModel"


Model = Annotated[
    Annotated[Mlp, Tag("Mlp")] | Annotated[Cnn, Tag("Cnn")] | Annotated[OwnModel, Tag("OwnModel")],
    Discriminator(_branch_of_model),
]


# ---------------------------------------------------------------------------------------------------- task


Label = Annotated[int, Strict(False)]
"""A class; the keys of JSON and of `--set` are text."""


class Task(Node):
    """What is learned: the loss, and what counts as correct."""

    kind: Literal["multiclass", "binary", "regression"] = "multiclass"
    """multiclass: softmax cross-entropy. binary: one logit, BCE. regression: mean squared error."""
    positive: list[int] | None = None
    """binary: the labels that count as 1, such as [0, 1, 2]; the others are 0."""
    class_weights: Literal["balanced"] | dict[Label, Annotated[float, Field(gt=0)]] | None = None
    """Weight of each class in the loss; balanced: inversely to its rows in the training split."""

    @model_validator(mode="after")
    def _positive_is_binary(self) -> Self:
        if self.positive is not None and self.kind != "binary":
            raise ValueError("positive goes with kind: binary")
        if self.class_weights is not None and self.kind == "regression":
            raise ValueError("class_weights goes with multiclass and binary")
        return self


# --------------------------------------------------------------------------------------------------- train


class Optimizer(Node):
    """The update rule; the learning rate stands in the phases."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Share = 0.0
    """sgd only."""
    nesterov: bool = False
    """sgd only; needs momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[tuple[Share, Share], Strict(False)] = (0.9, 0.999)
    """adam and adamw only."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """adam and adamw only."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum")
        if self.kind != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov go with kind: sgd, not {self.kind}")
        return self


class Phase(Node):
    """A stretch of epochs or steps with its own learning rate."""

    epochs: Positive | None = None
    steps: Positive | None = None
    lr: Annotated[float, Field(gt=0)]
    """Learning rate; with a schedule, its highest value."""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """How the rate moves within the phase. step: times `factor` every `every_epochs`; cosine: down to 0;
    one_cycle: up from lr/25 over the first 30 % and down to lr/250,000 (the rate's part of Smith's 1cycle)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear rise from 0 at the phase's start."""
    every_epochs: Positive = 1
    """With schedule: step."""
    factor: Annotated[float, Field(gt=0)] = 0.1
    """With schedule: step."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Whether momentum and moments go over from the phase before."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a phase has either epochs or steps")
        return self


class Train(Node):
    """The training loop."""

    batch_size: Positive | Literal["all"] = 100
    """Rows of one update, over all workers together; all: the whole training split."""
    micro_batch: Positive | None = None
    """Accumulate gradients in pieces of this many rows on each worker, to save memory."""
    optimizer: Optimizer = Optimizer()
    phases: Annotated[list[Phase], Field(min_length=1)] = [Phase(epochs=5, lr=0.5), Phase(epochs=5, lr=0.1)]
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Scale the whole gradient down to this norm where it is larger."""
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    """Type of the arithmetic; bf16 and fp16 keep fp32 weights, fp16 scales the loss."""
    compile: Literal["auto", "off", "on"] = "auto"
    """Compile the step with torch.compile; auto decides by the job and the device."""

    @field_validator("compile", mode="before")
    @classmethod
    def _as_word(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class Evaluate(Node):
    """When to evaluate, and on what. There is always one evaluation before step 1 and one at the end."""

    every_epochs: Positive | None = None
    """The default is every epoch."""
    every_steps: Positive | None = None
    splits: Annotated[list[Literal["train", "val"]], Field(min_length=1)] | None = None
    """Default: val where there is one, else train. Never test: `trainyard evaluate --split test` reads that."""
    limit: Positive | None = None
    """Only the first rows of each split."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give either every_epochs or every_steps, and null for the other")
        return self


class Best(Node):
    """Which checkpoint counts as the best: the earliest of equals."""

    metric: str = "val/loss"
    """`split/column` of the evaluations, such as val/loss or val/accuracy."""
    mode: Literal["min", "max"] = "min"
    patience: Positive | None = None
    """Stop after this many evaluations without a better one."""

    @field_validator("metric")
    @classmethod
    def _split_and_column(cls, value: str) -> str:
        if not re.fullmatch(r"(train|val)/(loss|accuracy|correct)", value):
            raise ValueError(f"{value!r} is not one of val/loss, val/accuracy, val/correct, train/loss, ...")
        return value


class Checkpoint(Node):
    """When to save, and how much to keep. Whatever a kill interrupts goes on from here."""

    every_epochs: Positive | None = None
    """The default is every epoch."""
    every_steps: Positive | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 10
    """At the latest after so long."""
    keep: Positive = 3
    """The last so many, each with the best until then."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give either every_epochs or every_steps, and null for the other")
        return self


class WorkerRange(Node):
    """As many workers as there are, within limits."""

    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


class Scale(Node):
    """Where the work runs. Changes speed, and results only by rounding."""

    workers: Annotated[int, Field(ge=0)] | WorkerRange = IN_PLACE_WORKERS
    """0: in this process. n: n Ray Train workers. {min: 1, max: 4}: as many as there are."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, then mps, then cpu."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    threads: Positive | Literal["auto"] = "auto"
    """Arithmetic threads a worker; auto: one, or every core for large models in this process."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Restarts after lost workers, counted anew whenever a checkpoint was made in between."""


# ----------------------------------------------------------------------------------------------------- job


class Job(Node):
    """One training job."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of this format."""
    name: str
    """Letters, digits, '.', '_' and '-'; the first part of the run's name."""
    seed: Seeds = Seeds()
    data: Data = Data()
    model: Model = Mlp()
    task: Task = Task()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    best: Best = Best()
    checkpoint: Checkpoint = Checkpoint()
    scale: Scale = Scale()
    storage: str = "./runs"
    """Where runs go: a folder or any fsspec URL."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        return plain_name(value)

    @field_validator("seed", mode="before")
    @classmethod
    def _one_number_for_all(cls, value: Any) -> Any:
        return {"all": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("task", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.task.kind == "regression" and not self.best.metric.endswith("/loss"):
            raise ValueError(f"best.metric: {self.best.metric} goes with multiclass and binary; regression has a loss")
        return self

    def resolved(self) -> dict[str, Any]:
        """The whole tree as plain YAML types, defaults included."""
        return self.model_dump(mode="json", by_alias=True)


NOT_IDENTITY = ("scale", "storage", "checkpoint")
"""Branches of the job that change where and how fast it runs, not what comes out."""


def identity(job: Job, *, fingerprint: str, max_steps: int | None = None) -> dict[str, Any]:
    """What determines a run's weights, as plain values: the resolved job without where and how fast, plus the data.

    Parameters
    ----------
    fingerprint: digest of the data's content.
    max_steps: the flag `--max-steps`, where given.
    """
    tree = {key: value for key, value in job.resolved().items() if key not in NOT_IDENTITY}
    tree["data"] = {key: value for key, value in tree["data"].items() if key not in ("root", "loader")}
    return {**tree, "max_steps": max_steps, "fingerprint": fingerprint}


def digest(tree: dict[str, Any]) -> str:
    """SHA-256 of a tree of plain values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


RESERVED_NAMES = ("models", "ticks")
"""Folders that lie beside the runs."""


def plain_name(value: str) -> str:
    """`value`, if it is safe as the name of a folder.

    Raises
    ------
    ValueError: it could leave its parent folder, is hidden or reserved, or has characters that some store refuses.
    """
    if value in RESERVED_NAMES:
        raise ValueError(f"{value!r} is taken: the registry lies there")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value) or ".." in value:
        raise ValueError(
            f"{value!r} is no name: use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return value


def _module_and_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise ValueError(f"{value!r} is not of the form module:name")
    return value
