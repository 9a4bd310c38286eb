"""Which classes there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pipeline.data.sources.arrays import Dataset
from pipeline.data.split.rows import SplitIndices
from pipeline.data.targets.labels import positive_mask, sample_repr, to_integer_labels
from pipeline.errors import DataError
from pipeline.job import TaskConfig

FEW_CLASSES = 100
"""More classes than this, and than half of the training rows, are taken for numbers or keys that are no labels."""

MERGED_CLASS_NAMES = ("negative", "positive")
"""Names of the two classes of a binary task where one of them stands for several labels."""


class FittedClasses(NamedTuple):
    """names: of each class. values: the label that means it, where labels are numbers; empty where they are text, or
    where a class stands for several labels."""

    names: tuple[str, ...]
    label_values: tuple[int, ...] = ()


def classes_from_text(
    dataset: Dataset, task: TaskConfig, splits: Mapping[str, SplitIndices], where: str
) -> FittedClasses:
    """The classes where labels are text: those that occur in training, sorted.

    Raises
    ------
    DataError: a label in another split that no training row has; or it is not said which count as positive.
    """
    names, labels = dataset.label_names, dataset.train.targets
    if task.kind == "binary":
        if task.positive is None:
            raise DataError(
                f"the labels are {sample_repr(names)}: which of them count as 1?",
                where="task.positive",
                fix=f"write task: {{kind: binary, positive: [{names[-1]}]}}",
            )
        positive_names = {str(label) for label in task.positive}
        _raise_if_absent(positive_names.isdisjoint(names), task, names)
        is_occurring = np.bincount(labels[splits["train"].indices], minlength=len(names)) > 0
        occurring = [name for name, occurs in zip(names, is_occurring, strict=True) if occurs]
        pair = [
            [name for name in occurring if (name in positive_names) == is_positive] for is_positive in (False, True)
        ]
        return FittedClasses((pair[0][0], pair[1][0]) if len(pair[0]) == len(pair[1]) == 1 else MERGED_CLASS_NAMES)
    occurring_numbers = _training_labels(dataset, task, splits, where)
    return FittedClasses(tuple(names[number] for number in occurring_numbers))


def classes_from_numbers(
    dataset: Dataset, task: TaskConfig, splits: Mapping[str, SplitIndices], where: str
) -> FittedClasses:
    """The classes where labels are numbers: those that the source declares, else the numbers that occur in training,
    ascending. Of two, the later one is the positive, unless `task.positive` says otherwise.

    Raises
    ------
    DataError: labels beyond the classes that the source names; a label in another split that no training row has; far
        too many of them; more than two for a binary task; no row of `task.positive`.
    """
    if task.kind == "binary" and task.positive is not None:
        return _binary_classes(dataset, task, task.positive, splits, where)
    if dataset.classes and (task.kind == "multiclass" or len(dataset.classes) == 2):
        highest = max(
            int(to_integer_labels(part.targets, task.kind, where).max())
            for part in (dataset.train, dataset.test)
            if part is not None
        )
        if highest >= len(dataset.classes):
            raise DataError(
                f"the label {highest}, but only {len(dataset.classes)} classes are named",
                where=where,
                fix="name them all, or number the classes from 0",
            )
        return FittedClasses(dataset.classes, tuple(range(len(dataset.classes))))
    values = _training_labels(dataset, task, splits, where)
    return FittedClasses(tuple(map(str, values)), tuple(values))


def _binary_classes(
    dataset: Dataset, task: TaskConfig, positive: list[int | bool | str], splits: Mapping[str, SplitIndices], where: str
) -> FittedClasses:
    """Classes of which one is `positive`: they keep the labels' names where each is a single label."""
    labels = to_integer_labels(dataset.train.targets, task.kind, where)
    chosen = positive_mask(labels, (), positive)
    _raise_if_absent(not chosen.any(), task, np.unique(labels))
    rows = splits["train"].indices
    pair = [np.unique(labels[rows[chosen[rows] == is_positive]]).tolist() for is_positive in (False, True)]
    if len(pair[0]) != 1 or len(pair[1]) != 1:
        return FittedClasses(MERGED_CLASS_NAMES)
    values = (pair[0][0], pair[1][0])
    declared = dataset.classes
    names = [declared[value] if 0 <= value < len(declared) else str(value) for value in values]
    return FittedClasses((names[0], names[1]), values)


def _training_labels(dataset: Dataset, task: TaskConfig, splits: Mapping[str, SplitIndices], where: str) -> list[int]:
    """The labels of the training rows, ascending: numbers, or positions in `Source.label_names`.

    Raises
    ------
    DataError: other labels in other splits; too many of them for what the task is.
    """
    names, rows = dataset.label_names, len(splits["train"])
    parts = {
        name: to_integer_labels(dataset.part(split.part).targets, task.kind, where)[split.indices]
        for name, split in splits.items()
    }
    training_labels = np.unique(parts["train"])

    def named(label: int) -> str:
        return repr(names[label]) if names else str(label)

    if task.kind == "binary" and len(training_labels) > 2:
        raise DataError(
            f"{len(training_labels):,} different labels ({sample_repr(training_labels)}), but binary learns two",
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


def _raise_if_absent(absent: bool, task: TaskConfig, labels: tuple[str, ...] | np.ndarray) -> None:
    if absent:
        raise DataError(
            f"no row has a label of {task.positive}", where="task.positive", fix=f"labels here: {sample_repr(labels)}"
        )
