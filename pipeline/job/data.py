"""`data:` what to train on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, field_validator, model_validator

from pipeline.job.node import Node, Positive, Share, module_and_name
from pipeline.job.splits import RandomSplits, RangeSplits, Splits


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


class Normalization(Node):
    """Fixed numbers: (x - mean) / std, per channel or one for all, in the units of [0, 1] images or raw columns."""

    mean: float | list[float]
    std: float | list[float]


IMAGENET = Normalization(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
"""What torchvision's pretrained models expect."""


class Jitter(Node):
    """Random changes of colour: each factor is drawn from [1 - value, 1 + value]."""

    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0


class Augment(Node):
    """Random changes to training images, drawn anew for every sample of every step, made on the device."""

    crop: Annotated[int, Field(ge=0)] = 0
    """Pad by this many pixels of zero, then cut a random window of the original size."""
    flip: bool = False
    """Mirror left to right, half of the time."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turn by up to so many degrees either way."""
    jitter: Jitter = Jitter()
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Mix each image and its label with another of the global batch; the share is drawn from Beta(mixup, mixup)
    (Zhang et al. 2018, arXiv:1710.09412)."""


class Missing(Node):
    """What stands in for a null (or NaN) in a feature."""

    numeric: Literal["median", "mean", "fail"] | float = "median"
    """median or mean of the training rows, a number, or fail."""
    categorical: str = "own_level"
    """own_level: being missing is a level of its own; fail; or the level that it counts as."""


class Cache(Node):
    """Where data that is too large for memory, and decoded pictures, are kept between runs. Changes speed alone."""

    folder: str = "~/.cache/trainyard/data"
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """What was not used for longest is deleted beyond this many 10^9 bytes."""
    in_memory_mb: Annotated[float, Field(ge=0)] = 256.0
    """Data of up to this many 10^6 bytes is held in memory instead."""


class Loader(Node):
    """How batches are fetched. Changes speed, never results."""

    processes: Annotated[int, Field(ge=0)] = 0
    """Loader processes a worker; 0 fetches in the worker itself, which is fastest for data in memory."""
    pin_memory: Literal["auto"] | bool = "auto"
    """Page-locked batches for faster copies to a GPU; auto: where there is one."""
    eval_batch_size: Positive = 1024
    """Rows an evaluation takes at once."""


Size = Positive | Annotated[tuple[Positive, Positive], Strict(False)]
"""Pixels: one number for both sides, or [height, width]."""

NAMED = ("mnist", "fashion_mnist", "cifar10", "cifar100", "disc")
"""Sources that need no `url`."""

ONLY_WITH = {
    "parquet": ("features", "keys", "categorical", "missing", "one_hot_up_to", "shape"),
    "image_folder": ("path", "resize", "crop", "mode", "on_error", "skip_up_to"),
}
"""Keys of `data` that go with one source alone."""


class Data(Node):
    """What to train on."""

    source: Literal["mnist", "fashion_mnist", "cifar10", "cifar100", "disc", "parquet", "image_folder"] | Call = "mnist"
    """A named source, tables, pictures, or `{call: module:function, args: {}}`."""
    root: str = "~/.cache/trainyard"
    """Where named sources are downloaded to, or already are. A relative path starts as `url` does."""
    url: str | None = None
    """parquet: a file, a glob or a partitioned folder; image_folder: a folder with one folder for each class, or a
    Parquet file of paths and labels. Any fsspec URL, or a path: one in a job file starts from the folder of that file,
    one in `--set` or from Python from the working directory."""
    label: str | Annotated[list[str], Field(min_length=1)] | None = None
    """parquet: the column to learn, or several numbers for a regression. image_folder: the column of labels."""
    features: Annotated[list[str], Field(min_length=1)] = ["*"]
    """Columns to learn from: names or patterns such as num_*; all but label, keys and the splits' column by default."""
    keys: list[str] = []
    """Columns that identify a row: never learnt from, kept beside predictions."""
    categorical: list[str] = []
    """Names or patterns of numeric columns that are levels, not amounts. Text is so anyway."""
    missing: Missing = Missing()
    one_hot_up_to: Annotated[int, Field(ge=0)] = 16
    """A categorical column of up to so many levels becomes one input a level. One of more comes as one whole number
    behind the others, for which `kind: mlp` learns an embedding."""
    shape: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Shape of a sample where the only feature is a fixed-size column, such as [1, 28, 28]."""
    path: str = "path"
    """image_folder with a Parquet file: the column of paths, relative to the file's folder or whole."""
    resize: Size | None = None
    """image_folder: one number scales the shorter side to it; [height, width] scales both. Needed unless all pictures
    have one size."""
    crop: Size | None = None
    """image_folder: cut this much out of the middle, after resizing."""
    mode: Literal["rgb", "grey"] = "rgb"
    """image_folder: channels of the decoded pictures."""
    on_error: Literal["fail", "skip"] = "fail"
    """image_folder: what a broken picture does."""
    skip_up_to: Share = 0.01
    """image_folder: with on_error: skip, the share of broken pictures from which on it is an error all the same."""
    normalize: Literal["auto", "unit", "scalar", "standard", "imagenet", "none"] | Normalization = "auto"
    """unit: uint8 images to [0, 1]. scalar: one mean and deviation; standard: per channel or column. Or fixed ones.
    auto: unit for uint8 images, standard for columns."""
    splits: Splits = RandomSplits()
    """by: random, range, group, time or column."""
    shuffle: bool = True
    """A new order of the training rows each epoch."""
    augment: Augment = Augment()
    loader: Loader = Loader()
    cache: Cache = Cache()

    @field_validator("splits", mode="before")
    @classmethod
    def _random_unless_said(cls, value: Any) -> Any:
        return {"by": "random", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> Self:
        has_url = isinstance(self.source, str) and self.source in ONLY_WITH
        if has_url != (self.url is not None):
            raise ValueError("url goes with source: parquet or image_folder, and they need one")
        if self.source == "parquet" and self.label is None:
            raise ValueError("source: parquet needs label, the column to learn")
        if self.label is not None and not has_url:
            raise ValueError("label goes with source: parquet or image_folder")
        if self.source == "image_folder" and isinstance(self.label, list):
            raise ValueError("source: image_folder takes one label")
        for source, names in ONLY_WITH.items():
            for name in names if self.source != source else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} goes with source: {source}")
        return self

    @property
    def splits_column(self) -> str | None:
        """The column that splits go by, which no pattern of `features` means."""
        return None if isinstance(self.splits, RandomSplits | RangeSplits) else self.splits.column

    @property
    def labels(self) -> list[str]:
        """The label columns."""
        return [] if self.label is None else [self.label] if isinstance(self.label, str) else self.label
