"""What a data source returns (arrays, their layout, a fingerprint of their content), and the indices of each split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.data.tabular.schema import Schema


PartName = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class DatasetPart:
    """The samples of one part of a dataset: its training part, or its test set.

    inputs: images as uint8 (N, H, W) or (N, C, H, W), or numbers as float32 or float64 (N, F) or of any further shape.
        May be memory-mapped (`np.memmap`) or computed on demand (`device_transfer.LazyArray`): read a block of rows
        at a time.
    targets: labels as int64 (N,), for several label columns (N, L); or numbers as float32 or float64 (N,) or (N, T).
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class SplitColumn:
    """A column to split by, with one value for each row of the training part.

    values: int64 or floating (N,).
    value_names: for a column of text, the text that each integer in `values` stands for; else empty.
    is_time: whether `values` are nanoseconds since 1970, UTC.
    """

    values: np.ndarray
    value_names: tuple[str, ...] = ()
    is_time: bool = False


@dataclass(frozen=True, eq=False)
class Dataset:
    """The data that a job trains on.

    train: the samples that the splits are taken from.
    test: the source's test set, if it has one.
    classes: names of the classes in the order of their labels, if the source declares them.
    fingerprint: SHA-256 of what determines the content, in hex.
    schema: the layout of the inputs, if they are rows of a table.
    label_names: the distinct labels, sorted, if labels are text: targets are positions in it. Which of them are classes
        is fitted on the training split, see `targets`.
    has_boolean_labels: whether the targets 0 and 1 are booleans in the source.
    column_label_names: of a table with several label columns of classes, `label_names` of each.
    boolean_label_columns: the indices of those that are booleans.
    split_columns: by name, the columns that the job splits by.
    warnings: messages about data that was skipped, such as invalid images.
    column_names: of the columns of inputs (N, F), if they came from a data frame.
    rounding_errors: the largest error that conversion to the inputs' type caused in each column or channel, float64
        (C,), see `rounding`; None if it caused none.
    reopen_in_float64: opens the same data with float64 inputs; given if inputs are float32 and the data has more
        digits.
    left_out: with `data.features: auto`, the columns that are not among the inputs, each with the reason.
    reopen_with_features: opens the same data with some of its columns, by name; given for tables.
    """

    train: DatasetPart
    test: DatasetPart | None
    classes: tuple[str, ...]
    fingerprint: str
    schema: Schema | None = None
    label_names: tuple[str, ...] = ()
    has_boolean_labels: bool = False
    column_label_names: tuple[tuple[str, ...], ...] = ()
    boolean_label_columns: tuple[int, ...] = ()
    split_columns: Mapping[str, SplitColumn] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    column_names: tuple[str, ...] = ()
    rounding_errors: np.ndarray | None = None
    reopen_in_float64: Callable[[], Dataset] | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    reopen_with_features: Callable[[list[str]], Dataset] | None = None

    def part(self, name: str) -> DatasetPart:
        """Return the part "train" or "test"."""
        arrays = {"train": self.train, "test": self.test}[name]
        assert arrays is not None, f"the source has no {name} part"
        return arrays


def make_dataset(
    train: DatasetPart, test: DatasetPart | None, classes: tuple[str, ...], column_names: tuple[str, ...] = ()
) -> Dataset:
    """Return a dataset with its fingerprint computed from the arrays."""
    return Dataset(train, test, classes, compute_fingerprint(train, test, classes), column_names=column_names)


def compute_fingerprint(train: DatasetPart, test: DatasetPart | None, classes: tuple[str, ...]) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of the arrays, and of the classes, in hex."""
    digest = hashlib.sha256()
    for part, arrays in (("train", train), ("test", test)):
        if arrays is None:
            continue
        for name, values in (("inputs", arrays.inputs), ("targets", arrays.targets)):
            little_endian = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
            digest.update(f"{part}/{name} {little_endian.dtype.str} {little_endian.shape}\n".encode())
            digest.update(little_endian.reshape(-1).view(np.uint8).data)
    digest.update(repr(tuple(classes)).encode())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SplitIndices:
    """The samples of one split.

    part: the part of the dataset that contains them.
    indices: their positions in it, int64 (n,), ascending. The sampler decides the order in training.
    """

    part: PartName
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


def indices_by_part(splits: Mapping[str, SplitIndices]) -> dict[PartName, list[np.ndarray]]:
    """Return the indices that are used of each part, one array per split."""
    used: dict[PartName, list[np.ndarray]] = {}
    for split in splits.values():
        used.setdefault(split.part, []).append(split.indices)
    return used


def splits_to_table(splits: dict[str, SplitIndices]) -> pa.Table:
    """Return the splits as a table of (split: string, part: string, row: int64), to be stored with a run."""
    import pyarrow as pa

    def repeat_per_row(values: list[str]) -> pa.Array:
        codes = np.repeat(np.arange(len(values), dtype=np.int32), [len(split) for split in splits.values()])
        return pa.DictionaryArray.from_arrays(codes, pa.array(values, pa.string())).cast(pa.string())

    columns = {
        "split": repeat_per_row(list(splits)),
        "part": repeat_per_row([split.part for split in splits.values()]),
        "row": pa.array(np.concatenate([split.indices for split in splits.values()]), pa.int64()),
    }
    return pa.table(columns)
