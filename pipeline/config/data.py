"""`data:` the data to train on, by source, and how it is prepared and loaded."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.config.base import ConfigNode, Fraction, Positive, validate_import_path
from pipeline.config.splits import RandomSplitsConfig, RangeSplitsConfig, SplitsConfig


class UserFunctionConfig(ConfigNode):
    """A function of your own that returns the data. It may take any time: `scale.hang_s` does not apply to it."""

    call: str
    """`module:function`. It returns NumPy arrays or tensors: `(inputs, targets)`; two such pairs, for training and
    test; or `{"train": pair, "test": pair, "classes": names}`, of which the last two are optional. Inputs may be a data
    frame of numbers. With `data.label`, it returns a table, or `{"train": table, "test": table}`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function. A text `env:NAME` becomes the value of that environment variable."""

    @field_validator("call")
    @classmethod
    def _validate_call(cls, value: str) -> str:
        return validate_import_path(value)


class NormalizeConfig(ConfigNode):
    """Inputs become (x - mean) / std with these numbers, in the unit of images scaled to [0, 1] or of raw columns."""

    mean: float | list[float]
    """The number that is subtracted: one for all values, or a list of one per channel or column."""
    std: float | list[float]
    """The number to divide by: one for all values, or a list of one per channel or column."""


IMAGENET = NormalizeConfig(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
"""The normalization that torchvision's pretrained models expect."""


class ColorJitterConfig(ConfigNode):
    """Color jitter: each factor is drawn from [1 - value, 1 + value]; 0 changes nothing."""

    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest distance from 1 of the factor on all values."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest distance from 1 of the factor on each value's difference from the image's mean gray."""
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest distance from 1 of the factor on each value's difference from its pixel's gray."""


class AugmentConfig(ConfigNode):
    """Augmentation of training images: drawn anew for every sample of every step, and applied on the device."""

    crop: Annotated[int, Field(ge=0)] = 0
    """Pixels: pad each side with this many zeros, then take a random crop of the original size."""
    flip: bool = False
    """Flip horizontally with probability 0.5."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Rotate by up to this many degrees in either direction."""
    jitter: ColorJitterConfig = ColorJitterConfig()
    """Color jitter."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Mix each image and its label with another of the global batch, with a weight drawn from Beta(mixup, mixup) (Zhang
    et al. 2018, arXiv:1710.09412); 0 for none."""


class ImputationConfig(ConfigNode):
    """Replacements for missing values (null or NaN) in features."""

    numeric: Literal["median", "mean", "fail"] | float = "median"
    """In columns of numbers: the median or mean of the training rows, or a fixed number; fail makes it an error."""
    categorical: str = "own_level"
    """In categorical columns: own_level makes missing values a category of their own; fail makes them an error; any
    other text is the category that replaces them."""


class CacheConfig(ConfigNode):
    """Where tables and decoded images that are too large for memory are kept between runs. Changes speed, not
    results."""

    folder: str = "~/.cache/trainyard/data"
    """Folder on a disk of this machine."""
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """Size of the folder, in units of 10^9 bytes; beyond it, the least recently used data is deleted."""
    in_memory_mb: Annotated[float, Field(ge=0)] = 256.0
    """Data of up to this size, in units of 10^6 bytes, is held in memory instead."""


class DataLoaderConfig(ConfigNode):
    """How batches are loaded. Changes speed, not results."""

    processes: Annotated[int, Field(ge=0)] = 0
    """Loader processes per worker; 0 loads in the worker itself, which is fastest for data in memory."""
    pin_memory: Literal["auto"] | bool = "auto"
    """Put batches into page-locked memory for faster copies to a GPU; auto: if there is one."""
    eval_batch_size: Positive = 1024
    """Rows per batch of an evaluation."""


Size = Positive | Annotated[tuple[Positive, Positive], Strict(False)]
"""Pixels: one number for both sides, or [height, width]."""


class BaseDataConfig(ConfigNode):
    """The data to train on: the keys that every source has."""

    source: str | UserFunctionConfig
    normalize: (
        Literal["auto", "unit", "scalar", "standard", "robust", "quantile", "imagenet", "none"] | NormalizeConfig
    ) = "auto"
    """How inputs are scaled. unit: uint8 images to [0, 1]. scalar: one mean and one standard deviation of all training
    values. standard: those of each channel or column. robust: columns by their median and interquartile range, then
    smoothly clipped to within 3 (arXiv 2407.04491). quantile: columns to a normal distribution, by up to 1,000
    quantiles. imagenet: those that torchvision's pretrained weights expect. none: not at all. {mean: 0.5, std: 0.25}:
    these numbers. auto: unit for uint8 images, standard for columns."""
    splits: SplitsConfig = RandomSplitsConfig()
    """Which rows are for training, validation and test; by: random, range, group, time or column."""
    shuffle: bool = True
    """Draw a new order of the training rows in each epoch."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""
    loader: DataLoaderConfig = DataLoaderConfig()
    """How batches are loaded."""
    cache: CacheConfig = CacheConfig()
    """Where decoded data is kept on this machine's disk between runs."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unset_keys_of_other_sources(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key in cls.model_fields or not _is_unset(key, value)}

    @field_validator("source", mode="before")
    @classmethod
    def _name_all_sources(cls, value: Any) -> Any:
        if isinstance(value, dict | UserFunctionConfig) or (isinstance(value, str) and value in SOURCE_CONFIGS):
            return value
        *names, last = [repr(name) for name in SOURCE_CONFIGS]
        raise PydanticCustomError("literal_error", "unknown source", {"expected": f"{', '.join(names)} or {last}"})

    @field_validator("splits", mode="before")
    @classmethod
    def _random_unless_given(cls, value: Any) -> Any:
        return {"by": "random", **value} if isinstance(value, dict) else value

    @model_serializer(mode="wrap")
    def _source_keys_before_common_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {key: values[key] for key in sorted(values, key=lambda key: key in COMMON_KEYS)}

    @property
    def splits_column(self) -> str | None:
        """The column that defines the splits, if any; patterns of `features` do not match it."""
        return None if isinstance(self.splits, RandomSplitsConfig | RangeSplitsConfig) else self.splits.column

    @property
    def labels(self) -> list[str]:
        """The label columns; empty for a source without them."""
        return []


COMMON_KEYS = frozenset(BaseDataConfig.model_fields) - {"source"}


class NamedDataConfig(BaseDataConfig):
    """A public dataset, downloaded at its first use."""

    source: Literal["mnist", "fashion_mnist", "cifar10", "cifar100"] = "mnist"
    """The name of the dataset."""
    root: str = "~/.cache/trainyard"
    """Folder to which the dataset is downloaded, or in which its files already are. The other sources ignore this key,
    so that a `base:` can set it for jobs of any source."""


class DiscDataConfig(BaseDataConfig):
    """Generated points in the plane, labeled 1 inside a disc around the origin and 0 outside."""

    source: Literal["disc"]
    """The name of the generator; its seed is `seed.data`."""


class UserFunctionDataConfig(BaseDataConfig):
    """Arrays or tensors that a function of your own returns."""

    source: UserFunctionConfig
    """The function, as `{call: module:function, args: {}}`."""


class FileDataConfig(BaseDataConfig):
    """Files at a URL."""

    url: str
    label: str | list[str] | None

    @property
    def labels(self) -> list[str]:
        return [] if self.label is None else [self.label] if isinstance(self.label, str) else self.label


class TableColumnsConfig(BaseDataConfig):
    """Tables of any source: which columns are used, and how."""

    label: str | Annotated[list[str], Field(min_length=1)]
    """The column to predict; a list of columns for a regression of several numbers, or for multilabel."""
    features: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = ["*"]
    """Input columns: names, or patterns such as num_*. The default is all columns but label, keys and the splits'
    column. auto: all of these but columns that would not help, each of which is named in a warning: text that is almost
    unique (more than 90 % of the values differ), values that are not numbers, text or times, columns with one value in
    all training rows, row numbers, and columns that alone predict the label (target leakage)."""
    exclude: list[str] = []
    """Names or patterns of columns that are not inputs; of a column that `features` names too, it is an error."""
    keys: list[str] = []
    """Columns that identify a row. They are not inputs of the model; predictions include them."""
    categorical: list[str] = []
    """Names or patterns of numeric columns that are categorical. Columns of text always are."""
    dates: list[str] = []
    """Names or patterns of columns of text that are dates or times in ISO 8601, such as 2024-05-31 or
    2024-05-31T12:00:00Z. Columns of dates and times always are, and with features: auto all such text. A date becomes
    numbers: the days since 1970, and sine and cosine of the day of the year, the day of the week and the time of day;
    times with a time zone are those in UTC."""
    hashed: dict[str, Annotated[int, Field(ge=2, le=1_000_000)]] = {}
    """Categorical columns with very many values, by name or pattern, and a number of buckets: each value is put into
    one of them by a hash, and the bucket is the category. So new values have one too."""
    missing: ImputationConfig = ImputationConfig()
    """Replacements for missing values."""
    one_hot_up_to: Annotated[int, Field(ge=0)] = 16
    """A categorical column with up to this many categories is one-hot encoded. One with more becomes an
    integer code after the other inputs, which `kind: mlp` embeds."""
    shape: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Shape of a sample if the only feature is a column of bytes or lists of fixed size, such as [1, 28, 28]."""

    @property
    def labels(self) -> list[str]:
        return [self.label] if isinstance(self.label, str) else self.label


class TableDataConfig(TableColumnsConfig, FileDataConfig):
    """Tables in files: the keys of every file format."""

    url: str
    """A file, a glob or a partitioned folder: any fsspec URL, or a path."""


class UserTableDataConfig(TableColumnsConfig, UserFunctionDataConfig):
    """A table that a function of your own returns, with a `label`: a data frame of pandas or polars, an Arrow table, a
    dict of columns, or `{"train": table, "test": table}`. Its columns are what those of Parquet files are: text,
    missing values and text labels included."""

    source: UserFunctionConfig
    """The function, as `{call: module:function, args: {}}`."""


class TypedTableDataConfig(TableDataConfig):
    """Tables in files whose values have types."""

    source: Literal["parquet", "arrow", "numpy", "jsonl"]
    """The format of the files. arrow: Arrow IPC files, also called Feather, or streams. numpy: in a `.npy` file, the
    columns of a matrix (N, F) are named "0", "1", ..., and a structured array has its fields as columns; in a `.npz`
    file, each array (N,) is a column of its name, and an array (N, ...) is one column of lists, so that `X` and `y` are
    the features and the label. jsonl: text with one JSON object per line, also compressed with gzip, bz2 or zstd."""


NULL_TEXTS = "?|NA|N/A|n/a|#N/A|#N/A N/A|#NA|<NA>|NaN|nan|-NaN|-nan|NULL|null|None|1.#IND|-1.#IND|1.#QNAN|-1.#QNAN|\\N"
NULL_VALUES = ["", *NULL_TEXTS.split("|")]
"""Texts that stand for a missing value in CSV files: those of pandas, ? as in many public tables, and \\N of databases.
"""


class CsvDataConfig(TableDataConfig):
    """Tables in text files with one line per row, such as CSV and TSV, also compressed with gzip, bz2 or zstd. The
    first line names the columns."""

    source: Literal["csv"]
    """Text files, one line per row."""
    delimiter: str = "auto"
    """The character between two columns; auto: comma, tab, semicolon or pipe, whichever the first lines have."""
    decimal: Literal["auto", ".", ","] = "auto"
    """The decimal separator of numbers; auto: comma if the first lines have such numbers, and comma is not the
    delimiter."""
    encoding: str = "utf-8"
    """The encoding of the text, such as latin-1, cp1252 or utf-16."""
    null_values: list[str] = NULL_VALUES
    """Texts that stand for a missing value in any column, quoted or not."""
    text_columns: list[str] = []
    """Columns that are text even if all of their values are numbers, booleans or times. Whole numbers with leading
    zeros, such as 00501, or of more than 64 bits are text anyway."""

    @field_validator("delimiter")
    @classmethod
    def _validate_delimiter(cls, value: str) -> str:
        if value != "auto" and (len(value) != 1 or value in '"\r\n' or not value.isascii()):
            raise ValueError(f"{value!r} is no single character: use auto, or one such as ',', ';', '|' or \"\\t\"")
        return value

    @field_validator("encoding")
    @classmethod
    def _validate_encoding(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError:
            raise ValueError(f"{value!r} is no encoding; known are utf-8, latin-1, cp1252, utf-16, ...") from None
        return value


class ImageFolderDataConfig(FileDataConfig):
    """Image files: one folder per class, or a Parquet file of paths and labels."""

    source: Literal["image_folder"]
    """Image files."""
    url: str
    """A folder with one folder per class, or a Parquet file of paths and labels: any fsspec URL, or a path."""
    label: str | None = None
    """With a Parquet file: the column of labels. A folder has none, since the folders in it are the classes."""
    path: str = "path"
    """With a Parquet file: the column of paths, relative to the file's folder or absolute."""
    resize: Size | None = None
    """Pixels: one number scales the shorter side to it; [height, width] scales both sides. Needed unless all images
    have the same size."""
    crop: Size | None = None
    """Pixels: cut this much out of the center, after resizing; one number for both sides, or [height, width]."""
    mode: Literal["rgb", "grey"] = "rgb"
    """Channels of the decoded images: rgb for three, grey for one."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be decoded: fail, or skip it with a warning."""
    skip_up_to: Fraction = 0.01
    """With on_error: skip, the largest share of images that may be skipped; more are an error."""

    @field_validator("label", mode="before")
    @classmethod
    def _one_label(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("source: image_folder takes one label")
        return value


SOURCE_CONFIGS: dict[str, type[BaseDataConfig]] = {
    **dict.fromkeys(("mnist", "fashion_mnist", "cifar10", "cifar100"), NamedDataConfig),
    "disc": DiscDataConfig,
    "parquet": TypedTableDataConfig,
    "csv": CsvDataConfig,
    **dict.fromkeys(("arrow", "numpy", "jsonl"), TypedTableDataConfig),
    "image_folder": ImageFolderDataConfig,
}
"""The configuration class of each named source."""


def sources_with(key: str) -> list[str]:
    """Return the sources that have the key; an empty list for a key of all sources or of none."""
    return (
        []
        if key in COMMON_KEYS | {"source"}
        else [name for name, kind in SOURCE_CONFIGS.items() if key in kind.model_fields]
    )


def _is_unset(key: str, value: Any) -> bool:
    """Return whether a key of another source has its default, as in a job that was stored before keys were divided by
    source, or in one whose source is overridden. (No other source reads `root`, so any value of it is ignored.)"""
    if key == "root":
        return True
    for kind in SOURCE_CONFIGS.values():
        field = kind.model_fields.get(key)
        default = None if field is None or field.is_required() else field.get_default()
        if field is not None and (value == default or (isinstance(default, ConfigNode) and _equals(default, value))):
            return True
    return False


def _equals(default: ConfigNode, value: Any) -> bool:
    try:
        return type(default).model_validate(value) == default
    except ValidationError:
        return False


def _data_tag(value: Any) -> str:
    """Return the class that a mapping describes; errors are then those of that class alone."""
    source = value.get("source", "mnist") if isinstance(value, dict) else getattr(value, "source", "mnist")
    if isinstance(source, dict | UserFunctionConfig):
        label = value.get("label") if isinstance(value, dict) else getattr(value, "label", None)
        return "UserFunctionDataConfig" if label is None else "UserTableDataConfig"
    return SOURCE_CONFIGS.get(source, NamedDataConfig).__name__ if isinstance(source, str) else "NamedDataConfig"


DataConfig = Annotated[
    Annotated[NamedDataConfig, Tag("NamedDataConfig")]
    | Annotated[DiscDataConfig, Tag("DiscDataConfig")]
    | Annotated[TypedTableDataConfig, Tag("TypedTableDataConfig")]
    | Annotated[CsvDataConfig, Tag("CsvDataConfig")]
    | Annotated[ImageFolderDataConfig, Tag("ImageFolderDataConfig")]
    | Annotated[UserFunctionDataConfig, Tag("UserFunctionDataConfig")]
    | Annotated[UserTableDataConfig, Tag("UserTableDataConfig")],
    Discriminator(_data_tag),
]
