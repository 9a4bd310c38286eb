"""Statistics of a table's training rows, computed in a few passes, a block of rows at a time.

They are exact, and memory is bounded for any number of rows: a block, and for quantiles 24 KB of counters for each
column and quantile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Schema
from pipeline.data.transforms.quantiles import QuantileSelect


def numeric_columns_of(schema: Schema) -> np.ndarray:
    """Return the columns of a matrix of this schema that hold numbers, int64 (n,), ascending."""
    pairs = zip(schema.columns, schema.offsets, strict=True)
    ranges = [np.arange(first, first + column.width) for column, first in pairs if column.is_numeric]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)


def categorical_columns_of(schema: Schema) -> np.ndarray:
    """Return the columns of a matrix of this schema that hold category codes, int64 (k,), ascending."""
    pairs = zip(schema.columns, schema.offsets, strict=True)
    return np.array([first for column, first in pairs if column.kind == "category"], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ColumnStatistics:
    """Statistics of the training rows.

    num_present: rows that have a value, for each numeric column of the matrix, int64 (n,).
    mean, variance: of these values, float64 (n,); the variance is exactly 0 if all are equal. NaN or 0 if no row has a
        value.
    quantiles: by probability, of these values, float64 (n,), NaN or 0 if no row has one. The median, if requested, is
        that of 0.5: the mean of the middle two for an even number of values.
    low, high: the smallest and the largest of these values, float64 (n,); NaN if no row has one.
    present_categories: for each categorical column, which of its categories occur, bool (L,).
    num_missing: for each categorical column, how many rows have no value, int64 (k,).
    """

    num_present: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    quantiles: dict[float, np.ndarray]
    low: np.ndarray
    high: np.ndarray
    present_categories: list[np.ndarray]
    num_missing: np.ndarray


def compute_statistics(
    inputs: np.ndarray, indices: np.ndarray, schema: Schema, *, probabilities: Sequence[float] = ()
) -> ColumnStatistics:
    """Compute statistics over some rows of a table.

    Parameters
    ----------
    inputs: the matrix (N, schema.width), float32 or float64.
    indices: of the rows to include, int64 (n,), n >= 1.
    probabilities: of a few quantiles to compute in the same passes (see `compute_quantiles` for many): one pass more
        than the two of the other statistics, or four more for float64.
    """
    numeric_columns, categorical_columns = numeric_columns_of(schema), categorical_columns_of(schema)
    moments, categories = _Moments(len(numeric_columns)), _CategoryCounter(schema)
    has_quantiles = bool(len(probabilities) and len(numeric_columns))
    select = QuantileSelect(len(numeric_columns), inputs.dtype, probabilities) if has_quantiles else None
    for pass_index in range(max(2, select.num_passes if select else 0)):
        for block in iter_blocks(inputs, indices):
            values = block if len(numeric_columns) == schema.width else block[:, numeric_columns]
            if pass_index < 2:
                moments.update(pass_index, values)
            if pass_index == 0:
                categories.update(block[:, categorical_columns])
            if select is not None and pass_index < select.num_passes:
                select.update(pass_index, values)
        if pass_index < 2:
            moments.finish_pass(pass_index)
        if select is not None and pass_index < select.num_passes:
            select.finish_pass(pass_index, moments.num_present)
    quantiles = np.empty((len(probabilities), 0)) if select is None else select.compute()
    return ColumnStatistics(
        moments.num_present,
        moments.mean,
        moments.variance,
        dict(zip(probabilities, quantiles, strict=True)),
        moments.low,
        moments.high,
        categories.present_categories,
        categories.num_missing,
    )


class _CategoryCounter:
    def __init__(self, schema: Schema) -> None:
        self.present_categories = [
            np.zeros(len(column.categories), bool) for column in schema.columns if column.kind == "category"
        ]
        self.num_missing = np.zeros(len(self.present_categories), np.int64)

    def update(self, codes: np.ndarray) -> None:
        missing = np.isnan(codes)
        self.num_missing += missing.sum(0)
        for index, is_present in enumerate(self.present_categories):
            is_present[codes[~missing[:, index], index].astype(np.int64)] = True


class _Moments:
    """The first pass sums differences from a column's first value, so that a large common part costs no digits; the
    second pass sums squared differences from the mean."""

    def __init__(self, columns: int) -> None:
        self._pilot = np.full(columns, np.nan)
        self._sums = np.zeros(columns)
        self.num_present = np.zeros(columns, np.int64)
        self.mean = np.zeros(columns)
        self.variance = np.zeros(columns)
        self.low, self.high = np.full(columns, np.nan), np.full(columns, np.nan)

    def update(self, pass_index: int, values: np.ndarray) -> None:
        if pass_index == 0:
            new = np.flatnonzero(np.isnan(self._pilot))
            if len(new):
                self._pilot[new] = values[np.argmax(~np.isnan(values[:, new]), 0), new]
        differences = values - (self._pilot if pass_index == 0 else self.mean)
        missing = np.isnan(differences)
        differences[missing] = 0.0
        if pass_index == 0:
            self.low = np.fmin(self.low, np.fmin.reduce(values, 0))
            self.high = np.fmax(self.high, np.fmax.reduce(values, 0))
            self.num_present += len(values) - missing.sum(0)
            self._sums += differences.sum(0)
        else:
            self.variance += np.einsum("rc,rc->c", differences, differences)

    def finish_pass(self, pass_index: int) -> None:
        counts = np.maximum(self.num_present, 1)
        if pass_index == 0:
            self.mean = self._pilot + self._sums / counts
        else:
            self.variance /= counts
