"""All that is fitted on the training split, as one value: what every checkpoint stores beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import JobConfig
from pipeline.data.dataset import Dataset, SplitIndices
from pipeline.data.rounding import is_too_coarse
from pipeline.data.serialization import VERSION, check_stored_values
from pipeline.data.tabular.schema import Schema
from pipeline.data.targets import TargetTransform, count_classes, fit_target_transform
from pipeline.data.transforms import (
    ArrayTransform,
    InputTransform,
    TabularTransform,
    fit_input_transform,
    input_transform_from_json,
    numeric_columns_of,
)
from pipeline.errors import DataError


@dataclass(frozen=True)
class FittedTransforms:
    """How raw samples and raw targets become what a model takes and learns.

    preprocess: of the samples. labels: of the targets.
    class_counts: rows of each class in training; empty for a regression.
    means, spreads: the mean and standard deviation of each column of prepared targets in training; empty unless a
        regression, and without spreads where an earlier version fitted.
    """

    input_transform: InputTransform
    target_transform: TargetTransform
    class_counts: tuple[int, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()

    @property
    def num_outputs(self) -> int:
        """Numbers that the model gives for a sample."""
        return {"multiclass": len(self.target_transform.classes), "binary": 1}.get(
            self.target_transform.kind, len(self.target_mean)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, the content of `preprocess.json`; `from_json` gives the same object back."""
        return {
            "version": VERSION,
            "inputs": self.input_transform.to_json(),
            "targets": self.target_transform.to_json(),
            "class_counts": list(self.class_counts),
            "means": list(self.target_mean),
            "spreads": list(self.target_std),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FittedTransforms:
        """What `to_json` gave.

        Raises
        ------
        DataError: written by another version, or damaged.
        """
        with check_stored_values(values):
            return cls(
                input_transform_from_json(values["inputs"]),
                TargetTransform.from_json(values["targets"]),
                tuple(int(count) for count in values["class_counts"]),
                tuple(float(mean) for mean in values["means"]),
                tuple(float(spread) for spread in values.get("spreads", ())),
            )


def check_layout(fitted: FittedTransforms, dataset: Dataset) -> None:
    """Whether other data can stand in for what was fitted on.

    Raises
    ------
    DataError: other columns, or samples of another shape or type.
    """
    if isinstance(fitted.input_transform, TabularTransform):
        expected = {column.name: (column.kind, column.width) for column in fitted.input_transform.schema.columns}
        actual = {column.name: (column.kind, column.width) for column in (dataset.schema or Schema(())).columns}
        differ = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
        if differ:
            differences = [
                f"{name!r} {_describe_column(actual.get(name))}, in training {_describe_column(expected.get(name))}"
                for name in differ
            ]
            raise DataError(
                f"columns are not as they were in training: {'; '.join(differences[:5])}",
                where="--data",
                fix=f"the model takes {', '.join(expected)}",
            )
    else:
        inputs, preprocess = dataset.train.inputs, fitted.input_transform
        if tuple(inputs.shape[1:]) != preprocess.sample_shape or inputs.dtype.name != preprocess.dtype:
            raise DataError(
                f"samples are {inputs.dtype} of shape {tuple(inputs.shape[1:])}, but the model was trained on "
                f"{preprocess.dtype} of shape {preprocess.sample_shape}",
                where="--data",
                fix="give data of the same shape",
            )


def _describe_column(column: tuple[str, int] | None) -> str:
    if column is None:
        return "is not there"
    kind, width = column
    return "holds text or levels" if kind == "category" else f"holds {width} numbers" if width > 1 else "holds numbers"


def find_rounded_columns(job: JobConfig, dataset: Dataset, fitted: FittedTransforms) -> list[str]:
    """Columns of the source's inputs that lost digits which matter beside the spread of their training rows.

    None where inputs are learned from as they are: the arithmetic holds no more digits than it does.
    """
    preprocess, rounding = fitted.input_transform, dataset.rounding_errors
    if rounding is None or job.data.normalize == "none":
        return []
    if isinstance(preprocess, ArrayTransform):
        coarse = is_too_coarse(rounding, np.array(preprocess.std)) if preprocess.kind == "scaled" else np.array([])
        return [f"number {place}" for place in np.flatnonzero(coarse)]
    coarse = is_too_coarse(rounding[numeric_columns_of(preprocess.schema)], np.array(preprocess.std))
    names = [
        column.name for column in preprocess.schema.columns if column.kind == "number" for _ in range(column.width)
    ]
    return list(dict.fromkeys(name for name, is_coarse in zip(names, coarse, strict=True) if is_coarse))


def fit_transforms(job: JobConfig, dataset: Dataset, splits: Mapping[str, SplitIndices]) -> FittedTransforms:
    """Fit what the job asks for on the training split; no other row changes the result.

    Raises
    ------
    DataError: samples or targets that do not fit the job.
    """
    indices = splits["train"].indices
    labels = fit_target_transform(job, dataset, splits)
    preprocess = fit_input_transform(job, dataset, indices)
    prepared_targets = labels.transform(dataset.train.targets, dataset.label_names, np.float64, indices=indices)[
        indices
    ]
    if labels.kind == "regression":
        means, spreads = (values.tolist() for values in (prepared_targets.mean(0), prepared_targets.std(0)))
        return FittedTransforms(preprocess, labels, target_mean=tuple(means), target_std=tuple(spreads))
    return FittedTransforms(
        preprocess, labels, class_counts=tuple(count_classes(prepared_targets, len(labels.classes)))
    )
