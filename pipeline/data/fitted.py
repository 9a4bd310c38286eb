"""All that is fitted on the training split, as one value: what every checkpoint stores beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.preprocess import (
    Preprocess,
    SamplePreprocess,
    TablePreprocess,
    fit_preprocess,
    number_places,
    preprocess_from_json,
)
from pipeline.data.rounding import too_coarse
from pipeline.data.sources.arrays import Source
from pipeline.data.split.rows import Rows
from pipeline.data.stored import VERSION, reading
from pipeline.data.tables.schema import Schema
from pipeline.data.targets.fitting import Targets, class_counts, fit_targets
from pipeline.errors import DataError
from pipeline.job import Job


@dataclass(frozen=True)
class Fitted:
    """How raw samples and raw targets become what a model takes and learns.

    preprocess: of the samples. labels: of the targets.
    class_counts: rows of each class in training; empty for a regression.
    means, spreads: the mean and standard deviation of each column of prepared targets in training; empty unless a
        regression, and without spreads where an earlier version fitted.
    """

    preprocess: Preprocess
    labels: Targets
    class_counts: tuple[int, ...] = ()
    means: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """Numbers that the model gives for a sample."""
        return {"multiclass": len(self.labels.classes), "binary": 1}.get(self.labels.kind, len(self.means))

    def to_json(self) -> dict[str, Any]:
        """Plain values, the content of `preprocess.json`; `from_json` gives the same object back."""
        return {
            "version": VERSION,
            "inputs": self.preprocess.to_json(),
            "targets": self.labels.to_json(),
            "class_counts": list(self.class_counts),
            "means": list(self.means),
            "spreads": list(self.spreads),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fitted:
        """What `to_json` gave.

        Raises
        ------
        DataError: written by another version, or damaged.
        """
        with reading(values):
            return cls(
                preprocess_from_json(values["inputs"]),
                Targets.from_json(values["targets"]),
                tuple(int(count) for count in values["class_counts"]),
                tuple(float(mean) for mean in values["means"]),
                tuple(float(spread) for spread in values.get("spreads", ())),
            )


def check_layout(fitted: Fitted, source: Source) -> None:
    """Whether other data can stand in for what was fitted on.

    Raises
    ------
    DataError: other columns, or samples of another shape or type.
    """
    if isinstance(fitted.preprocess, TablePreprocess):
        expected = {column.name: (column.kind, column.width) for column in fitted.preprocess.schema.columns}
        actual = {column.name: (column.kind, column.width) for column in (source.schema or Schema(())).columns}
        differ = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
        if differ:
            differences = [f"{name!r} {_layout(actual.get(name))}, in training {_layout(expected.get(name))}" for name in differ]
            raise DataError(
                f"columns are not as they were in training: {'; '.join(differences[:5])}",
                where="--data",
                fix=f"the model takes {', '.join(expected)}",
            )
    else:
        inputs, preprocess = source.train.inputs, fitted.preprocess
        if tuple(inputs.shape[1:]) != preprocess.sample_shape or inputs.dtype.name != preprocess.dtype:
            raise DataError(
                f"samples are {inputs.dtype} of shape {tuple(inputs.shape[1:])}, but the model was trained on "
                f"{preprocess.dtype} of shape {preprocess.sample_shape}",
                where="--data",
                fix="give data of the same shape",
            )


def _layout(column: tuple[str, int] | None) -> str:
    if column is None:
        return "is not there"
    kind, width = column
    return "holds text or levels" if kind == "category" else f"holds {width} numbers" if width > 1 else "holds numbers"


def coarse_columns(job: Job, source: Source, fitted: Fitted) -> list[str]:
    """Columns of the source's inputs that lost digits which matter beside the spread of their training rows.

    None where inputs are learned from as they are: the arithmetic holds no more digits than it does.
    """
    preprocess, rounding = fitted.preprocess, source.rounding
    if rounding is None or job.data.normalize == "none":
        return []
    if isinstance(preprocess, SamplePreprocess):
        coarse = too_coarse(rounding, np.array(preprocess.std)) if preprocess.kind == "scaled" else np.array([])
        return [f"number {place}" for place in np.flatnonzero(coarse)]
    coarse = too_coarse(rounding[number_places(preprocess.schema)], np.array(preprocess.std))
    names = [
        column.name for column in preprocess.schema.columns if column.kind == "number" for _ in range(column.width)
    ]
    return list(dict.fromkeys(name for name, is_coarse in zip(names, coarse, strict=True) if is_coarse))


def fit(job: Job, source: Source, splits: Mapping[str, Rows]) -> Fitted:
    """Fit what the job asks for on the training split; no other row changes the result.

    Raises
    ------
    DataError: samples or targets that do not fit the job.
    """
    indices = splits["train"].ids
    labels = fit_targets(job, source, splits)
    preprocess = fit_preprocess(job, source, indices)
    prepared_targets = labels.prepare(source.train.targets, source.label_names, np.float64, rows=indices)[indices]
    if labels.kind == "regression":
        means, spreads = (values.tolist() for values in (prepared_targets.mean(0), prepared_targets.std(0)))
        return Fitted(preprocess, labels, means=tuple(means), spreads=tuple(spreads))
    return Fitted(preprocess, labels, class_counts=tuple(class_counts(prepared_targets, len(labels.classes))))
