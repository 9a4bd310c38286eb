"""Means and deviations of the training rows, exact in float64, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_VALUES = 1 << 20
"""Values looked at at once: a few MB in float64."""


def mean_and_std(inputs: np.ndarray, rows: np.ndarray, *, per_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation over rows, each float64 (C,) or (1,).

    Parameters
    ----------
    inputs: uint8 or floating (N, C, ...).
    rows: positions of the rows that count, int64 (n,), n >= 1.
    per_channel: one for each index of axis 1, over all others; else one over all values.

    Constant channels have a deviation of exactly 0.
    """
    values = inputs if per_channel else inputs.reshape(len(inputs), 1, -1)
    if values.dtype == np.uint8:
        return _of_bytes(values, rows)
    return _of_floats(values, rows)


def _of_bytes(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From how often each of the 256 values occurs: sums of whole numbers, without any rounding."""
    counts = np.zeros((values.shape[1], 256), dtype=np.int64)
    for block in _blocks(values, rows):
        for channel in range(len(counts)):
            counts[channel] += np.bincount(block[:, channel].reshape(-1), minlength=256)
    levels, count = np.arange(256), int(counts[0].sum())
    sums, squares = counts @ levels, counts @ levels**2
    variances = [(count * int(q) - int(s) ** 2) / count**2 for s, q in zip(sums, squares, strict=True)]
    return sums / count, np.sqrt(variances)


def _of_floats(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two passes. Sums are of differences from the first row, so that nothing is lost to a large common part."""
    axes = (0, *range(2, values.ndim))
    pilot = values[rows[0]].reshape(values.shape[1], -1)[:, 0].astype(np.float64)
    pilot = pilot.reshape(-1, *[1] * (values.ndim - 2))
    count = len(rows) * int(np.prod(values.shape[2:], dtype=np.int64))
    shift = sum((block - pilot).sum(axes) for block in _blocks(values, rows)) / count
    mean = pilot + shift.reshape(pilot.shape)
    variance = sum(np.square(block - mean).sum(axes) for block in _blocks(values, rows)) / count
    return mean.reshape(-1), np.sqrt(variance)


def _blocks(values: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows that count, some at a time: (b, C, ...) of the values' type."""
    size = max(1, BLOCK_VALUES // max(1, int(np.prod(values.shape[1:], dtype=np.int64))))
    for first in range(0, len(rows), size):
        yield values[rows[first : first + size]]
