"""Which rows train, validate and test: a function of the job and the data's content, never of chance.

One module for each way to split; `rows` is what comes out, and how it is stored with a run.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.sources.arrays import Source
from pipeline.data.split.drawn import proportional, random_rows, stratified_sample
from pipeline.data.split.groups import group_rows
from pipeline.data.split.ranges import range_rows
from pipeline.data.split.rows import NAMES, Part, Rows, rows_by_part, splits_table
from pipeline.data.split.times import time_rows
from pipeline.data.split.told import told_rows
from pipeline.errors import DataError
from pipeline.job import GroupSplits, Job, RandomSplits, RangeSplits, TimeSplits

__all__ = [
    "NAMES",
    "Part",
    "Rows",
    "make_splits",
    "proportional",
    "rows_by_part",
    "split_warnings",
    "splits_table",
    "stratified_sample",
]


def make_splits(job: Job, source: Source) -> dict[str, Rows]:
    """The job's splits: "train", and "val" and "test" where they exist. No two share a row.

    A source's own test set is the test split unless the job takes one from the training part.

    Raises
    ------
    DataError: counts, ranges or windows beyond the rows, ranges that overlap, a column that is not there or has a value
        that means nothing, or a split that comes out empty.
    """
    ids = _ids(job, source)
    for name, rows in ids.items():
        if len(rows) == 0:
            raise DataError(
                f"no rows are left for it out of {len(source.train):,}",
                where=f"data.splits.{name}",
                fix="ask for a larger share here, or smaller ones elsewhere",
            )
    check_apart(ids, len(source.train))
    splits = {name: Rows("train", ids[name]) for name in NAMES if name in ids}
    if "test" not in splits and source.test is not None:
        splits["test"] = Rows("test", np.arange(len(source.test), dtype=np.int64))
    return splits


def _ids(job: Job, source: Source) -> dict[str, np.ndarray]:
    """Positions of each split that is asked for, ascending, int64; it may be empty."""
    config = job.data.splits
    if isinstance(config, RandomSplits):
        return random_rows(job, config, source)
    if isinstance(config, RangeSplits):
        return range_rows(config, len(source.train))
    if isinstance(config, GroupSplits):
        return group_rows(job, config, source)
    if isinstance(config, TimeSplits):
        return time_rows(config, source)
    return told_rows(config, source)


def check_apart(ids: dict[str, np.ndarray], rows: int) -> None:
    """Raise DataError for a row on two sides."""
    taken = np.zeros(rows, bool)
    for name, indices in ids.items():
        twice = indices[taken[indices]]
        if len(twice):
            raise DataError(
                f"row {twice[0]} and {len(twice) - 1:,} more stand in another split too", where=f"data.splits.{name}"
            )
        taken[indices] = True


def split_warnings(job: Job, splits: dict[str, Rows]) -> list[str]:
    """What is allowed, but probably not meant."""
    rows, batch_size = len(splits["train"]), job.train.batch_size
    if batch_size != "all" and rows < batch_size:
        return [
            f"train.batch_size is {batch_size:,}, but only {rows:,} rows train: every step takes all of them "
            "(batch_size: all says so)"
        ]
    return []
