"""Means and standard deviations of the training rows in float64, computed a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.watchdog import note_progress

BLOCK_VALUES = 1 << 20
"""Values that are processed at once: a few MB in float64."""


def compute_mean_and_std(
    inputs: np.ndarray, indices: np.ndarray, *, per_channel: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean and the population standard deviation over rows, each float64 (C,) or (1,).

    Parameters
    ----------
    inputs: uint8 or floating (N, H, W), one channel, or (N, C, ...). Read a block of rows at a time.
    indices: of the rows to include, int64 (n,), n >= 1.
    per_channel: one for each index of axis 1, over all other axes; else one over all values.

    Constant channels have a standard deviation of exactly 0.
    """
    channels = inputs.shape[1] if per_channel and inputs.ndim != 3 else 1
    return (_uint8_mean_and_std if inputs.dtype == np.uint8 else _float_mean_and_std)(inputs, indices, channels)


def _uint8_mean_and_std(inputs: np.ndarray, indices: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute from the counts of the 256 values: sums of integers, without rounding."""
    counts = np.zeros((channels, 256), dtype=np.int64)
    for block in iter_blocks(inputs, indices):
        values = block.reshape(len(block), channels, -1)
        for channel in range(channels):
            counts[channel] += np.bincount(values[:, channel].reshape(-1), minlength=256)
    pixel_values, count = np.arange(256), int(counts[0].sum())
    sums, squares = counts @ pixel_values, counts @ pixel_values**2
    variances = [(count * int(q) - int(s) ** 2) / count**2 for s, q in zip(sums, squares, strict=True)]
    return sums / count, np.sqrt(variances)


def _float_mean_and_std(inputs: np.ndarray, indices: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute in two passes. Differences from the first row are summed, so that a large common part costs no digits."""

    def blocks() -> Iterator[np.ndarray]:
        return (block.reshape(len(block), channels, -1) for block in iter_blocks(inputs, indices))

    pilot = np.asarray(inputs[indices[:1]]).reshape(channels, -1)[:, :1].astype(np.float64)
    count = len(indices) * int(np.prod(inputs.shape[1:], dtype=np.int64)) // channels
    shift = sum((values - pilot).sum((0, 2)) for values in blocks()) / count
    mean = pilot + shift.reshape(pilot.shape)
    variance = sum(np.square(values - mean).sum((0, 2)) for values in blocks()) / count
    return mean.reshape(-1), np.sqrt(variance)


def compute_min_and_max(inputs: np.ndarray, indices: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the minimum and maximum of each column (F,) of floating inputs (N, F) over some rows (n,), n >= 1."""
    bounds = [(block.min(0), block.max(0)) for block in iter_blocks(inputs, indices)]
    low, high = (np.stack(values) for values in zip(*bounds, strict=True))
    return tuple(low.min(0).tolist()), tuple(high.max(0).tolist())


def iter_blocks(inputs: np.ndarray, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the given rows in blocks: (b, ...) of the inputs' type, each of at most about `BLOCK_VALUES` values."""
    size = max(1, BLOCK_VALUES // max(1, int(np.prod(inputs.shape[1:], dtype=np.int64))))
    for first in range(0, len(indices), size):
        yield inputs[indices[first : first + size]]
        note_progress()
