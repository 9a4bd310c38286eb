"""Exact quantiles of the columns of a table, with linear interpolation as in `numpy.quantile`, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.statistics import iter_blocks

MAX_SORTED_VALUES = 1 << 24
"""Columns of up to this many values in total are sorted in memory; those with more rows are read in several passes."""

DIGIT_BITS = 11
"""Bits of a value that one pass determines: three passes for float32, six for float64."""

MANY_DIGIT_BITS = 8
"""The same if more than `MAX_FEW` quantiles are searched for, for which counters of 11 bits would be too large."""

MAX_FEW = 4


def compute_quantiles(
    inputs: np.ndarray, indices: np.ndarray, columns: np.ndarray, probabilities: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Return the quantiles of columns over some rows, float64 (p, n): NaN is ignored; NaN if a column has no value.

    Parameters
    ----------
    inputs: the matrix (N, width), float32 or float64; may be memory-mapped. Only the columns are read, a group of them
        at a time.
    indices: of the rows to include, int64 (m,), m >= 1.
    columns: of the matrix, int64 (n,), ascending.
    probabilities: from 0 to 1, (p,).
    """
    probabilities = np.asarray(probabilities, np.float64)
    quantiles = np.empty((len(probabilities), len(columns)))
    group_size = max(1, MAX_SORTED_VALUES // len(indices))
    for first in range(0, len(columns), group_size):
        group = columns[first : first + group_size]
        part = inputs[:, group[0] : group[-1] + 1]  # a view: other columns are not copied
        if len(indices) > MAX_SORTED_VALUES:
            found = _select(part, indices, probabilities)
        else:
            values = np.concatenate([block[:, group - group[0]] for block in iter_blocks(part, indices)])
            values.sort(0)  # NaN last
            num_present = np.count_nonzero(~np.isnan(values), axis=0)
            low, high, fraction = _find_ranks(probabilities, num_present)
            lower, upper = (np.take_along_axis(values, ranks, 0) for ranks in (low, high))
            found = _interpolate(lower, upper, fraction)
        quantiles[:, first : first + group_size] = found
    return quantiles


def _select(column: np.ndarray, indices: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the quantiles of a matrix (N, 1) of so many rows that a column is not sorted in memory, (p, 1)."""
    select = QuantileSelect(1, column.dtype, probabilities)
    for pass_index in range(select.num_passes):
        num_present = np.zeros(1, np.int64)
        for values in iter_blocks(column, indices):
            num_present += len(values) - np.isnan(values).sum(0)
            select.update(pass_index, values)
        select.finish_pass(pass_index, num_present)
    return select.compute()


class QuantileSelect:
    """Exact quantiles by a radix select on the bits of the values.

    Floating-point numbers keep their order when their bits are read as integers with the sign flipped. A quantile lies
    between two neighbors in sorted order. Each pass counts how often each value of the next few bits, a digit, occurs
    among the values that share all bits so far with one of these neighbors, and so determines this digit of all of
    them. Values that share them are in one slot: a column is one slot at first, and at most two for each quantile at
    the end. Missing values sort after all others.
    """

    def __init__(self, columns: int, dtype: np.dtype, probabilities: Sequence[float] | np.ndarray) -> None:
        self._probabilities = np.asarray(probabilities, np.float64)
        self._columns, self._dtype = columns, dtype
        self._word = np.dtype(f"u{dtype.itemsize}")
        self._bits = 8 * dtype.itemsize
        self._digit_bits = DIGIT_BITS if len(self._probabilities) <= MAX_FEW else MANY_DIGIT_BITS
        self.num_passes = -(-self._bits // self._digit_bits)
        shape = (2 * len(self._probabilities), columns)
        self._prefixes = np.zeros(shape, self._word)
        self._ranks = np.zeros(shape, np.int64)
        self._slots = np.broadcast_to(np.arange(columns), shape)
        self._next_slots: list[np.ndarray] = []
        self._counts = np.zeros(columns << self._digit_width(0), np.int64)

    def update(self, pass_index: int, values: np.ndarray) -> None:
        """Count the values (b, columns) of a block of rows."""
        keys = self._sort_keys(values).reshape(-1)
        slots = np.tile(np.arange(self._columns), len(values))
        for earlier_pass, next_slots in enumerate(self._next_slots):
            slots = next_slots[(slots << self._digit_width(earlier_pass)) + self._digits(keys, earlier_pass)]
            is_searched = slots >= 0
            keys, slots = keys[is_searched], slots[is_searched]
        counters = (slots << self._digit_width(pass_index)) + self._digits(keys, pass_index)
        self._counts += np.bincount(counters, minlength=len(self._counts))

    def finish_pass(self, pass_index: int, num_present: np.ndarray) -> None:
        """Determine the next digits. num_present: values of each column that are not missing, int64 (columns,)."""
        if pass_index == 0:
            self._ranks[:] = np.concatenate(_find_ranks(self._probabilities, num_present)[:2])
            self._fraction = _find_ranks(self._probabilities, num_present)[2]
        width = self._digit_width(pass_index)
        up_to = np.concatenate([[0], self._counts.cumsum()])
        begins = up_to[self._slots << width]
        counters = np.searchsorted(up_to, begins + self._ranks, side="right") - 1
        self._ranks -= up_to[counters] - begins
        digits = counters - (self._slots << width)
        self._prefixes = (self._prefixes << self._word.type(width)) | digits.astype(self._word)
        distinct, slots = np.unique(counters, return_inverse=True)
        next_slots = np.full(len(self._counts), -1, np.int32)
        next_slots[distinct] = np.arange(len(distinct))
        self._next_slots.append(next_slots)
        self._slots = slots.reshape(counters.shape)
        if pass_index + 1 < self.num_passes:
            self._counts = np.zeros(len(distinct) << self._digit_width(pass_index + 1), np.int64)

    def compute(self) -> np.ndarray:
        """Return the quantiles, float64 (p, columns); NaN where there is no value."""
        sign = self._word.type(1 << (self._bits - 1))
        words = np.where(self._prefixes & sign, self._prefixes ^ sign, ~self._prefixes)
        lower, upper = np.split(words.view(self._dtype), 2)
        return _interpolate(lower, upper, self._fraction)

    def _digit_width(self, pass_index: int) -> int:
        """Return the number of bits that a pass determines."""
        return min(self._digit_bits, self._bits - pass_index * self._digit_bits)

    def _digits(self, keys: np.ndarray, pass_index: int) -> np.ndarray:
        """Return the bits of the keys that a pass determines, int64."""
        above, width = pass_index * self._digit_bits, self._digit_width(pass_index)
        digits = (keys << self._word.type(above)) >> self._word.type(self._bits - width)
        indices: np.ndarray = digits.astype(np.int64)
        return indices

    def _sort_keys(self, values: np.ndarray) -> np.ndarray:
        """Return integers that sort like the values, (b, columns)."""
        words = np.ascontiguousarray(values).view(self._word)
        sign = self._word.type(1 << (self._bits - 1))
        keys: np.ndarray = np.where(words & sign, ~words, words | sign)
        keys[np.isnan(values)] = np.iinfo(self._word).max
        return keys


def _find_ranks(probabilities: np.ndarray, num_present: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ranks of the two neighbors of each quantile in sorted order, int64 (p, n) each, and the fraction of
    the way from the first to the second, float64 (p, n). A column without values has the ranks 0."""
    last = np.maximum(num_present - 1, 0)
    positions = probabilities[:, None] * last
    whole = np.rint(positions)  # a rounding error must not take a value from its equals
    positions = np.where(np.abs(positions - whole) <= 4 * np.spacing(positions), whole, positions)
    low = np.floor(positions).astype(np.int64)
    return low, np.minimum(low + 1, last), positions - low


def _interpolate(lower: np.ndarray, upper: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Return the numbers at fractions of the way from lower to upper, in float64."""
    lower, upper = lower.astype(np.float64), upper.astype(np.float64)
    # Not lower + fraction * (upper - lower): the difference could overflow.
    between: np.ndarray = np.where(lower == upper, lower, (1 - fraction) * lower + fraction * upper)
    return between
