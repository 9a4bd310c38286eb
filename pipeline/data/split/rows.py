"""The rows of each split, and how they are stored with a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

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
