"""Targets of a multilabel task: several label columns, each with two values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pipeline.config import JobConfig, TaskConfig
from pipeline.data.dataset import Dataset, DatasetPart, SplitIndices
from pipeline.data.labels import sample_repr, to_integer_labels
from pipeline.data.targets import TargetTransform, describe_label_location, fit_classes
from pipeline.errors import DataError


def fit_multilabel_transform(job: JobConfig, dataset: Dataset, splits: Mapping[str, SplitIndices]) -> TargetTransform:
    """Fit the two values of each label on the training split: the later one in sorted order counts as positive.

    Raises
    ------
    DataError: there is one label per row, or a label has not two values in training, or others in another split.
    """
    targets = dataset.train.targets
    if targets.ndim != 2 or targets.shape[1] < 2:
        raise DataError(
            f"multilabel needs several labels per row, but targets have the shape {targets.shape}",
            where=describe_label_location(job, job.data.labels),
            fix="use several columns in data.label, or return targets (N, L) of floating-point 0 and 1",
        )
    names = tuple(job.data.labels) or tuple(map(str, range(targets.shape[1])))
    task = TaskConfig(kind="binary")
    parts = []
    for column, name in enumerate(names):
        part = _select_column(dataset, column)
        where = describe_label_location(job, [name])
        values = np.unique(to_integer_labels(part.train.targets, "multilabel", where)[splits["train"].indices])
        if len(values) != 2:
            shown = [part.label_names[value] for value in values] if part.label_names else values
            raise DataError(
                f"the label {name!r} has {len(values):,} values in {len(splits['train']):,} training rows "
                f"({sample_repr(shown)}), but each label of multilabel needs two",
                where=where,
                fix="leave it out of data.label, or make it 0 and 1",
            )
        parts.append(fit_classes(task, part, splits, where))
    return TargetTransform("multilabel", names, labels=tuple(parts))


def _select_column(dataset: Dataset, column: int) -> Dataset:
    """Return the dataset with one of its label columns."""

    def select(part: DatasetPart) -> DatasetPart:
        return DatasetPart(part.inputs, part.targets[:, column])

    names, booleans = dataset.column_label_names, dataset.boolean_label_columns
    return replace(
        dataset,
        train=select(dataset.train),
        test=None if dataset.test is None else select(dataset.test),
        label_names=names[column] if names else (),
        has_boolean_labels=column in booleans,
        reopen_in_float64=None,
    )
