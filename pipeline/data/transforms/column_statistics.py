"""What is known of a table's training rows, found in a few passes, a block of rows at a time.

Exact, and in bounded memory whatever the number of rows: a block, and 16 KB of counters a column for the medians.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Schema

DIGIT_BITS = 11
"""Bits of a value that one pass settles on the way to its median: three passes for float32, six for float64."""


def numeric_columns_of(schema: Schema) -> np.ndarray:
    """Where a matrix of this schema has numbers, int64 (n,), ascending."""
    pairs = zip(schema.columns, schema.offsets, strict=True)
    places = [np.arange(first, first + column.width) for column, first in pairs if column.kind == "number"]
    return np.concatenate(places) if places else np.empty(0, np.int64)


def categorical_columns_of(schema: Schema) -> np.ndarray:
    """Where a matrix of this schema has positions of levels, int64 (k,), ascending."""
    pairs = zip(schema.columns, schema.offsets, strict=True)
    return np.array([first for column, first in pairs if column.kind == "category"], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ColumnStatistics:
    """The training rows in numbers.

    present: rows that have a value, for each place of a number, int64 (n,).
    mean, variance: of those, float64 (n,); exactly 0 variance where all are equal. median: the mean of the middle two
        where they are even in number; only if asked for. All three are NaN or 0 where no row has a value.
    low, high: the smallest and the largest of those values, float64 (n,); NaN where no row has one.
    levels: for each categorical column, which of its levels occur, bool (L,).
    misses: for each categorical column, how many rows have no value, int64 (k,).
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
    """Look at some rows of a table.

    Parameters
    ----------
    inputs: the matrix (N, schema.width), float32 or float64.
    rows: positions of the rows that count, int64 (n,), n >= 1.
    medians: whether to find them too: it takes one or four passes more than the others' two.
    """
    numbers, categories = numeric_columns_of(schema), categorical_columns_of(schema)
    moments, levels = _Moments(len(numbers)), _CategoryCounter(schema)
    middle = _Medians(len(numbers), inputs.dtype) if with_medians and len(numbers) else None
    for pass_index in range(max(2, middle.num_passes if middle else 0)):
        for block in iter_blocks(inputs, indices):
            values = block if len(numbers) == schema.width else block[:, numbers]
            if pass_index < 2:
                moments.update(pass_index, values)
            if pass_index == 0:
                levels.update(block[:, categories])
            if middle is not None:
                middle.update(pass_index, values)
        if pass_index < 2:
            moments.finish_pass(pass_index)
        if middle is not None:
            middle.finish_pass(pass_index, moments.num_present)
    return ColumnStatistics(
        moments.num_present,
        moments.mean,
        moments.variance,
        None if middle is None else middle.compute(),
        moments.low,
        moments.high,
        levels.present_categories,
        levels.num_missing,
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
        for place, occur in enumerate(self.present_categories):
            occur[codes[~missing[:, place], place].astype(np.int64)] = True


class _Moments:
    """Sums in the first pass are of differences from a column's first value, so that nothing is lost to a large common
    part; in the second, squares of differences from the mean."""

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
    """Exact medians by selection on the bits of the values (a radix select).

    Read as whole numbers with the sign flipped, floating numbers keep their order. Each pass counts how often each
    next `DIGIT_BITS` bits occur among the values that begin as the wanted one does, and so settles these bits of it.
    The lower and the upper of the middle two are sought together. Missing values sort behind all others.
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
        places = digits.astype(np.int64)
        places += np.arange(self.columns, dtype=np.int64) << DIGIT_BITS
        for side in range(1 if (self._prefix[0] == self._prefix[1]).all() else 2):
            begins_so = keys >> self._word.type(self._bits - above) == self._prefix[side] if pass_index else None
            found = places.reshape(-1) if begins_so is None else places[begins_so]
            self._counts[side] += np.bincount(found, minlength=self._counts[side].size).reshape(self.columns, -1)

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
        """The medians, float64 (columns,); NaN where there is no value."""
        sign = self._word.type(1 << (self._bits - 1))
        words = np.where(self._prefix & sign, self._prefix ^ sign, ~self._prefix)
        lower, upper = words.view(self.dtype).astype(np.float64)
        # Halved first, for a sum could be too large.
        middle: np.ndarray = np.where(lower == upper, lower, 0.5 * lower + 0.5 * upper)
        return middle

    def _bits_around(self, number: int) -> tuple[int, int]:
        """Bits above and below those of a pass."""
        above = number * DIGIT_BITS
        return above, max(self._bits - above - DIGIT_BITS, 0)

    def _sort_keys(self, values: np.ndarray) -> np.ndarray:
        """Whole numbers in the order of the values, (b, columns)."""
        words = np.ascontiguousarray(values).view(self._word)
        sign = self._word.type(1 << (self._bits - 1))
        keys: np.ndarray = np.where(words & sign, ~words, words | sign)
        keys[np.isnan(values)] = np.iinfo(self._word).max
        return keys
