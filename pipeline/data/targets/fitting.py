"""Targets as the task needs them. The one place where a source's labels and numbers become what is learned."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.sources.arrays import Source
from pipeline.data.split.rows import Rows
from pipeline.data.statistics import mean_and_std
from pipeline.data.stored import VERSION, reading
from pipeline.data.targets.classes import numbered_classes, text_classes
from pipeline.data.targets.labels import WHERE, are_positive, refuse, some, whole_numbers
from pipeline.errors import DataError, JobError
from pipeline.job import Job


@dataclass(frozen=True)
class Targets:
    """How raw targets become what is learned: plain values, the same for training, evaluation and prediction.

    kind: multiclass, binary or regression.
    classes: their names, in the order of their numbers; empty for regression.
    text: whether the labels are names.
    positive: binary: the labels that count as 1; None where they are 0 and 1 already.
    mean, std: regression: (target - mean) / std is learned, one of each for each column; empty where targets are
        learned as they are.
    """

    kind: str
    classes: tuple[str, ...] = ()
    text: bool = False
    positive: tuple[int | str, ...] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def prepare(
        self,
        raw: np.ndarray,
        label_names: tuple[str, ...] = (),
        dtype: type[np.float32] | type[np.float64] = np.float32,
        *,
        rows: np.ndarray | None = None,
        where: str = WHERE,
    ) -> np.ndarray:
        """The targets of a part, or of new data, as the task learns them, rows as they are.

        multiclass: the numbers of classes, int64 (N,). binary: 1 where the label is in `positive`, else 0, in `dtype`
        (N,). regression: numbers in `dtype`, (N, T), scaled.

        Parameters
        ----------
        raw: int64 (N,), or floating (N,) or (N, T), as in `Arrays`.
        label_names: of this data, where its labels were found as text: `raw` holds positions in it.
        dtype: of binary and regression targets: the arithmetic's.
        rows: positions of the rows that will be used, int64 (n,); all by default. In others, a name that no training
            row had is no error, and its number is -1.
        where: what the targets are called in an error.

        Raises
        ------
        DataError: targets that do not fit the task, with the first offending value and how many there are.
        """
        if self.kind == "regression":
            _refuse_names(label_names, where)
            return self._scaled(raw, dtype, where)
        labels = whole_numbers(raw, self.kind, where)
        if self.text and not label_names:
            raise DataError(
                f"the labels are numbers, but the classes are {some(self.classes)}",
                where=where,
                fix="give labels as the names of classes",
            )
        if self.kind == "binary" and self.positive is not None:
            return are_positive(labels, label_names, self.positive).astype(dtype)
        if label_names:
            labels = self._by_name(labels, label_names, rows, where)
            return labels if self.kind == "multiclass" else labels.astype(dtype)
        if self.kind == "binary":
            refuse(
                labels,
                (labels != 0) & (labels != 1),
                "neither 0 nor 1",
                "say which labels count as 1, for example task: {kind: binary, positive: [1]}",
                where,
            )
            return labels.astype(dtype)
        refuse(labels, labels < 0, "a negative label", "number the classes from 0", where)
        count = len(self.classes)
        refuse(labels, labels >= count, f"beyond the {count} classes", f"use labels of 0 to {count - 1}", where)
        return labels

    def number_of(self, label: int | str) -> int:
        """The number of a class, given by its name or its number.

        Raises
        ------
        JobError: no such class.
        """
        if str(label) in self.classes:
            return self.classes.index(str(label))
        if str(label).isdecimal() and int(label) < len(self.classes):
            return int(label)
        near = difflib.get_close_matches(str(label), self.classes, n=1, cutoff=0.6)
        raise JobError(
            f"{label} is no class; there are {len(self.classes)}",
            where=f"task.class_weights.{label}",
            fix=f"did you mean {near[0]}?" if near else f"use {some(self.classes)}, or 0 to {len(self.classes) - 1}",
        )

    def _by_name(
        self, labels: np.ndarray, label_names: tuple[str, ...], rows: np.ndarray | None, where: str
    ) -> np.ndarray:
        known = {name: number for number, name in enumerate(self.classes)}
        by_position = np.array([known.get(name, -1) for name in label_names], dtype=np.int64)
        numbers: np.ndarray = by_position[labels]
        used = numbers if rows is None else numbers[rows]
        unknown = used < 0
        if unknown.any():
            place = int(np.argmax(unknown))
            row = place if rows is None else int(rows[place])
            raise DataError(
                f"{label_names[labels[row]]!r} at row {row} is no class that was trained "
                f"({int(unknown.sum()):,} of {len(used):,} rows)",
                where=where,
                fix=f"the classes are {some(self.classes)}",
            )
        return numbers

    def _scaled(self, raw: np.ndarray, dtype: type[np.float32] | type[np.float64], where: str) -> np.ndarray:
        columns = raw.reshape(len(raw), -1)
        if not self.mean:
            return np.ascontiguousarray(columns.astype(dtype, copy=False))
        if columns.shape[1] != len(self.mean):
            raise DataError(
                f"{columns.shape[1]} numbers a row, but {len(self.mean)} were learned", where=where, fix="give as many"
            )
        scaled = np.empty(columns.shape, dtype)
        np.subtract(columns, np.array(self.mean), out=scaled, casting="same_kind")
        np.divide(scaled, np.array(self.std), out=scaled, casting="same_kind")
        return scaled

    def named(self, numbers: np.ndarray) -> np.ndarray:
        """Classes (N,) by their numbers int64 (N,): their names; the numbers themselves where nothing names them."""
        has_names = self.classes != tuple(map(str, range(len(self.classes))))
        return np.array(self.classes)[numbers] if has_names or self.text else numbers

    def unscaled(self, learned: np.ndarray) -> np.ndarray:
        """Values as the model gives them, float64 (N, T), in the unit of the targets."""
        return learned * np.array(self.std) + np.array(self.mean) if self.mean else learned

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same object back."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "classes": list(self.classes),
            "text": self.text,
            "positive": None if self.positive is None else list(self.positive),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Targets:
        """What `to_json` gave.

        Raises
        ------
        DataError: written by another version, or damaged.
        """
        with reading(values):
            kind, positive = str(values["kind"]), values["positive"]
            if kind not in ("multiclass", "binary", "regression"):
                raise ValueError(f"kind {kind!r}")
            if positive is not None and not all(isinstance(label, int | str) for label in positive):
                raise ValueError(f"positive {positive!r}")
            mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
            return cls(
                kind,
                tuple(map(str, values["classes"])),
                bool(values["text"]),
                None if positive is None else tuple(positive),
                mean,
                std,
            )


def fit_targets(job: Job, source: Source, splits: Mapping[str, Rows]) -> Targets:
    """Fit the classes, or the scale of what is to be regressed, on the training split.

    Classes of labels that are text: the names that occur in training, sorted. Of labels that are numbers: those that
    the source declares, else 0 to the highest of the source.

    Raises
    ------
    DataError: targets that do not fit the task, in any split; only one class in training.
    """
    task, raw, train = job.task, source.train.targets, splits["train"].ids
    where = f"{job.data.url}: {', '.join(job.data.labels)}" if job.data.labels else WHERE
    if task.kind == "regression":
        _refuse_names(source.label_names, where)
        if not task.scale_targets:
            return Targets(task.kind)
        mean, std = mean_and_std(raw.reshape(len(raw), -1), train, per_channel=True)
        return Targets(task.kind, mean=tuple(mean.tolist()), std=tuple(np.where(std == 0, 1.0, std).tolist()))
    positive = None if task.positive is None else tuple(task.positive)
    text = bool(source.label_names)
    classes = text_classes(source, task, splits, where) if text else numbered_classes(source, task, where)
    fitted = Targets(task.kind, classes, text, positive)
    learned = fitted.prepare(raw, source.label_names, rows=train, where=where)[train]
    if (learned == learned[0]).all():
        raise DataError(
            f"all {len(train):,} training rows are of one class, {classes[int(learned[0])]!r}",
            where=where,
            fix="use data with at least two, or draw with data.splits.stratify: true",
        )
    return fitted


def class_counts(targets: np.ndarray, classes: int) -> list[int]:
    """Rows of each class among prepared targets (n,)."""
    counts: list[int] = np.bincount(targets.astype(np.int64), minlength=classes).tolist()
    return counts


def _refuse_names(label_names: tuple[str, ...], where: str) -> None:
    if label_names:
        raise DataError(
            f"regression needs numbers, but the labels are {some(label_names)}",
            where=where,
            fix="name a column of numbers, or use task: multiclass",
        )
