"""Columns of a table that are probably not intended: constant ones, and ones that leak the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.config import JobConfig
from pipeline.data.dataset import Dataset, DatasetPart
from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Schema

MAX_SCANNED_ROWS = 100_000
MAX_SCANNED_VALUES = 1 << 20
"""At most this many training rows are checked for leaks, and at most this many values."""

NUM_STRETCHES = 100
"""The checked rows are taken from this many ranges, evenly spread, since a table may be sorted by its label. (Single
rows would each cost reading a page from disk.)"""

MIN_ROWS = 20
"""With fewer rows, a column can predict the label by chance."""

NUM_SCREENING_ROWS = 1_000
"""A column that is far from predicting the label of this many rows, evenly spread, is not checked further."""

LEAKAGE_ACCURACY = 0.999
"""Accuracy from which on a rule on one column counts as a leak."""

MAX_MAJORITY_FRACTION = 0.99
"""If the most frequent label has more than this fraction of the rows, such an accuracy means nothing."""

LEAKAGE_CORRELATION = 0.9999
"""Correlation of a column with a numeric target from which on it counts as a leak."""


@dataclass(frozen=True)
class UnhelpfulColumns:
    """Columns of a table that are probably not intended, by name.

    constant: what each has in all training rows: "no value" or "the same value".
    leaks: columns that alone predict the label.
    num_rows: the training rows that were checked for leaks.
    """

    constant: Mapping[str, str]
    leaks: tuple[str, ...]
    num_rows: int


def find_unhelpful_columns(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> UnhelpfulColumns:
    """Return the columns of a table that are constant or empty in training, or that leak the target.

    A column leaks a label if one of two rules predicts 99.9 % of the labels, and the most frequent label is below 99 %:
    each category (or value) predicts its most frequent label, where categories of a single row count as wrong; or, for
    numbers, each class is a range of values. A column leaks a numeric target, or a label of a multilabel task, if their
    correlation is above 0.9999.

    Parameters
    ----------
    indices: the training split in `dataset.train`, int64 (n,): no other row is read.
    """
    assert dataset.schema is not None, "a table"
    part = dataset.train
    sampled_indices = _sample_stretches(
        indices, max(min(MAX_SCANNED_ROWS, MAX_SCANNED_VALUES // max(dataset.schema.width, 1)), NUM_SCREENING_ROWS)
    )
    inputs, targets = part.inputs[sampled_indices], part.targets[sampled_indices]
    find_leaks = _correlated_columns if job.task.kind in ("multilabel", "regression") else _predictive_columns
    leaking_columns = (
        find_leaks(inputs, targets, _numeric_columns(dataset.schema)) if len(sampled_indices) >= MIN_ROWS else set()
    )
    return UnhelpfulColumns(
        constant=dict(_constant_columns(part, dataset.schema, indices, inputs)),
        leaks=tuple(
            column.name
            for column, first in zip(dataset.schema.columns, dataset.schema.offsets, strict=True)
            if not leaking_columns.isdisjoint(range(first, first + column.width))
        ),
        num_rows=len(sampled_indices),
    )


def leakage_warnings(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> list[str]:
    """Return warnings about columns of a table that are constant or empty in training, or that leak the target, see
    `find_unhelpful_columns`."""
    if dataset.schema is None:
        return []
    found = find_unhelpful_columns(job, dataset, indices)
    return [
        *(
            f"column {name!r} has {what} in all training rows: it carries no information"
            for name, what in found.constant.items()
        ),
        *(
            f"column {name!r} alone predicts the label (target leakage): leave it out with data.exclude unless it is "
            "known before the label is"
            for name in found.leaks
        ),
    ]


def _numeric_columns(schema: Schema) -> set[int]:
    """Return the columns of the matrix that hold numbers."""
    return {
        offset + index
        for column, offset in zip(schema.columns, schema.offsets, strict=True)
        for index in range(column.width)
        if column.kind == "number"
    }


def _sample_stretches(indices: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` rows, in ranges that are evenly spread over all of them."""
    if len(indices) <= count:
        return indices
    length = count // NUM_STRETCHES
    starts = np.linspace(0, len(indices) - length, NUM_STRETCHES).astype(np.int64)
    sampled: np.ndarray = indices[(starts[:, None] + np.arange(length)).reshape(-1)]
    return sampled


def _constant_columns(
    part: DatasetPart, schema: Schema, indices: np.ndarray, sample: np.ndarray
) -> list[tuple[str, str]]:
    """Return columns without two different values, and what they have. Only columns that are constant in the sample are
    checked in all rows."""
    first = sample[0]
    is_constant = ((sample == first) | (np.isnan(sample) & np.isnan(first))).all(0)
    for block in iter_blocks(part.inputs, indices if len(sample) < len(indices) else indices[:0]):
        if not is_constant.any():
            break
        is_constant &= ((block == first) | (np.isnan(block) & np.isnan(first))).all(0)
    constant_columns: list[tuple[str, str]] = []
    for column, offset in zip(schema.columns, schema.offsets, strict=True):
        if is_constant[offset : offset + column.width].all():
            missing = np.isnan(first[offset : offset + column.width]).all()
            constant_columns.append((column.name, "no value" if missing else "the same value"))
    return constant_columns


def _correlated_columns(inputs: np.ndarray, targets: np.ndarray, numeric_columns: set[int]) -> set[int]:
    """Return the numeric matrix columns whose correlation with a target is above `LEAKAGE_CORRELATION`, over the rows
    that have a value."""
    columns = np.array(sorted(numeric_columns), dtype=np.int64)
    values = inputs[:, columns].astype(np.float64)
    present = ~np.isnan(values)
    counts = np.maximum(present.sum(0), 1)[:, None]
    values -= np.where(present, values, 0.0).sum(0) / counts[:, 0]
    values[~present] = 0.0
    centered_targets = targets.reshape(len(targets), -1).astype(np.float64)
    centered_targets -= centered_targets.mean(0)
    weights = present.astype(np.float64)
    column_spread = np.square(values).sum(0)[:, None]
    target_spread = weights.T @ np.square(centered_targets) - np.square(weights.T @ centered_targets) / counts
    product = np.square(values.T @ centered_targets)
    is_correlated = (product > LEAKAGE_CORRELATION**2 * column_spread * target_spread) & (counts >= MIN_ROWS)
    return set(columns[is_correlated.any(1)].tolist())


def _predictive_columns(inputs: np.ndarray, targets: np.ndarray, numeric_columns: set[int]) -> set[int]:
    """Return the matrix columns that predict the label."""
    _, labels, counts = np.unique(targets, return_inverse=True, return_counts=True)
    labels = labels.reshape(-1)
    if counts.max() > MAX_MAJORITY_FRACTION * len(labels):
        return set()
    sample = np.linspace(0, len(labels) - 1, min(NUM_SCREENING_ROWS, len(labels))).astype(np.int64)
    screened, screened_labels = np.ascontiguousarray(inputs[sample].T), labels[sample]
    predictive: set[int] = set()
    for column in range(inputs.shape[1]):
        is_number = column in numeric_columns
        if _rule_error(screened[column], screened_labels, is_number, 0) > 10 * (1 - LEAKAGE_ACCURACY) * len(sample):
            continue
        if _rule_error(inputs[:, column], labels, is_number, 1) <= (1 - LEAKAGE_ACCURACY) * len(labels):
            predictive.add(column)
    return predictive


def _rule_error(values: np.ndarray, labels: np.ndarray, is_number: bool, singleton_penalty: int) -> float:
    """Return how many labels the better of the two rules predicts wrong.

    singleton_penalty: 1 if a category of a single row counts as wrong, else 0; a number of a single row always does.
    """
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.lexsort((labels, values))
    values, labels = values[order], labels[order]
    new_value = np.concatenate([[True], values[1:] != values[:-1]])
    begins = np.flatnonzero(new_value | np.concatenate([[True], labels[1:] != labels[:-1]]))
    sizes = np.diff(np.append(begins, len(values)))  # rows of each pair of value and label
    firsts = np.flatnonzero(new_value[begins])
    most = np.maximum.reduceat(sizes, firsts)
    wrong = len(values) - int(most.sum())
    by_category = wrong + int((np.add.reduceat(sizes, firsts) == 1).sum()) * (singleton_penalty or is_number)
    if not is_number:
        return by_category
    # Of equally frequent labels, any may be the prediction for a value.
    owner = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(sizes))))
    top = np.flatnonzero(sizes == most[owner])
    chosen = labels[begins[top[np.concatenate([[True], np.diff(owner[top]) > 0])]]]
    ranges = 1 + int((chosen[1:] != chosen[:-1]).sum())
    return min(by_category, wrong + max(0, ranges - len(np.unique(labels))) / 2)
