"""Whole groups drawn at random."""

from __future__ import annotations

import numpy as np

from pipeline.data.random import make_generator, random_permutation
from pipeline.data.sources.arrays import Dataset
from pipeline.data.split.column import get_split_column
from pipeline.errors import DataError
from pipeline.job import GroupSplitsConfig, JobConfig


def split_by_group(job: JobConfig, config: GroupSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Groups in a drawn order, val's first, so that asking for a test split too leaves val as it is.

    A number takes so many groups. A share goes through the groups that are left, in order, and takes each that brings
    the rows taken nearer to it; so it ends within half of the smallest group that it passed over.

    Raises
    ------
    DataError: more groups than there are, or none left to train.
    """
    column = get_split_column(dataset, config.column)
    _, group, sizes = np.unique(column.values, return_inverse=True, return_counts=True)
    order = random_permutation(
        make_generator(job.seed.for_stream("split"), f"groups of {dataset.fingerprint}"), len(sizes)
    )
    side = np.full(len(sizes), -1)
    for number, asked in enumerate((config.val, config.test)):
        left = order[side[order] < 0]
        taken = (
            left[: int(asked)] if asked >= 1 else left[_select_nearest_groups(sizes[left], round(len(group) * asked))]
        )
        if asked and len(taken) in (0, len(left)):
            name = ("val", "test")[number]
            raise DataError(
                f"{name}: {asked:g} takes {len(taken):,} of {len(left):,} groups of {config.column!r}, "
                f"the largest has {sizes[left].max() if len(left) else 0:,} of {len(group):,} rows",
                where=f"data.splits.{name}",
                fix="ask for a share that whole groups can make up, and leave some to train",
            )
        side[taken] = number
    of_row = side[group.reshape(-1)]
    asked_for = [("train", -1)] + [(name, n) for n, name in enumerate(("val", "test")) if getattr(config, name)]
    return {name: np.flatnonzero(of_row == number).astype(np.int64) for name, number in asked_for}


def _select_nearest_groups(sizes: np.ndarray, target_size: int) -> np.ndarray:
    """Which groups to take, bool (G,): each that brings the sum of sizes nearer to what is wanted."""
    takes = np.zeros(len(sizes), bool)
    for index, size in enumerate(sizes.tolist()):
        if size < 2 * target_size:
            takes[index] = True
            target_size -= size
    return takes
