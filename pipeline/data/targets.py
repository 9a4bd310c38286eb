"""Targets: how a dataset's labels and numbers become what the model is trained on.

`fit_target_transform` fits a `TargetTransform` on the training split. `pipeline.data.classes` decides which classes
there are.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import FileDataConfig, JobConfig, TaskConfig
from pipeline.data.classes import classes_from_numbers, classes_from_text, name_labels
from pipeline.data.dataset import Dataset, SplitIndices
from pipeline.data.labels import WHERE, positive_mask, sample_repr, to_integer_labels
from pipeline.data.serialization import VERSION, check_stored_values
from pipeline.data.statistics import compute_mean_and_std, iter_blocks
from pipeline.errors import DataError, JobError


@dataclass(frozen=True)
class TargetTransform:
    """How raw targets become training targets: plain values, the same for training, evaluation and prediction.

    kind: multiclass, binary, multilabel or regression.
    classes: names of the classes, in the order of their indices; of a multilabel task, of the labels; empty for
        regression.
    is_text: whether the labels are text.
    positive: binary: the labels that count as 1; None if they are 0 and 1 already.
    mean, std: regression: the training targets are (target - mean) / std, with one of each per column; empty if targets
        are not scaled.
    label_values: the label of each class, if labels are numbers; empty if they are text, or if a class stands for
        several labels.
    is_boolean: whether these labels, 0 and 1, are booleans in the data.
    quantiles: regression: what the outputs are; empty if they are means, one per column.
    labels: multilabel: for each label, a transform of kind binary.
    """

    kind: str
    classes: tuple[str, ...] = ()
    is_text: bool = False
    positive: tuple[int | str, ...] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    label_values: tuple[int, ...] = ()
    is_boolean: bool = False
    quantiles: tuple[float, ...] = ()
    labels: tuple[TargetTransform, ...] = ()

    def transform(
        self,
        raw: np.ndarray,
        label_names: tuple[str, ...] = (),
        dtype: type[np.float32] | type[np.float64] = np.float32,
        *,
        indices: np.ndarray | None = None,
        where: str = WHERE,
        column_label_names: tuple[tuple[str, ...], ...] = (),
    ) -> np.ndarray:
        """Return the targets of a dataset part, or of new data, as the task needs them; all N rows, in order.

        multiclass: class indices, int64 (N,). binary: 1 if the label is in `positive`, else 0, in `dtype` (N,).
        multilabel: 0 and 1 in `dtype`, (N, L). regression: scaled numbers in `dtype`, (N, T).

        Parameters
        ----------
        raw: int64 (N,) or (N, L), or floating (N,) or (N, T), as in `DatasetPart`.
        label_names: of this data, if its labels are text: `raw` holds positions in it.
        dtype: of binary and regression targets.
        indices: of the rows that will be used, int64 (n,); all by default. In other rows, a label that no training row
            has is not an error; its class index is -1.
        where: the location that an error reports.
        column_label_names: `label_names` of each label of a multilabel task; empty if all are numbers.

        Raises
        ------
        DataError: targets do not fit the task; names the first wrong value and the number of them.
        """
        if self.kind == "regression":
            _raise_if_named(label_names, where)
            return self._scale(raw, dtype, where)
        if self.kind == "multilabel":
            return self._transform_labels(raw, column_label_names, dtype, indices, where)
        labels = to_integer_labels(raw, self.kind, where)
        if self.is_text and not label_names:
            raise DataError(
                f"the labels are numbers, but the classes are {sample_repr(self.classes)}",
                where=where,
                fix="use the names of classes as labels",
            )
        if self.kind == "binary" and self.positive is not None:
            return positive_mask(labels, label_names, self.positive).astype(dtype)
        class_indices = self._indices_by_name(labels, label_names) if label_names else self._indices_by_value(labels)
        used = class_indices if indices is None else class_indices[indices]
        unknown = used < 0
        if unknown.any():
            position = int(np.argmax(unknown))
            row = position if indices is None else int(indices[position])
            label = repr(label_names[labels[row]]) if label_names else labels[row]
            raise DataError(
                f"{label} at row {row} is not a class of the training data "
                f"({int(unknown.sum()):,} of {len(used):,} rows)",
                where=where,
                fix=f"the classes are {sample_repr(self._raw_labels())}",
            )
        return class_indices if self.kind == "multiclass" else class_indices.astype(dtype)

    def label_index(self, label: int | str) -> int:
        """Return the index of a class, given its name or its label.

        Raises
        ------
        JobError: there is no such class.
        """
        if str(label) in self.classes:
            return self.classes.index(str(label))
        if label in self.label_values:
            return self.label_values.index(int(label))
        near = difflib.get_close_matches(str(label), self.classes, n=1, cutoff=0.6)
        raise JobError(
            f"{label} is not one of the {len(self.classes)} classes",
            where=f"task.class_weights.{label}",
            fix=f"did you mean {near[0]}?" if near else f"use {sample_repr(self.classes)}",
        )

    def _transform_labels(
        self,
        raw: np.ndarray,
        column_label_names: tuple[tuple[str, ...], ...],
        dtype: type[np.float32] | type[np.float64],
        indices: np.ndarray | None,
        where: str,
    ) -> np.ndarray:
        if raw.ndim != 2 or raw.shape[1] != len(self.labels):
            raise DataError(
                f"targets have the shape {raw.shape}, but the task has {len(self.labels)} labels",
                where=where,
                fix=f"give a column for each: {', '.join(self.classes)}",
            )
        result = np.empty(raw.shape, dtype)
        for column, (name, label) in enumerate(zip(self.classes, self.labels, strict=True)):
            names = column_label_names[column] if column_label_names else ()
            result[:, column] = label.transform(
                raw[:, column], names, dtype, indices=indices, where=f"{where.rpartition(': ')[0] or where}: {name}"
            )
        return result

    def _indices_by_name(self, labels: np.ndarray, label_names: tuple[str, ...]) -> np.ndarray:
        index_of_name = {name: index for index, name in enumerate(self.classes)}
        index_of_label = np.array([index_of_name.get(name, -1) for name in label_names], dtype=np.int64)
        class_indices: np.ndarray = index_of_label[labels]
        return class_indices

    def _indices_by_value(self, labels: np.ndarray) -> np.ndarray:
        values = np.array(self.label_values, dtype=np.int64)
        order = np.argsort(values)
        positions = np.minimum(np.searchsorted(values, labels, sorter=order), len(values) - 1)
        class_indices: np.ndarray = order[positions]
        known: np.ndarray = values[class_indices] == labels
        class_indices[~known] = -1
        return class_indices

    def _raw_labels(self) -> tuple[str, ...] | tuple[int, ...]:
        """Return the label of each class in the data."""
        return self.label_values or self.classes

    def _scale(self, raw: np.ndarray, dtype: type[np.float32] | type[np.float64], where: str) -> np.ndarray:
        columns = raw.reshape(len(raw), -1)
        if not self.mean:
            return np.ascontiguousarray(columns.astype(dtype, copy=False))
        if columns.shape[1] != len(self.mean):
            raise DataError(
                f"{columns.shape[1]} numbers per row, but the model was trained on {len(self.mean)}",
                where=where,
                fix=f"use {len(self.mean)} columns",
            )
        scaled = np.empty(columns.shape, dtype)
        np.subtract(columns, np.array(self.mean), out=scaled, casting="same_kind")
        np.divide(scaled, np.array(self.std), out=scaled, casting="same_kind")
        return scaled

    def decode_labels(self, class_indices: np.ndarray) -> np.ndarray:
        """Return the labels of classes (N,), given their indices int64 (N,): text, or int64 or bool where these are
        the labels and the classes have no other names."""
        labels = np.array(self.classes)
        if self.classes == name_labels(self.label_values, self.is_boolean):
            labels = np.array(self.label_values, dtype=np.bool_ if self.is_boolean else np.int64)
        decoded: np.ndarray = labels[class_indices]
        return decoded

    def decode_label_columns(self, class_indices: np.ndarray) -> list[np.ndarray]:
        """Return the values of each label of a multilabel task, (N,), given 0 and 1 as int64 (N, L)."""
        return [label.decode_labels(column) for label, column in zip(self.labels, class_indices.T, strict=True)]

    def inverse_scale(self, scaled: np.ndarray) -> np.ndarray:
        """Convert the model's outputs, float64 (N, T), to the unit of the targets. Quantiles, (N, Q), are sorted."""
        if self.quantiles:
            scaled = np.sort(scaled, 1)
        return scaled * np.array(self.std) + np.array(self.mean) if self.mean else scaled

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` restores the same object from them."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "classes": list(self.classes),
            "text": self.is_text,
            "values": list(self.label_values),
            "boolean": self.is_boolean,
            "quantiles": list(self.quantiles),
            **({"labels": [label.to_json() for label in self.labels]} if self.labels else {}),
            "positive": None if self.positive is None else list(self.positive),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TargetTransform:
        """Restore an object from the values that `to_json` returned.

        Raises
        ------
        DataError: the values were written by another version, or are damaged.
        """
        with check_stored_values(values):
            kind, positive = str(values["kind"]), values["positive"]
            if kind not in ("multiclass", "binary", "multilabel", "regression"):
                raise ValueError(f"kind {kind!r}")
            if positive is not None and not all(isinstance(label, int | str) for label in positive):
                raise ValueError(f"positive {positive!r}")
            mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
            classes, text = tuple(map(str, values["classes"])), bool(values["text"])
            if values["version"] == VERSION:
                labels = tuple(int(label) for label in values["values"])
            else:  # labels were the indices of their classes
                labels = () if text or positive is not None else tuple(range(len(classes)))
            if labels and (text or len(set(labels)) != len(classes)):
                raise ValueError(f"{len(labels)} labels for {len(classes)} classes")
            boolean = bool(values.get("boolean", False))
            quantiles = tuple(float(quantile) for quantile in values.get("quantiles", ()))
            positive = None if positive is None else tuple(positive)
            parts = tuple(map(cls.from_json, values.get("labels", ())))
            if len(parts) != (len(classes) if kind == "multilabel" else 0):
                raise ValueError(f"{len(parts)} labels for {len(classes)} names")
            return cls(kind, classes, text, positive, mean, std, labels, boolean, quantiles, parts)


def describe_label_location(job: JobConfig, labels: Sequence[str]) -> str:
    """Return the location of labels that an error reports."""
    return f"{job.data.url}: {', '.join(labels)}" if isinstance(job.data, FileDataConfig) and labels else WHERE


def fit_target_transform(job: JobConfig, dataset: Dataset, splits: Mapping[str, SplitIndices]) -> TargetTransform:
    """Fit the classes of a multiclass or binary task, or the scale of a regression's targets, on the training split.

    Classes of text labels: the names that occur in training, sorted. Classes of numeric labels: those that the source
    declares, else the numbers that occur in training, ascending.

    Raises
    ------
    DataError: targets of any split do not fit the task; or training has only one class, or one value.
    """
    task, raw, train_indices = job.task, dataset.train.targets, splits["train"].indices
    where = describe_label_location(job, job.data.labels)
    if task.kind == "regression":
        _raise_if_named(dataset.label_names, where)
        _raise_if_constant(job, raw.reshape(len(raw), -1), train_indices, where)
        quantiles = tuple(task.quantiles or ())
        if quantiles and raw.size > len(raw):
            raise DataError(
                f"quantiles takes one number per row, but targets have the shape {raw.shape}",
                where=where,
                fix="leave task.quantiles out, or predict one column",
            )
        if not task.scale_targets:
            return TargetTransform(task.kind, quantiles=quantiles)
        mean, std = compute_mean_and_std(raw.reshape(len(raw), -1), train_indices, per_channel=True)
        std = np.where(std == 0, 1.0, std)
        return TargetTransform(task.kind, mean=tuple(mean.tolist()), std=tuple(std.tolist()), quantiles=quantiles)
    return fit_classes(task, dataset, splits, where)


def fit_classes(task: TaskConfig, dataset: Dataset, splits: Mapping[str, SplitIndices], where: str) -> TargetTransform:
    """Fit the classes of a multiclass or binary task.

    Raises
    ------
    DataError: as `fit_target_transform`.
    """
    raw, train_indices = dataset.train.targets, splits["train"].indices
    positive = None if task.positive is None else tuple(task.positive)
    text = bool(dataset.label_names)
    classes, values = (classes_from_text if text else classes_from_numbers)(dataset, task, splits, where)
    is_boolean = dataset.has_boolean_labels and bool(values)
    fitted = TargetTransform(task.kind, classes, text, positive, label_values=values, is_boolean=is_boolean)
    transformed = fitted.transform(raw, dataset.label_names, indices=train_indices, where=where)[train_indices]
    if (transformed == transformed[0]).all():
        raise DataError(
            f"all {len(train_indices):,} training rows are of one class, {classes[int(transformed[0])]!r}",
            where=where,
            fix="use data with at least two, or draw with data.splits.stratify: true",
        )
    return fitted


def label_warnings(labels: TargetTransform) -> list[str]:
    """Return warnings about choices that were made because the job does not make them."""
    if labels.kind == "multilabel":
        pairs = {
            name: label.classes
            for name, label in zip(labels.classes, labels.labels, strict=True)
            if label.label_values != (0, 1)
        }
        return [
            f"of the labels {negative} and {positive} of {name!r}, {positive} counts as positive"
            for name, (negative, positive) in pairs.items()
        ]
    is_zero_and_one = labels.label_values == (0, 1) and not labels.is_boolean
    if labels.kind != "binary" or labels.positive is not None or is_zero_and_one:
        return []
    negative, positive = labels.classes
    return [
        f"of the labels {negative} and {positive}, {positive} counts as positive; for the opposite, use task: "
        f"{{kind: binary, positive: [{json.dumps(negative, ensure_ascii=False) if labels.is_text else negative}]}}"
    ]


def count_classes(targets: np.ndarray, num_classes: int) -> list[int]:
    """Count the rows of each class in transformed targets (n,)."""
    counts: list[int] = np.bincount(targets.astype(np.int64), minlength=num_classes).tolist()
    return counts


def _raise_if_constant(job: JobConfig, raw: np.ndarray, train_indices: np.ndarray, where: str) -> None:
    """Raise DataError if a column of targets (N, T) has one value in all training rows."""
    varies = np.zeros(raw.shape[1], bool)
    for block in iter_blocks(raw, train_indices):
        varies |= (block != raw[train_indices[0]]).any(0)
    for column in np.flatnonzero(~varies)[:1]:
        names = [repr(name) for name in job.data.labels] or [
            f"column {number} (from 0)" for number in range(len(varies))
        ]
        raise DataError(
            f"the target {f'{names[column]} ' if len(varies) > 1 else ''}is {raw[train_indices[0], column]:g} in all "
            f"{len(train_indices):,} training rows: there is nothing to learn",
            where=where,
            fix="use data in which it varies" + (", or leave it out of data.label" if len(varies) > 1 else ""),
        )


def _raise_if_named(label_names: tuple[str, ...], where: str) -> None:
    if label_names:
        raise DataError(
            f"regression needs numbers, but the labels are {sample_repr(label_names)}",
            where=where,
            fix="name a column of numbers, or use task: multiclass",
        )
