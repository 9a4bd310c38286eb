"""Columns of a table that are probably not meant: those that tell nothing, and those that tell too much."""

from __future__ import annotations

import numpy as np

from pipeline.config import JobConfig
from pipeline.data.dataset import Dataset, DatasetPart
from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Schema
from pipeline.data.transforms.column_statistics import numeric_columns_of

MAX_SCANNED_ROWS = 100_000
MAX_SCANNED_VALUES = 1 << 20
"""Of the training rows, so many are looked at for leaks, or fewer where they are wide."""

NUM_STRETCHES = 100
"""In so many stretches of rows, evenly spread: a table may be sorted by its label. (Single rows would each be a page to
read where the table lies on disk.)"""

MIN_ROWS = 20
"""With less, a column can tell the label by accident."""

NUM_SCREENING_ROWS = 1_000
"""A column that is far from telling the label of these, evenly spread, is not looked at further."""

LEAKAGE_ACCURACY = 0.999
"""Share of the labels that a rule on one column must get right to be a leak."""

MAX_MAJORITY_FRACTION = 0.99
"""... and the share of the most frequent label below which this means something."""

LEAKAGE_CORRELATION = 0.9999
"""Correlation of a column with a number to be learned from which on it is a leak."""


def leakage_warnings(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> list[str]:
    """Columns of a table that are constant or empty in training, or that alone give the label away.

    A column gives a label away where this rule gets 99.9 % of the labels right, and the most frequent label is below
    99 %: each level (or value) stands for its most frequent label, levels of a single row counting as wrong; or, for
    numbers, each class is a range of values. It gives a number away where their correlation is beyond 0.9999.

    Parameters
    ----------
    rows: positions of the training split in `source.train`, int64 (n,): no other row is looked at.
    """
    if dataset.schema is None:
        return []
    part = dataset.train
    sampled_indices = _sample_stretches(
        indices, max(min(MAX_SCANNED_ROWS, MAX_SCANNED_VALUES // max(dataset.schema.width, 1)), NUM_SCREENING_ROWS)
    )
    inputs, targets = part.inputs[sampled_indices], part.targets[sampled_indices]
    messages = [
        f"column {name!r} has {what} in all training rows: it tells nothing"
        for name, what in _constant_columns(part, dataset.schema, indices, inputs)
    ]
    find_leaks = _correlated_columns if job.task.kind == "regression" else _predictive_columns
    leaking_columns = (
        find_leaks(inputs, targets, set(numeric_columns_of(dataset.schema).tolist()))
        if len(sampled_indices) >= MIN_ROWS
        else set()
    )
    for column, first in zip(dataset.schema.columns, dataset.schema.offsets, strict=True):
        if not leaking_columns.isdisjoint(range(first, first + column.width)):
            messages.append(
                f"column {column.name!r} alone gives the label away: leave it out of data.features unless it is known "
                "before the label is"
            )
    return messages


def _sample_stretches(indices: np.ndarray, count: int) -> np.ndarray:
    """About `count` rows, at most, in stretches that are evenly spread over all of them."""
    if len(indices) <= count:
        return indices
    length = count // NUM_STRETCHES
    starts = np.linspace(0, len(indices) - length, NUM_STRETCHES).astype(np.int64)
    spread: np.ndarray = indices[(starts[:, None] + np.arange(length)).reshape(-1)]
    return spread


def _constant_columns(
    part: DatasetPart, schema: Schema, indices: np.ndarray, sample: np.ndarray
) -> list[tuple[str, str]]:
    """Columns without two values, and what they have. Only what is so in a few rows is looked for in all."""
    first = sample[0]
    is_constant = ((sample == first) | (np.isnan(sample) & np.isnan(first))).all(0)
    for block in iter_blocks(part.inputs, indices if len(sample) < len(indices) else indices[:0]):
        if not is_constant.any():
            break
        is_constant &= ((block == first) | (np.isnan(block) & np.isnan(first))).all(0)
    constant_columns: list[tuple[str, str]] = []
    for column, place in zip(schema.columns, schema.offsets, strict=True):
        if is_constant[place : place + column.width].all():
            missing = np.isnan(first[place : place + column.width]).all()
            constant_columns.append((column.name, "no value" if missing else "the same value"))
    return constant_columns


def _correlated_columns(inputs: np.ndarray, targets: np.ndarray, numeric_columns: set[int]) -> set[int]:
    """Places of numbers whose correlation with a target is beyond `CORRELATES`, over the rows that have a value."""
    places = np.array(sorted(numeric_columns), dtype=np.int64)
    values = inputs[:, places].astype(np.float64)
    present = ~np.isnan(values)
    counts = np.maximum(present.sum(0), 1)[:, None]
    values -= np.where(present, values, 0.0).sum(0) / counts[:, 0]
    values[~present] = 0.0
    centered_targets = targets.reshape(len(targets), -1).astype(np.float64)
    centered_targets -= centered_targets.mean(0)
    weights = present.astype(np.float64)
    spread = np.square(values).sum(0)[:, None]
    goal_spread = weights.T @ np.square(centered_targets) - np.square(weights.T @ centered_targets) / counts
    product = np.square(values.T @ centered_targets)
    is_correlated = (product > LEAKAGE_CORRELATION**2 * spread * goal_spread) & (counts >= MIN_ROWS)
    return set(places[is_correlated.any(1)].tolist())


def _predictive_columns(inputs: np.ndarray, targets: np.ndarray, numeric_columns: set[int]) -> set[int]:
    """Places of columns that tell the label."""
    _, labels, counts = np.unique(targets, return_inverse=True, return_counts=True)
    labels = labels.reshape(-1)
    if counts.max() > MAX_MAJORITY_FRACTION * len(labels):
        return set()
    spread = np.linspace(0, len(labels) - 1, min(NUM_SCREENING_ROWS, len(labels))).astype(np.int64)
    screened, screened_labels = np.ascontiguousarray(inputs[spread].T), labels[spread]
    predictive: set[int] = set()
    for place in range(inputs.shape[1]):
        is_number = place in numeric_columns
        if _rule_error(screened[place], screened_labels, is_number, 0) > 10 * (1 - LEAKAGE_ACCURACY) * len(spread):
            continue
        if _rule_error(inputs[:, place], labels, is_number, 1) <= (1 - LEAKAGE_ACCURACY) * len(labels):
            predictive.add(place)
    return predictive


def _rule_error(values: np.ndarray, labels: np.ndarray, is_number: bool, min_count: int) -> float:
    """How many labels the better of the two rules gets wrong. lonely: 1 where a level of a single row counts as one."""
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.lexsort((labels, values))
    values, labels = values[order], labels[order]
    new_value = np.concatenate([[True], values[1:] != values[:-1]])
    begins = np.flatnonzero(new_value | np.concatenate([[True], labels[1:] != labels[:-1]]))
    sizes = np.diff(np.append(begins, len(values)))  # rows of each pair of value and label
    firsts = np.flatnonzero(new_value[begins])
    most = np.maximum.reduceat(sizes, firsts)
    wrong = len(values) - int(most.sum())
    as_levels = wrong + int((np.add.reduceat(sizes, firsts) == 1).sum()) * (min_count or is_number)
    if not is_number:
        return as_levels
    # Of equally frequent labels any may stand for a value.
    owner = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(sizes))))
    top = np.flatnonzero(sizes == most[owner])
    chosen = labels[begins[top[np.concatenate([[True], np.diff(owner[top]) > 0])]]]
    ranges = 1 + int((chosen[1:] != chosen[:-1]).sum())
    return min(as_levels, wrong + max(0, ranges - len(np.unique(labels))) / 2)
