"""Columns of a table that are probably not meant: those that tell nothing, and those that tell too much."""

from __future__ import annotations

import numpy as np

from pipeline.data.preprocess.passes import number_places
from pipeline.data.sources.arrays import Arrays, Source
from pipeline.data.statistics import blocks
from pipeline.data.tables.schema import Schema
from pipeline.job import Job

MOST_ROWS = 100_000
MOST_VALUES = 1 << 20
"""Of the training rows, so many are looked at for leaks, or fewer where they are wide."""

STRETCHES = 100
"""In so many stretches of rows, evenly spread: a table may be sorted by its label. (Single rows would each be a page to
read where the table lies on disk.)"""

FEWEST_ROWS = 20
"""With less, a column can tell the label by accident."""

SCREENED_ROWS = 1_000
"""A column that is far from telling the label of these, evenly spread, is not looked at further."""

TELLS = 0.999
"""Share of the labels that a rule on one column must get right to be a leak."""

MOST_COMMON = 0.99
"""... and the share of the most frequent label below which this means something."""

CORRELATES = 0.9999
"""Correlation of a column with a number to be learned from which on it is a leak."""


def fit_warnings(job: Job, source: Source, rows: np.ndarray) -> list[str]:
    """Columns of a table that are constant or empty in training, or that alone give the label away.

    A column gives a label away where this rule gets 99.9 % of the labels right, and the most frequent label is below
    99 %: each level (or value) stands for its most frequent label, levels of a single row counting as wrong; or, for
    numbers, each class is a range of values. It gives a number away where their correlation is beyond 0.9999.

    Parameters
    ----------
    rows: positions of the training split in `source.train`, int64 (n,): no other row is looked at.
    """
    if source.schema is None:
        return []
    part = source.train
    sampled_indices = _spread(rows, max(min(MOST_ROWS, MOST_VALUES // max(source.schema.width, 1)), SCREENED_ROWS))
    inputs, targets = part.inputs[sampled_indices], part.targets[sampled_indices]
    messages = [
        f"column {name!r} has {what} in all training rows: it tells nothing"
        for name, what in _constant(part, source.schema, rows, inputs)
    ]
    find_leaks = _correlated if job.task.kind == "regression" else _telling
    leaking_columns = find_leaks(inputs, targets, set(number_places(source.schema).tolist())) if len(sampled_indices) >= FEWEST_ROWS else set()
    for column, first in zip(source.schema.columns, source.schema.offsets, strict=True):
        if not leaking_columns.isdisjoint(range(first, first + column.width)):
            messages.append(
                f"column {column.name!r} alone gives the label away: leave it out of data.features unless it is known "
                "before the label is"
            )
    return messages


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """About `count` rows, at most, in stretches that are evenly spread over all of them."""
    if len(rows) <= count:
        return rows
    length = count // STRETCHES
    starts = np.linspace(0, len(rows) - length, STRETCHES).astype(np.int64)
    spread: np.ndarray = rows[(starts[:, None] + np.arange(length)).reshape(-1)]
    return spread


def _constant(part: Arrays, schema: Schema, rows: np.ndarray, few: np.ndarray) -> list[tuple[str, str]]:
    """Columns without two values, and what they have. Only what is so in a few rows is looked for in all."""
    first = few[0]
    is_constant = ((few == first) | (np.isnan(few) & np.isnan(first))).all(0)
    for block in blocks(part.inputs, rows if len(few) < len(rows) else rows[:0]):
        if not is_constant.any():
            break
        is_constant &= ((block == first) | (np.isnan(block) & np.isnan(first))).all(0)
    constant_columns: list[tuple[str, str]] = []
    for column, place in zip(schema.columns, schema.offsets, strict=True):
        if is_constant[place : place + column.width].all():
            missing = np.isnan(first[place : place + column.width]).all()
            constant_columns.append((column.name, "no value" if missing else "the same value"))
    return constant_columns


def _correlated(inputs: np.ndarray, targets: np.ndarray, numbers: set[int]) -> set[int]:
    """Places of numbers whose correlation with a target is beyond `CORRELATES`, over the rows that have a value."""
    places = np.array(sorted(numbers), dtype=np.int64)
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
    is_correlated = (product > CORRELATES**2 * spread * goal_spread) & (counts >= FEWEST_ROWS)
    return set(places[is_correlated.any(1)].tolist())


def _telling(inputs: np.ndarray, targets: np.ndarray, numbers: set[int]) -> set[int]:
    """Places of columns that tell the label."""
    _, labels, counts = np.unique(targets, return_inverse=True, return_counts=True)
    labels = labels.reshape(-1)
    if counts.max() > MOST_COMMON * len(labels):
        return set()
    spread = np.linspace(0, len(labels) - 1, min(SCREENED_ROWS, len(labels))).astype(np.int64)
    screened, screened_labels = np.ascontiguousarray(inputs[spread].T), labels[spread]
    predictive: set[int] = set()
    for place in range(inputs.shape[1]):
        is_number = place in numbers
        if _errors(screened[place], screened_labels, is_number, 0) > 10 * (1 - TELLS) * len(spread):
            continue
        if _errors(inputs[:, place], labels, is_number, 1) <= (1 - TELLS) * len(labels):
            predictive.add(place)
    return predictive


def _errors(values: np.ndarray, labels: np.ndarray, is_number: bool, lonely: int) -> float:
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
    as_levels = wrong + int((np.add.reduceat(sizes, firsts) == 1).sum()) * (lonely or is_number)
    if not is_number:
        return as_levels
    # Of equally frequent labels any may stand for a value.
    owner = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(sizes))))
    top = np.flatnonzero(sizes == most[owner])
    chosen = labels[begins[top[np.concatenate([[True], np.diff(owner[top]) > 0])]]]
    ranges = 1 + int((chosen[1:] != chosen[:-1]).sum())
    return min(as_levels, wrong + max(0, ranges - len(np.unique(labels))) / 2)
