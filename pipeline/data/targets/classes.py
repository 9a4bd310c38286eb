"""Which classes there are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.data.sources.arrays import Source
from pipeline.data.split.rows import Rows
from pipeline.data.targets.labels import are_positive, some, whole_numbers
from pipeline.errors import DataError
from pipeline.job import Task

MOST_UNNAMED_CLASSES = 10_000
"""More classes than rows and than this are taken for numbers that are no labels."""


def text_classes(source: Source, task: Task, splits: Mapping[str, Rows], where: str) -> tuple[str, ...]:
    """Names of the classes where labels are text: those that occur in training, sorted.

    Raises
    ------
    DataError: a label in another split that no training row has; or it is not said which count as positive.
    """
    names, labels = source.label_names, source.train.targets
    found = np.bincount(labels[splits["train"].ids], minlength=len(names)) > 0
    occurring = tuple(name for name, there in zip(names, found, strict=True) if there)
    if task.kind == "binary":
        if task.positive is None:
            raise DataError(
                f"the labels are {some(names)}: which of them count as 1?",
                where="task.positive",
                fix=f"write task: {{kind: binary, positive: [{names[-1]}]}}",
            )
        wanted = {str(label) for label in task.positive}
        _refuse_absent(wanted.isdisjoint(names), task, names)
        return _pair([n for n in occurring if n in wanted], [n for n in occurring if n not in wanted])
    for split, rows in splits.items():
        unknown = labels[rows.ids[~found[labels[rows.ids]]]]
        if len(unknown):
            raise DataError(
                f"the label {names[unknown[0]]!r} stands in {split}, but in no training row ({len(unknown):,} of "
                f"{len(rows):,} rows of {split} have such labels)",
                where=where,
                fix="draw with data.splits.stratify: true, split otherwise, or drop these rows",
            )
    return occurring


def _pair(positive: list[str], others: list[str]) -> tuple[str, str]:
    return (others[0], positive[0]) if len(positive) == len(others) == 1 else ("negative", "positive")


def numbered_classes(source: Source, task: Task, where: str) -> tuple[str, ...]:
    """Names of the classes where labels are numbers: those that the source declares, else the numbers.

    Raises
    ------
    DataError: labels beyond the classes that the source names, or far too many for its rows; no row of
        `task.positive`.
    """
    if task.kind == "binary":
        if task.positive is not None:
            labels = whole_numbers(source.train.targets, task.kind, where)
            _refuse_absent(not are_positive(labels, (), task.positive).any(), task, np.unique(labels))
            return ("negative", "positive")
        return source.classes if len(source.classes) == 2 else ("0", "1")
    parts = [part.targets for part in (source.train, source.test) if part is not None]
    highest = max(int(whole_numbers(targets, task.kind, where).max()) for targets in parts)
    if source.classes:
        if highest >= len(source.classes):
            raise DataError(
                f"the label {highest}, but only {len(source.classes)} classes are named",
                where=where,
                fix="name them all, or number the classes from 0",
            )
        return source.classes
    if highest >= max(len(source.train), MOST_UNNAMED_CLASSES):
        raise DataError(
            f"the label {highest} with {len(source.train):,} rows",
            where=where,
            fix="number the classes 0, 1, 2, ... without gaps; for numbers that are no labels, task: regression",
        )
    return tuple(str(label) for label in range(highest + 1))


def _refuse_absent(absent: bool, task: Task, labels: tuple[str, ...] | np.ndarray) -> None:
    if absent:
        raise DataError(
            f"no row has a label of {task.positive}", where="task.positive", fix=f"labels here: {some(labels)}"
        )
