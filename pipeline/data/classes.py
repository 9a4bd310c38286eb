"""Which classes a task of classes has, and their names: those that occur in the training split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.config import TaskConfig
from pipeline.data.dataset import Dataset, SplitIndices
from pipeline.data.labels import positive_mask, sample_repr, to_integer_labels
from pipeline.errors import DataError

FEW_CLASSES = 100
"""If there are more classes than this, and than half of the training rows, the values are probably numbers or keys, not
labels."""

MERGED_CLASS_NAMES = ("negative", "positive")
"""Names of the two classes of a binary task if one of them stands for several labels."""


class FittedClasses(NamedTuple):
    """names: of the classes. label_values: the label of each class, if labels are numbers; empty if they are text or a
    class stands for several labels."""

    names: tuple[str, ...]
    label_values: tuple[int, ...] = ()


def classes_from_text(
    dataset: Dataset, task: TaskConfig, splits: Mapping[str, SplitIndices], where: str
) -> FittedClasses:
    """Return the classes of text labels: those that occur in training, sorted. Of two, the second is the positive
    class, unless `task.positive` is given.

    Raises
    ------
    DataError: another split has a label that no training row has; there are far too many labels, or more than two for a
        binary task; no row is in `task.positive`.
    """
    names, labels = dataset.label_names, dataset.train.targets
    if task.positive is not None:
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
    """Return the classes of numeric labels: those that the source declares, else the numbers that occur in training,
    ascending. Of two, the second is the positive class, unless `task.positive` is given.

    Raises
    ------
    DataError: a label exceeds the classes that the source declares; another split has a label that no training row has;
        there are far too many labels, or more than two for a binary task; no row is in `task.positive`.
    """
    if task.kind == "binary" and task.positive is not None:
        return _binary_classes(dataset, task, task.positive, splits, where)
    if dataset.classes and (task.kind == "multiclass" or len(dataset.classes) == 2):
        max_label = max(
            int(to_integer_labels(part.targets, task.kind, where).max())
            for part in (dataset.train, dataset.test)
            if part is not None
        )
        if max_label >= len(dataset.classes):
            raise DataError(
                f"the label {max_label}, but only {len(dataset.classes)} classes are named",
                where=where,
                fix="name them all, or number the classes from 0",
            )
        return FittedClasses(dataset.classes, tuple(range(len(dataset.classes))))
    values = _training_labels(dataset, task, splits, where)
    return FittedClasses(name_labels(values, dataset.has_boolean_labels), tuple(values))


def _binary_classes(
    dataset: Dataset, task: TaskConfig, positive: list[int | bool | str], splits: Mapping[str, SplitIndices], where: str
) -> FittedClasses:
    """Return the two classes of which one is `positive`; they keep the labels' names if each is a single label."""
    labels = to_integer_labels(dataset.train.targets, task.kind, where)
    mask = positive_mask(labels, (), positive)
    _raise_if_absent(not mask.any(), task, np.unique(labels))
    indices = splits["train"].indices
    pair = [np.unique(labels[indices[mask[indices] == is_positive]]).tolist() for is_positive in (False, True)]
    if len(pair[0]) != 1 or len(pair[1]) != 1:
        return FittedClasses(MERGED_CLASS_NAMES)
    values = (pair[0][0], pair[1][0])
    declared, plain = dataset.classes, name_labels(values, dataset.has_boolean_labels)
    names = [declared[value] if 0 <= value < len(declared) else name for value, name in zip(values, plain, strict=True)]
    return FittedClasses((names[0], names[1]), values)


def _training_labels(dataset: Dataset, task: TaskConfig, splits: Mapping[str, SplitIndices], where: str) -> list[int]:
    """Return the labels of the training rows, ascending: numbers, or positions in `Dataset.label_names`.

    Raises
    ------
    DataError: another split has other labels, or there are too many for the task.
    """
    names, num_rows = dataset.label_names, len(splits["train"])
    labels_by_split = {
        name: to_integer_labels(dataset.part(split.part).targets, task.kind, where)[split.indices]
        for name, split in splits.items()
    }
    training_labels = np.unique(labels_by_split["train"])

    def label_text(label: int) -> str:
        return repr(names[label]) if names else str(label)

    if task.kind == "binary" and len(training_labels) > 2:
        shown = [names[label] for label in training_labels] if names else training_labels
        example = json.dumps(shown[-1], ensure_ascii=False) if names else shown[-1]
        raise DataError(
            f"{len(training_labels):,} different labels ({sample_repr(shown)}), but binary needs two",
            where=where,
            fix=f"list which of them count as 1, for example task: {{kind: binary, positive: [{example}]}};"
            " or use task: multiclass",
        )
    if len(training_labels) > max(FEW_CLASSES, num_rows // 2):
        raise DataError(
            f"{len(training_labels):,} different labels in {num_rows:,} training rows, such as "
            f"{label_text(training_labels[-1])}: too many to be classes",
            where=where,
            fix="name a column of classes in data.label" + ("" if names else "; for numbers, use task: regression"),
        )
    for name, labels in labels_by_split.items():
        unknown = labels[~np.isin(labels, training_labels)]
        if len(unknown):
            raise DataError(
                f"the label {label_text(unknown[0])} occurs in {name}, but in no training row ({len(unknown):,} of "
                f"{len(labels):,} rows of {name} have such labels)",
                where=where,
                fix="draw with data.splits.stratify: true, split differently, or drop these rows"
                + ("" if names else "; for numbers that are not labels, use task: regression"),
            )
    occurring: list[int] = training_labels.tolist()
    return occurring


def _raise_if_absent(absent: bool, task: TaskConfig, labels: tuple[str, ...] | np.ndarray) -> None:
    if absent:
        raise DataError(
            f"no row has a label of {task.positive}", where="task.positive", fix=f"labels here: {sample_repr(labels)}"
        )


def name_labels(values: Sequence[int], is_boolean: bool) -> tuple[str, ...]:
    """Return the names of labels that are numbers or booleans."""
    return tuple(str(bool(value)).lower() if is_boolean else str(value) for value in values)
