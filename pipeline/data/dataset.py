"""The rows of each split, and how they are stored with a run.

What every source gives: decoded arrays in memory, and a digest of them.
"""

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

SPLIT_NAMES = ("train", "val", "test")
"""Splits in the order in which they are given and stored."""


@dataclass(frozen=True, eq=False)
class SplitIndices:
    """The rows of one split.

    part: the part of the source that they lie in.
    ids: their positions in it, int64 (n,), ascending. Order in training is the sampler's affair.
    """

    part: PartName
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


def indices_by_part(splits: Mapping[str, SplitIndices]) -> dict[PartName, list[np.ndarray]]:
    """The positions that are used of each part."""
    used: dict[PartName, list[np.ndarray]] = {}
    for rows in splits.values():
        used.setdefault(rows.part, []).append(rows.indices)
    return used


def splits_to_table(splits: dict[str, SplitIndices]) -> pa.Table:
    """The splits as a table of (split: string, part: string, row: int64), to be stored with a run."""
    import pyarrow as pa

    def words(values: list[str]) -> pa.Array:
        numbers = np.repeat(np.arange(len(values), dtype=np.int32), [len(rows) for rows in splits.values()])
        return pa.DictionaryArray.from_arrays(numbers, pa.array(values, pa.string())).cast(pa.string())

    ids = [rows.indices for rows in splits.values()]
    columns = {
        "split": words(list(splits)),
        "part": words([rows.part for rows in splits.values()]),
        "row": pa.array(np.concatenate(ids), pa.int64()),
    }
    return pa.table(columns)


@dataclass(frozen=True, eq=False)
class DatasetPart:
    """The rows of one part of a source.

    inputs: images as uint8 (N, H, W) or (N, C, H, W), or numbers as float32 or float64 (N, F) or of any further shape.
        May lie on disk (`np.memmap`), or be made on demand (`data.tensors.RowsOnDemand`): ask for some rows at a time.
    targets: labels as int64 (N,), or numbers as float32 or float64 (N,) or (N, T).
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class SplitColumn:
    """A column that splits go by, one value for each row of the training part.

    values: int64 or floating (N,). names: the text that each whole number stands for, where the column holds text.
    is_time: whether they are nanoseconds since 1970, UTC.
    """

    values: np.ndarray
    value_names: tuple[str, ...] = ()
    is_time: bool = False


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a job trains on.

    train: the rows that splits are made of.
    test: the source's own test set, where it has one.
    classes: names of the classes in the order of their labels, where the source declares them.
    fingerprint: SHA-256 of what decides the content, in hex.
    schema: the layout of the inputs, where they are rows of a table.
    names: of the columns of inputs (N, F), where they came as a data frame with names.
    label_names: where labels were found as text, sorted: targets are positions in it. Which of them are classes is
        fitted on the training split, see `targets`.
    columns: by name, what the job's splits go by.
    warnings: what was passed over and should be known, such as broken pictures.
    rounding: the largest error that conversion to the inputs' type made in each column or channel, float64 (C,), see
        `rounding`; None where it made none.
    in_float64: opens the same data with inputs in float64, where they are float32 and the data holds more digits.
    """

    train: DatasetPart
    test: DatasetPart | None
    classes: tuple[str, ...]
    fingerprint: str
    schema: Schema | None = None
    label_names: tuple[str, ...] = ()
    split_columns: Mapping[str, SplitColumn] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    column_names: tuple[str, ...] = ()
    rounding_errors: np.ndarray | None = None
    reopen_in_float64: Callable[[], Dataset] | None = None

    def part(self, name: str) -> DatasetPart:
        """The arrays of "train" or "test"."""
        arrays = {"train": self.train, "test": self.test}[name]
        assert arrays is not None, f"the source has no {name} part"
        return arrays


def make_dataset(
    train: DatasetPart, test: DatasetPart | None, classes: tuple[str, ...], column_names: tuple[str, ...] = ()
) -> Dataset:
    """A source with its fingerprint."""
    return Dataset(train, test, classes, compute_fingerprint(train, test, classes), column_names=column_names)


def compute_fingerprint(train: DatasetPart, test: DatasetPart | None, classes: tuple[str, ...]) -> str:
    """SHA-256 over the names, types, shapes and bytes of the arrays, and the classes, in hex."""
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
