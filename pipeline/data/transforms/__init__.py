"""Transforms of raw samples to model inputs: fitted on the training rows only, stored with every checkpoint.

`arrays` transforms arrays and images, `tabular` rows of tables; both have the same methods. `column_statistics`
computes what `tabular` is fitted to; `column_report` counts values in new data that the training rows did not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.config import JobConfig
from pipeline.data.dataset import Dataset
from pipeline.data.transforms.arrays import ArrayTransform, TransformFn, fit_array_transform
from pipeline.data.transforms.column_report import DataReport
from pipeline.data.transforms.column_statistics import numeric_columns_of
from pipeline.data.transforms.tabular import TabularTransform, fit_tabular_transform

__all__ = [
    "DataReport",
    "TransformFn",
    "InputTransform",
    "ArrayTransform",
    "TabularTransform",
    "fit_input_transform",
    "numeric_columns_of",
    "input_transform_from_json",
]

InputTransform = ArrayTransform | TabularTransform


def fit_input_transform(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> InputTransform:
    """Fit what `data.normalize` and `data.missing` ask for.

    Parameters
    ----------
    indices: the training split in `dataset.train`, int64 (n,): what is fitted depends on no other row.

    Raises
    ------
    DataError: the normalization does not fit the samples; with `missing: fail`, any row has a missing value.
    """
    if dataset.schema is None:
        return fit_array_transform(job, dataset.train, indices, dataset.column_names)
    return fit_tabular_transform(job, dataset.train, dataset.schema, indices)


def input_transform_from_json(values: Mapping[str, Any]) -> InputTransform:
    """Restore a transform from the values that `to_json` of either class returned.

    Raises
    ------
    DataError: the values were written by another version, or are damaged.
    """
    is_table = isinstance(values, Mapping) and values.get("kind") == "table"
    return TabularTransform.from_json(values) if is_table else ArrayTransform.from_json(values)
