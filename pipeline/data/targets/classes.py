"""Which classes there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pipeline.data.sources.arrays import Source
from pipeline.data.split.rows import Rows
from pipeline.data.targets.labels import are_positive, some, whole_numbers
from pipeline.errors import DataError
from pipeline.job import Task

FEW_CLASSES = 100
"""More classes than this, and than half of the training rows, are taken for numbers or keys that are no labels."""

MERGED = ("negative", "positive")
"""Names of the two classes of a binary task where one of them stands for several labels."""


class Classes(NamedTuple):
    """names: of each class. values: the label that means it, where labels are numbers; empty where they are text, or
    where a class stands for several labels."""

    names: tuple[str, ...]
    values: tuple[int, ...] = ()


def text_classes(source: Source, task: Task, splits: Mapping[str, Rows], where: str) -> Classes:
    """The classes where labels are text: those that occur in training, sorted.

    Raises
    ------
    DataError: a label in another split that no training row has; or it is not said which count as positive.
    """
    names, labels = source.label_names, source.train.targets
    if task.kind == "binary":
        if task.positive is None:
            raise DataError(
                f"the labels are {some(names)}: which of them count as 1?",
                where="task.positive",
                fix=f"write task: {{kind: binary, positive: [{names[-1]}]}}",
            )
        positive_names = {str(label) for label in task.positive}
        _refuse_absent(positive_names.isdisjoint(names), task, names)
        is_occurring = np.bincount(labels[splits["train"].ids], minlength=len(names)) > 0
        occurring = [name for name, occurs in zip(names, is_occurring, strict=True) if occurs]
        pair = [[name for name in occurring if (name in positive_names) == is_positive] for is_positive in (False, True)]
        return Classes((pair[0][0], pair[1][0]) if len(pair[0]) == len(pair[1]) == 1 else MERGED)
    occurring_numbers = _occurring(source, task, splits, where)
    return Classes(tuple(names[number] for number in occurring_numbers))


def numbered_classes(source: Source, task: Task, splits: Mapping[str, Rows], where: str) -> Classes:
    """The classes where labels are numbers: those that the source declares, else the numbers that occur in training,
    ascending. Of two, the later one is the positive, unless `task.positive` says otherwise.

    Raises
    ------
    DataError: labels beyond the classes that the source names; a label in another split that no training row has; far
        too many of them; more than two for a binary task; no row of `task.positive`.
    """
    if task.kind == "binary" and task.positive is not None:
        return _split_in_two(source, task, task.positive, splits, where)
    if source.classes and (task.kind == "multiclass" or len(source.classes) == 2):
        highest = max(
            int(whole_numbers(part.targets, task.kind, where).max())
            for part in (source.train, source.test)
            if part is not None
        )
        if highest >= len(source.classes):
            raise DataError(
                f"the label {highest}, but only {len(source.classes)} classes are named",
                where=where,
                fix="name them all, or number the classes from 0",
            )
        return Classes(source.classes, tuple(range(len(source.classes))))
    values = _occurring(source, task, splits, where)
    return Classes(tuple(map(str, values)), tuple(values))


def _split_in_two(
    source: Source, task: Task, positive: list[int | bool | str], splits: Mapping[str, Rows], where: str
) -> Classes:
    """Classes of which one is `positive`: they keep the labels' names where each is a single label."""
    labels = whole_numbers(source.train.targets, task.kind, where)
    chosen = are_positive(labels, (), positive)
    _refuse_absent(not chosen.any(), task, np.unique(labels))
    rows = splits["train"].ids
    pair = [np.unique(labels[rows[chosen[rows] == is_positive]]).tolist() for is_positive in (False, True)]
    if len(pair[0]) != 1 or len(pair[1]) != 1:
        return Classes(MERGED)
    values = (pair[0][0], pair[1][0])
    declared = source.classes
    names = [declared[value] if 0 <= value < len(declared) else str(value) for value in values]
    return Classes((names[0], names[1]), values)


def _occurring(source: Source, task: Task, splits: Mapping[str, Rows], where: str) -> list[int]:
    """The labels of the training rows, ascending: numbers, or positions in `Source.label_names`.

    Raises
    ------
    DataError: other labels in other splits; too many of them for what the task is.
    """
    names, rows = source.label_names, len(splits["train"])
    parts = {
        name: whole_numbers(source.part(split.part).targets, task.kind, where)[split.ids]
        for name, split in splits.items()
    }
    training_labels = np.unique(parts["train"])

    def named(label: int) -> str:
        return repr(names[label]) if names else str(label)

    if task.kind == "binary" and len(training_labels) > 2:
        raise DataError(
            f"{len(training_labels):,} different labels ({some(training_labels)}), but binary learns two",
            where=where,
            fix=f"say which of them count as 1, for example task: {{kind: binary, positive: [{training_labels[-1]}]}}; "
            "or use task: multiclass",
        )
    if len(training_labels) > max(FEW_CLASSES, rows // 2):
        raise DataError(
            f"{len(training_labels):,} different labels in {rows:,} training rows, such as {named(training_labels[-1])}: too many to be "
            "classes",
            where=where,
            fix="name a column of classes in data.label" + ("" if names else "; for numbers, use task: regression"),
        )
    for name, labels in parts.items():
        unknown = labels[~np.isin(labels, training_labels)]
        if len(unknown):
            raise DataError(
                f"the label {named(unknown[0])} stands in {name}, but in no training row ({len(unknown):,} of "
                f"{len(labels):,} rows of {name} have such labels)",
                where=where,
                fix="draw with data.splits.stratify: true, split otherwise, or drop these rows"
                + ("" if names else "; for numbers that are no labels, use task: regression"),
            )
    occurring: list[int] = training_labels.tolist()
    return occurring


def _refuse_absent(absent: bool, task: Task, labels: tuple[str, ...] | np.ndarray) -> None:
    if absent:
        raise DataError(
            f"no row has a label of {task.positive}", where="task.positive", fix=f"labels here: {some(labels)}"
        )
