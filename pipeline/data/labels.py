"""Raw labels, as a data source returns them: integers, or positions in the list of label names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config import TaskConfig
from pipeline.data.dataset import Dataset
from pipeline.errors import DataError

WHERE = "targets"

MAX_LISTED_LABELS = 10
"""Labels that a message lists."""


def to_integer_labels(targets: np.ndarray, kind: str, where: str = WHERE) -> np.ndarray:
    """Return labels as int64 (N,), for a task of this kind.

    Raises
    ------
    DataError: more than one label per row, or numbers that are not integers.
    """
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise DataError(
            f"{kind} needs one label per row, but targets have the shape {targets.shape}",
            where=where,
            fix="return labels as (N,), or use task: regression",
        )
    if targets.dtype.kind == "f":
        raise_if_wrong(
            targets, targets != np.floor(targets), "not a whole number", "use labels, or task: regression", where
        )
    return targets.astype(np.int64, copy=False)


def positive_mask(labels: np.ndarray, label_names: Sequence[str], positive: Sequence[int | str]) -> np.ndarray:
    """Return which labels count as 1, bool (N,). If labels have names, `positive` lists names."""
    if label_names:
        positive_names = {str(label) for label in positive}
        return np.isin(labels, [number for number, name in enumerate(label_names) if name in positive_names])
    return np.isin(labels, [int(label) for label in positive if not isinstance(label, str)])


def stratification_labels(dataset: Dataset, task: TaskConfig) -> np.ndarray:
    """Return a number per class for each row of the training part, int64 (N,), before any class is fitted."""
    labels = to_integer_labels(dataset.train.targets, task.kind)
    if task.positive is None:
        return labels
    return positive_mask(labels, dataset.label_names, task.positive).astype(np.int64)


def raise_if_wrong(values: np.ndarray, wrong: np.ndarray, what: str, fix: str, where: str = WHERE) -> None:
    """Raise DataError if any of the values (N,) is marked in `wrong`, bool (N,), with the first one and their count."""
    count = int(wrong.sum())
    if count:
        first = int(np.argmax(wrong))
        raise DataError(
            f"{values[first]} at row {first} is {what} ({count:,} of {len(values):,} rows)", where=where, fix=fix
        )


def sample_repr(values: Sequence[object] | np.ndarray) -> str:
    """Return the first `MAX_LISTED_LABELS` values as text."""
    return ", ".join(map(str, values[:MAX_LISTED_LABELS])) + (", ..." if len(values) > MAX_LISTED_LABELS else "")
