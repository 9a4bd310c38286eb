"""`data:` what to train on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.job.node import Node, Positive, Range, module_and_name


class Call(Node):
    """A function of your own that returns the data."""

    call: str
    """`module:function`; returns arrays, see `pipeline.data.sources`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function."""

    @field_validator("call")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        return module_and_name(value)


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
