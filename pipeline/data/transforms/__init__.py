"""From raw samples to what a model takes: fitted on the training rows alone, stored with every checkpoint.

`samples` prepares arrays and images, `columns` the rows of tables; both have the same methods. `fitting` fits the
latter to what `passes` saw of the training rows; `leaks` looks for what is probably not meant; `report` counts what new
data holds that the training rows did not.
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
from pipeline.data.transforms.leakage import leakage_warnings
from pipeline.data.transforms.tabular import TabularTransform, fit_tabular_transform

__all__ = [
    "DataReport",
    "TransformFn",
    "InputTransform",
    "ArrayTransform",
    "TabularTransform",
    "fit_input_transform",
    "leakage_warnings",
    "numeric_columns_of",
    "input_transform_from_json",
]

InputTransform = ArrayTransform | TabularTransform


def fit_input_transform(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> InputTransform:
    """Fit what `data.normalize` and `data.missing` ask for.

    Parameters
    ----------
    rows: positions of the training split in `source.train`, int64 (n,): what is fitted depends on no other row.

    Raises
    ------
    DataError: a normalisation that does not fit the samples; with `missing: fail`, a missing value anywhere.
    """
    if dataset.schema is None:
        return fit_array_transform(job, dataset.train, indices, dataset.column_names)
    return fit_tabular_transform(job, dataset.train, dataset.schema, indices)


def input_transform_from_json(values: Mapping[str, Any]) -> InputTransform:
    """What `to_json` of either kind gave.

    Raises
    ------
    DataError: written by another version, or damaged.
    """
    is_table = isinstance(values, Mapping) and values.get("kind") == "table"
    return TabularTransform.from_json(values) if is_table else ArrayTransform.from_json(values)
