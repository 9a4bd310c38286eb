"""Labels as the task needs them. The one place where a source's targets become what is learned."""

from __future__ import annotations

import numpy as np

from pipeline.data.sources.arrays import Source
from pipeline.errors import DataError
from pipeline.job import Task

WHERE = "targets"

MOST_UNNAMED_CLASSES = 10_000
"""More classes than rows and than this are taken for numbers that are no labels."""


def prepare_targets(
    targets: np.ndarray, task: Task, dtype: type[np.float32] | type[np.float64] = np.float32
) -> np.ndarray:
    """The targets of a part as the task learns them, rows as they are.

    multiclass: labels 0 to C - 1, int64 (N,). binary: 1 where the label is in `task.positive`, else 0, in `dtype` (N,);
    without `positive` the labels must be 0 and 1 already. regression: numbers in `dtype`, (N, T).

    Parameters
    ----------
    targets: int64 (N,), or floating (N,) or (N, T), as in `Arrays`.
    dtype: of binary and regression targets: the arithmetic's.

    Raises
    ------
    DataError: targets that do not fit the task, with the first offending value and how many there are.
    """
    if task.kind == "regression":
        return np.ascontiguousarray(targets.reshape(len(targets), -1).astype(dtype, copy=False))
    labels = _labels(targets, task)
    if task.kind == "multiclass":
        _refuse(labels, labels < 0, "a negative label", "number the classes from 0")
        return labels
    if task.positive is not None:
        return np.isin(labels, task.positive).astype(dtype)
    _refuse(
        labels,
        (labels != 0) & (labels != 1),
        "neither 0 nor 1",
        "say which labels count as 1, for example task: {kind: binary, positive: [1]}",
    )
    return labels.astype(dtype)


def class_names(source: Source, task: Task) -> tuple[str, ...]:
    """Names of the classes that the task tells apart, in the order of their numbers; empty for regression.

    Where the source names none, the labels' numbers are the names.

    Raises
    ------
    DataError: labels beyond the classes that the source names, or far too many for its rows; no row of
        `task.positive`.
    """
    if task.kind == "regression":
        return ()
    if task.kind == "binary":
        if task.positive is not None:
            if not np.isin(_labels(source.train.targets, task), task.positive).any():
                raise DataError(
                    f"no row has a label of {task.positive}",
                    where="task.positive",
                    fix=f"labels here: {_some(source.train.targets)}",
                )
            return ("negative", "positive")
        return source.classes if len(source.classes) == 2 else ("0", "1")
    parts = [part.targets for part in (source.train, source.test) if part is not None]
    highest = max(int(_labels(targets, task).max()) for targets in parts)
    if source.classes:
        if highest >= len(source.classes):
            raise DataError(
                f"the label {highest}, but only {len(source.classes)} classes are named",
                where=WHERE,
                fix="name them all, or number the classes from 0",
            )
        return source.classes
    if highest >= max(len(source.train), MOST_UNNAMED_CLASSES):
        raise DataError(
            f"the label {highest} with {len(source.train):,} rows",
            where=WHERE,
            fix="number the classes 0, 1, 2, ... without gaps; for numbers that are no labels, task: regression",
        )
    return tuple(str(label) for label in range(highest + 1))


def class_count(source: Source, task: Task) -> int:
    """Number of classes that the task tells apart: C, 2, or 0 for regression. Errors as `class_names`."""
    return len(class_names(source, task))


def class_counts(targets: np.ndarray, classes: int) -> list[int]:
    """Rows of each class among prepared targets (n,)."""
    counts: list[int] = np.bincount(targets.astype(np.int64), minlength=classes).tolist()
    return counts


def _labels(targets: np.ndarray, task: Task) -> np.ndarray:
    """Whole numbers, int64 (N,)."""
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise DataError(
            f"{task.kind} needs one label a row, but targets have the shape {targets.shape}",
            where=WHERE,
            fix="return labels as (N,), or use task: regression",
        )
    if targets.dtype.kind == "f":
        _refuse(targets, targets != np.floor(targets), "no whole number", "use labels, or task: regression")
    return targets.astype(np.int64, copy=False)


def _some(targets: np.ndarray) -> str:
    values = np.unique(targets)
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")


def _refuse(values: np.ndarray, wrong: np.ndarray, what: str, fix: str) -> None:
    count = int(wrong.sum())
    if count:
        first = int(np.argmax(wrong))
        raise DataError(
            f"{values[first]} at row {first} is {what} ({count:,} of {len(values):,} rows)", where=WHERE, fix=fix
        )
