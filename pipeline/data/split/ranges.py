"""Rows by position."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.data.split.rows import SPLIT_NAMES
from pipeline.errors import DataError
from pipeline.job import RangeSplitsConfig


def split_by_range(config: RangeSplitsConfig, num_rows: int) -> dict[str, np.ndarray]:
    """The ranges of the job; DataError where they end beyond the rows or overlap."""
    given = {name: bounds for name in SPLIT_NAMES if (bounds := getattr(config, name)) is not None}
    for name, (first, end) in given.items():
        if end > num_rows:
            raise DataError(
                f"[{first}, {end}] ends beyond the {num_rows:,} rows",
                where=f"data.splits.{name}",
                fix=f"end at {num_rows} or before",
            )
    ordered = sorted(given, key=lambda name: given[name])
    for name, other in pairwise(ordered):
        if given[name][1] > given[other][0]:
            raise DataError(
                f"{name} {list(given[name])} and {other} {list(given[other])} share rows",
                where="data.splits",
                fix="a range excludes its end: let one begin where the other ends",
            )
    return {name: np.arange(first, end, dtype=np.int64) for name, (first, end) in given.items()}
