"""Which rows train, validate and test: a function of the job and the data's content, never of chance.

One module for each way to split; `rows` is what comes out, and how it is stored with a run.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.sources.arrays import Dataset
from pipeline.data.split.drawn import allocate_proportionally, random_split, sample_stratified
from pipeline.data.split.groups import split_by_group
from pipeline.data.split.ranges import split_by_range
from pipeline.data.split.rows import SPLIT_NAMES, PartName, SplitIndices, indices_by_part, splits_to_table
from pipeline.data.split.times import split_by_time
from pipeline.data.split.told import split_by_column
from pipeline.errors import DataError
from pipeline.job import GroupSplitsConfig, JobConfig, RandomSplitsConfig, RangeSplitsConfig, TimeSplitsConfig

__all__ = [
    "SPLIT_NAMES",
    "PartName",
    "SplitIndices",
    "make_splits",
    "allocate_proportionally",
    "indices_by_part",
    "split_warnings",
    "splits_to_table",
    "sample_stratified",
]


def make_splits(job: JobConfig, dataset: Dataset) -> dict[str, SplitIndices]:
    """The job's splits: "train", and "val" and "test" where they exist. No two share a row.

    A source's own test set is the test split unless the job takes one from the training part.

    Raises
    ------
    DataError: counts, ranges or windows beyond the rows, ranges that overlap, a column that is not there or has a value
        that means nothing, or a split that comes out empty.
    """
    ids = _make_split_indices(job, dataset)
    for name, rows in ids.items():
        if len(rows) == 0:
            raise DataError(
                f"no rows are left for it out of {len(dataset.train):,}",
                where=f"data.splits.{name}",
                fix="ask for a larger share here, or smaller ones elsewhere",
            )
    check_disjoint(ids, len(dataset.train))
    splits = {name: SplitIndices("train", ids[name]) for name in SPLIT_NAMES if name in ids}
    if "test" not in splits and dataset.test is not None:
        splits["test"] = SplitIndices("test", np.arange(len(dataset.test), dtype=np.int64))
    return splits


def _make_split_indices(job: JobConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Positions of each split that is asked for, ascending, int64; it may be empty."""
    config = job.data.splits
    if isinstance(config, RandomSplitsConfig):
        return random_split(job, config, dataset)
    if isinstance(config, RangeSplitsConfig):
        return split_by_range(config, len(dataset.train))
    if isinstance(config, GroupSplitsConfig):
        return split_by_group(job, config, dataset)
    if isinstance(config, TimeSplitsConfig):
        return split_by_time(config, dataset)
    return split_by_column(config, dataset)


def check_disjoint(ids: dict[str, np.ndarray], num_rows: int) -> None:
    """Raise DataError for a row on two sides."""
    taken = np.zeros(num_rows, bool)
    for name, indices in ids.items():
        twice = indices[taken[indices]]
        if len(twice):
            raise DataError(
                f"row {twice[0]} and {len(twice) - 1:,} more stand in another split too", where=f"data.splits.{name}"
            )
        taken[indices] = True


def split_warnings(job: JobConfig, splits: dict[str, SplitIndices]) -> list[str]:
    """What is allowed, but probably not meant."""
    rows, batch_size = len(splits["train"]), job.train.batch_size
    if batch_size != "all" and rows < batch_size:
        return [
            f"train.batch_size is {batch_size:,}, but only {rows:,} rows train: every step takes all of them "
            "(batch_size: all says so)"
        ]
    return []
