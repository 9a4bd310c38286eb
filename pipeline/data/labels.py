"""Raw labels, as a source gives them: whole numbers, or positions among names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config import TaskConfig
from pipeline.data.dataset import Dataset
from pipeline.errors import DataError

WHERE = "targets"

MOST_NAMED = 10
"""Labels that a message names."""


def to_integer_labels(targets: np.ndarray, kind: str, where: str = WHERE) -> np.ndarray:
    """Labels as int64 (N,), for a task of this kind.

    Raises
    ------
    DataError: more than one a row, or numbers that are not whole.
    """
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise DataError(
            f"{kind} needs one label a row, but targets have the shape {targets.shape}",
            where=where,
            fix="return labels as (N,), or use task: regression",
        )
    if targets.dtype.kind == "f":
        raise_if_wrong(
            targets, targets != np.floor(targets), "no whole number", "use labels, or task: regression", where
        )
    return targets.astype(np.int64, copy=False)


def positive_mask(labels: np.ndarray, label_names: Sequence[str], positive: Sequence[int | str]) -> np.ndarray:
    """Which labels count as 1, bool (N,). Where labels have names, so are those in `positive`."""
    if label_names:
        positive_names = {str(label) for label in positive}
        return np.isin(labels, [number for number, name in enumerate(label_names) if name in positive_names])
    return np.isin(labels, [int(label) for label in positive if not isinstance(label, str)])


def stratification_labels(dataset: Dataset, task: TaskConfig) -> np.ndarray:
    """Numbers that tell the classes of the training part apart, int64 (N,), before any class is fitted."""
    labels = to_integer_labels(dataset.train.targets, task.kind)
    if task.positive is None:
        return labels
    return positive_mask(labels, dataset.label_names, task.positive).astype(np.int64)


def raise_if_wrong(values: np.ndarray, wrong: np.ndarray, what: str, fix: str, where: str = WHERE) -> None:
    """Raise DataError where any value (N,) is wrong (N,), with the first of them and their number."""
    count = int(wrong.sum())
    if count:
        first = int(np.argmax(wrong))
        raise DataError(
            f"{values[first]} at row {first} is {what} ({count:,} of {len(values):,} rows)", where=where, fix=fix
        )


def sample_repr(values: Sequence[object] | np.ndarray) -> str:
    """The first of them, in words."""
    return ", ".join(map(str, values[:MOST_NAMED])) + (", ..." if len(values) > MOST_NAMED else "")
