"""Everything that is fitted on the training split, in one object, which every checkpoint stores beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import JobConfig
from pipeline.data.dataset import Dataset, SplitIndices
from pipeline.data.multilabel import fit_multilabel_transform
from pipeline.data.rounding import is_too_coarse
from pipeline.data.serialization import VERSION, check_stored_values
from pipeline.data.tabular.schema import Schema
from pipeline.data.tabular.times import CLOCK_WIDTH, DATE_WIDTH, TIMESTAMP_WIDTH
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
    """The transforms of inputs and targets, and statistics of the training targets.

    class_counts: rows of each class in training; empty for multilabel and regression.
    target_mean, target_std: of each column of transformed targets in training; empty unless one of these. An earlier
        version stored no standard deviations.
    left_out: names of the columns that `data.features: auto` left out, each with the reason.
    """

    input_transform: InputTransform
    target_transform: TargetTransform
    class_counts: tuple[int, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def num_outputs(self) -> int:
        """Number of the model's outputs per sample."""
        transform = self.target_transform
        num_values = len(transform.quantiles) or len(self.target_mean)
        num_classes = len(transform.classes)
        return {"multiclass": num_classes, "multilabel": num_classes, "binary": 1}.get(transform.kind, num_values)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the content of `preprocess.json`; `from_json` restores the same object from them."""
        return {
            "version": VERSION,
            "inputs": self.input_transform.to_json(),
            "targets": self.target_transform.to_json(),
            "class_counts": list(self.class_counts),
            "means": list(self.target_mean),
            "spreads": list(self.target_std),
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FittedTransforms:
        """Restore an object from the values that `to_json` returned.

        Raises
        ------
        DataError: the values were written by another version, or are damaged.
        """
        with check_stored_values(values):
            return cls(
                input_transform_from_json(values["inputs"]),
                TargetTransform.from_json(values["targets"]),
                tuple(int(count) for count in values["class_counts"]),
                tuple(float(mean) for mean in values["means"]),
                tuple(float(spread) for spread in values.get("spreads", ())),
                tuple((str(name), str(reason)) for name, reason in values.get("left_out", {}).items()),
            )


def check_layout(fitted: FittedTransforms, dataset: Dataset) -> None:
    """Check that other data has the layout of the training data.

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
                f"the columns differ from those in training: {'; '.join(differences[:5])}",
                where="--data",
                fix=f"the model takes {', '.join(expected)}",
            )
    else:
        inputs, transform = dataset.train.inputs, fitted.input_transform
        if tuple(inputs.shape[1:]) != transform.sample_shape or inputs.dtype.name != transform.dtype:
            raise DataError(
                f"samples are {inputs.dtype} of shape {tuple(inputs.shape[1:])}, but the model was trained on "
                f"{transform.dtype} of shape {transform.sample_shape}",
                where="--data",
                fix="use data of the same type and shape",
            )


TIME_NAMES = {DATE_WIDTH: "dates", TIMESTAMP_WIDTH: "dates with times of day", CLOCK_WIDTH: "times of day"}


def _describe_column(column: tuple[str, int] | None) -> str:
    if column is None:
        return "is missing"
    kind, width = column
    if kind == "category":
        return "holds text or categories"
    if kind == "time":
        return f"holds {TIME_NAMES[width]}"
    return f"holds {width} numbers" if width > 1 else "holds numbers"


def find_rounded_columns(job: JobConfig, dataset: Dataset, fitted: FittedTransforms) -> list[str]:
    """Return the input columns whose rounding errors matter, compared with their standard deviation in training.

    Returns none if inputs are not normalized: float64 would be rounded to the type of the computation anyway.
    """
    transform, rounding = fitted.input_transform, dataset.rounding_errors
    if rounding is None or (job.data.normalize == "none" and transform.encoding is None):
        return []
    std = np.array(transform.std)
    std = np.where(std > 0, std, np.inf)  # a scale of 0 is that of a constant, which becomes 0
    if isinstance(transform, ArrayTransform):
        coarse = is_too_coarse(rounding, std) if len(std) else np.array([])
        return [f"number {index}" for index in np.flatnonzero(coarse)]
    coarse = is_too_coarse(rounding[numeric_columns_of(transform.schema)], std)
    names = [column.name for column in transform.schema.columns if column.is_numeric for _ in range(column.width)]
    return list(dict.fromkeys(name for name, is_coarse in zip(names, coarse, strict=True) if is_coarse))


def fit_transforms(job: JobConfig, dataset: Dataset, splits: Mapping[str, SplitIndices]) -> FittedTransforms:
    """Fit what the job asks for on the training split; the result depends on no other row.

    Raises
    ------
    DataError: samples or targets that do not fit the job.
    """
    indices, left_out = splits["train"].indices, tuple(dataset.left_out.items())
    fit_targets = fit_multilabel_transform if job.task.kind == "multilabel" else fit_target_transform
    target_transform = fit_targets(job, dataset, splits)
    input_transform = fit_input_transform(job, dataset, indices)
    all_targets = target_transform.transform(
        dataset.train.targets,
        dataset.label_names,
        np.float64,
        indices=indices,
        column_label_names=dataset.column_label_names,
    )
    targets = all_targets[indices]
    if target_transform.kind in ("multilabel", "regression"):
        mean, std = targets.mean(0).tolist(), targets.std(0).tolist()
        return FittedTransforms(
            input_transform, target_transform, target_mean=tuple(mean), target_std=tuple(std), left_out=left_out
        )
    class_counts = tuple(count_classes(targets, len(target_transform.classes)))
    return FittedTransforms(input_transform, target_transform, class_counts=class_counts, left_out=left_out)
