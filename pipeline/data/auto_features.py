"""`data.features: auto` after a table is decoded and split: columns that the training rows show to be of no help.

What can be judged without the splits and the label is left out before decoding, by the source.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from pipeline.config import JobConfig
from pipeline.data.dataset import Dataset
from pipeline.data.leakage import find_unhelpful_columns
from pipeline.data.tabular.schema import Schema

MIN_ROW_NUMBERS = 20
"""With fewer rows, a column may hold each whole number once by chance."""

MAX_EXACT_FLOAT32 = 1 << 24

MIN_LEAK_ROWS = 100
MIN_NUMERIC_LEAK_ROWS = 1_000
"""A leak is left out if it is seen in this many training rows. (In a smaller table, a number that separates the classes
may well be the best feature: there is a warning of it, as of any leak among the features.)"""


def is_auto(job: JobConfig) -> bool:
    """Return whether the job leaves the choice of its features to the rules of `features: auto`."""
    return getattr(job.data, "features", None) == "auto"


def leave_out_columns(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> Dataset:
    """Return the dataset without the columns that the rules of `features: auto` leave out: row numbers, and columns
    that are constant in training or leak the target. They are added to `Dataset.left_out`.

    At least one column stays: if leaks are all that there is, they do.

    Parameters
    ----------
    indices: the training split in `dataset.train`, int64 (n,).
    """
    schema = dataset.schema
    if not is_auto(job) or schema is None:
        return dataset
    found = find_unhelpful_columns(job, dataset, indices)
    left_out = {name: f"it has {what} in all training rows" for name, what in found.constant.items()}
    left_out |= dict.fromkeys(_row_number_columns(dataset), "it numbers the rows")
    if len(left_out) == len(schema.columns):
        return dataset
    is_number = {column.name: column.kind == "number" for column in schema.columns}
    is_regression = job.task.kind == "regression"
    leaks = [
        name
        for name in found.leaks
        if name not in left_out
        and found.num_rows >= (MIN_NUMERIC_LEAK_ROWS if is_number[name] and not is_regression else MIN_LEAK_ROWS)
    ]
    if len(left_out) + len(leaks) < len(schema.columns):
        left_out |= dict.fromkeys(leaks, "it alone predicts the label (target leakage)")
    ordered = {column.name: left_out[column.name] for column in schema.columns if column.name in left_out}
    return replace(_without_columns(dataset, ordered), left_out={**dataset.left_out, **ordered}) if ordered else dataset


def left_out_warnings(dataset: Dataset) -> list[str]:
    """Return a message for each column that is left out, and how to keep one."""
    names = list(dataset.left_out)
    lines = [f"column {name!r} is left out: {reason}" for name, reason in dataset.left_out.items()]
    hint = 'to keep a left-out column, set data.features: ["*"]' + (
        f", and data.exclude for the other{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
    )
    return [*lines, hint] if lines else []


def _row_number_columns(dataset: Dataset) -> list[str]:
    """Return the columns that hold each whole number from 0 or 1 on once."""
    assert dataset.schema is not None, "a table"
    inputs, rows = dataset.train.inputs, len(dataset.train)
    if not MIN_ROW_NUMBERS <= rows < MAX_EXACT_FLOAT32:
        return []
    names = []
    for column, offset in zip(dataset.schema.columns, dataset.schema.offsets, strict=True):
        if column.kind == "category" or column.width > 1:
            continue
        ends = sorted(inputs[[0, rows // 2, -1], offset].tolist())
        if not (ends[0] >= 0 and ends[2] <= rows and all(end == int(end) for end in ends)):
            continue  # most columns: a few values tell, without reading a memory-mapped column
        values = np.sort(inputs[:, offset])
        if values[0] in (0, 1) and np.array_equal(values, values[0] + np.arange(rows)):
            names.append(column.name)
    return names


def _without_columns(dataset: Dataset, names: Collection[str]) -> Dataset:
    """Return the dataset without some columns of its inputs."""
    assert dataset.schema is not None, "a table"
    assert dataset.reopen_with_features is not None, "opened by its source"
    kept = [column for column in dataset.schema.columns if column.name not in names]
    reopen_in_float64 = dataset.reopen_in_float64
    if isinstance(dataset.train.inputs, np.memmap):
        return dataset.reopen_with_features([column.name for column in kept])
    indices = np.concatenate(
        [
            np.arange(offset, offset + column.width)
            for column, offset in zip(dataset.schema.columns, dataset.schema.offsets, strict=True)
            if column.name not in names
        ]
    )
    return replace(
        dataset,
        train=replace(dataset.train, inputs=np.ascontiguousarray(dataset.train.inputs[:, indices])),
        schema=Schema(tuple(kept)),
        rounding_errors=None if dataset.rounding_errors is None else dataset.rounding_errors[indices],
        reopen_in_float64=None if reopen_in_float64 is None else lambda: _without_columns(reopen_in_float64(), names),
    )
