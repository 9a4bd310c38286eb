"""Statistics of a table's training rows, computed in a few passes, a block of rows at a time.

They are exact, and memory is bounded for any number of rows: a block, and for medians 16 KB of counters per column.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Schema

DIGIT_BITS = 11
"""Bits of a median that one pass determines: three passes for float32, six for float64."""


def numeric_columns_of(schema: Schema) -> np.ndarray:
    """Return the columns of a matrix of this schema that hold numbers, int64 (n,), ascending."""
    pairs = zip(schema.columns, schema.offsets, strict=True)
    ranges = [np.arange(first, first + column.width) for column, first in pairs if column.kind == "number"]
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
    median: float64 (n,), the mean of the middle two for an even number of values, NaN or 0 if no row has one; None
        unless requested.
    low, high: the smallest and the largest of these values, float64 (n,); NaN if no row has one.
    present_categories: for each categorical column, which of its categories occur, bool (L,).
    num_missing: for each categorical column, how many rows have no value, int64 (k,).
    """

    num_present: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    median: np.ndarray | None
    low: np.ndarray
    high: np.ndarray
    present_categories: list[np.ndarray]
    num_missing: np.ndarray


def compute_statistics(
    inputs: np.ndarray, indices: np.ndarray, schema: Schema, *, with_medians: bool
) -> ColumnStatistics:
    """Compute statistics over some rows of a table.

    Parameters
    ----------
    inputs: the matrix (N, schema.width), float32 or float64.
    indices: of the rows to include, int64 (n,), n >= 1.
    with_medians: whether to compute medians: one pass more than the two of the other statistics, or four more.
    """
    numeric_columns, categorical_columns = numeric_columns_of(schema), categorical_columns_of(schema)
    moments, categories = _Moments(len(numeric_columns)), _CategoryCounter(schema)
    medians = _Medians(len(numeric_columns), inputs.dtype) if with_medians and len(numeric_columns) else None
    for pass_index in range(max(2, medians.num_passes if medians else 0)):
        for block in iter_blocks(inputs, indices):
            values = block if len(numeric_columns) == schema.width else block[:, numeric_columns]
            if pass_index < 2:
                moments.update(pass_index, values)
            if pass_index == 0:
                categories.update(block[:, categorical_columns])
            if medians is not None:
                medians.update(pass_index, values)
        if pass_index < 2:
            moments.finish_pass(pass_index)
        if medians is not None:
            medians.finish_pass(pass_index, moments.num_present)
    return ColumnStatistics(
        moments.num_present,
        moments.mean,
        moments.variance,
        None if medians is None else medians.compute(),
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


@dataclass
class _Medians:
    """Exact medians by a radix select on the bits of the values.

    Floating-point numbers keep their order when their bits are read as integers with the sign flipped. Each pass counts
    how often each value of the next `DIGIT_BITS` bits occurs among the values that share the median's bits so far, and
    so determines these bits of the median. The lower and the upper of the middle two values are searched together.
    Missing values sort after all others.
    """

    columns: int
    dtype: np.dtype
    num_passes: int = field(init=False)

    def __post_init__(self) -> None:
        self._word = np.dtype(f"u{self.dtype.itemsize}")
        self._bits = 8 * self.dtype.itemsize
        self.num_passes = -(-self._bits // DIGIT_BITS)
        self._prefix = np.zeros((2, self.columns), self._word)
        self._rank = np.zeros((2, self.columns), np.int64)
        self._counts = np.zeros((2, self.columns, 1 << DIGIT_BITS), np.int64)

    def update(self, pass_index: int, values: np.ndarray) -> None:
        keys = self._sort_keys(values)
        above, below = self._bits_around(pass_index)
        digits = (keys << self._word.type(above)) >> self._word.type(above + below)
        bins = digits.astype(np.int64)
        bins += np.arange(self.columns, dtype=np.int64) << DIGIT_BITS
        for side in range(1 if (self._prefix[0] == self._prefix[1]).all() else 2):
            has_prefix = keys >> self._word.type(self._bits - above) == self._prefix[side] if pass_index else None
            matching = bins.reshape(-1) if has_prefix is None else bins[has_prefix]
            self._counts[side] += np.bincount(matching, minlength=self._counts[side].size).reshape(self.columns, -1)

    def finish_pass(self, pass_index: int, present: np.ndarray) -> None:
        if pass_index == 0:
            self._rank[:] = (present - 1) // 2, present // 2
        if (self._prefix[0] == self._prefix[1]).all():
            self._counts[1] = self._counts[0]
        above, below = self._bits_around(pass_index)
        width = self._bits - above - below
        for side in range(2):
            upto = self._counts[side].cumsum(1)
            digit = (upto <= self._rank[side, :, None]).sum(1)
            before = np.where(digit > 0, upto[np.arange(self.columns), np.maximum(digit, 1) - 1], 0)
            self._rank[side] -= before
            self._prefix[side] = (self._prefix[side] << self._word.type(width)) | digit.astype(self._word)
        self._counts[:] = 0

    def compute(self) -> np.ndarray:
        """Return the medians, float64 (columns,); NaN where there is no value."""
        sign = self._word.type(1 << (self._bits - 1))
        words = np.where(self._prefix & sign, self._prefix ^ sign, ~self._prefix)
        lower, upper = words.view(self.dtype).astype(np.float64)
        # Halved first, since the sum could overflow.
        middle: np.ndarray = np.where(lower == upper, lower, 0.5 * lower + 0.5 * upper)
        return middle

    def _bits_around(self, number: int) -> tuple[int, int]:
        """Return the number of bits above and below those of a pass."""
        above = number * DIGIT_BITS
        return above, max(self._bits - above - DIGIT_BITS, 0)

    def _sort_keys(self, values: np.ndarray) -> np.ndarray:
        """Return integers that sort like the values, (b, columns)."""
        words = np.ascontiguousarray(values).view(self._word)
        sign = self._word.type(1 << (self._bits - 1))
        keys: np.ndarray = np.where(words & sign, ~words, words | sign)
        keys[np.isnan(values)] = np.iinfo(self._word).max
        return keys
