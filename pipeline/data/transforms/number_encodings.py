"""Encodings of numbers beyond (x - mean) / std: robust scaling, quantiles, and piecewise-linear bins.

Each works on columns (B, n) and is monotone in every number. A number that is constant in training becomes 0, for any
new value: no weight could be learned for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.config import JobConfig, MlpConfig
from pipeline.data.transforms.quantiles import compute_quantiles

EncodingKind = Literal["robust", "quantile", "piecewise"]

ENCODING_KINDS: tuple[EncodingKind, ...] = get_args(EncodingKind)

MAX_QUANTILES = 1000
"""Quantiles of `normalize: quantile`; with fewer training rows, one for each row (as in scikit-learn)."""

MAX_BINS = 32
"""Bins of `numeric_embedding: piecewise`."""

QUARTILES = (0.25, 0.5, 0.75)

MAX_NORMAL = 5.199337582605575
"""The largest number of `normalize: quantile`: the quantile of 1 - 1e-7 of the normal distribution, as in scikit-learn.
The smallest is its negative."""

SMOOTH_CLIP = 3.0
"""Limit of the smooth clipping of `normalize: robust`."""

MAX_SCALED = 1e15
"""Scaled numbers are cut off here: smoothly clipped, they are at the limit in every floating-point type; their squares
must not overflow."""

Knots = tuple[tuple[float, ...], ...]
"""For each number, ascending positions: its quantiles, or the edges of its bins."""


def select_encoding(job: JobConfig) -> EncodingKind | None:
    """Return the encoding of numbers that a job asks for; None for (x - mean) / std. Bins replace a normalization."""
    if isinstance(job.model, MlpConfig) and job.model.numeric_embedding == "piecewise":
        return "piecewise"
    normalize = job.data.normalize
    return normalize if normalize == "robust" or normalize == "quantile" else None


def compute_robust_scale(
    first_quartile: np.ndarray, third_quartile: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Return the scales of `normalize: robust`, float64 (n,) (arXiv 2407.04491, as its authors' code computes them).

    It is the interquartile range; where this is 0, half the range; 0 for a constant, which then stays 0.
    """
    scale = third_quartile - first_quartile
    scale = np.where(scale > 0, scale, 0.5 * high - 0.5 * low)
    return np.where(np.isnan(scale), 0.0, scale)


def compute_knots(
    encoding: EncodingKind, inputs: np.ndarray, indices: np.ndarray, columns: np.ndarray, fill: np.ndarray
) -> Knots:
    """Return the knots of columns of a matrix over the training rows, by `compute_quantiles`; empty for `robust`.

    quantile: up to `MAX_QUANTILES` quantiles. piecewise: the distinct ones of `MAX_BINS` + 1 quantiles, of which each
    two neighbors are the ends of a bin. A column without values has its fill value, float64 (n,), as the only knot.
    """
    if encoding == "robust" or not len(columns):
        return ()
    count = min(MAX_QUANTILES, len(indices)) if encoding == "quantile" else MAX_BINS + 1
    quantiles = compute_quantiles(inputs, indices, columns, np.linspace(0, 1, count))
    quantiles = np.maximum.accumulate(quantiles)  # rounding of the interpolation
    knots = []
    for column, fill_value in zip(quantiles.T, fill, strict=True):
        values = [fill_value] if np.isnan(column).any() else column.tolist()
        is_needed = encoding == "quantile" and values[0] < values[-1]
        knots.append(tuple(map(float, values if is_needed else sorted(set(values)))))
    return tuple(knots)


def count_outputs(encoding: EncodingKind | None, num_numbers: int, knots: Knots) -> int:
    """Return how many numbers the encoding of `num_numbers` numbers consists of."""
    return sum(max(1, len(edges) - 1) for edges in knots) if encoding == "piecewise" else num_numbers


def check_knots(encoding: EncodingKind | None, num_numbers: int, knots: Knots) -> None:
    """Raise ValueError if stored knots do not belong to so many numbers."""
    if len(knots) != (num_numbers if encoding in ("quantile", "piecewise") else 0):
        raise ValueError(f"{len(knots)} sets of knots for {num_numbers} numbers")
    for values in knots:
        if not values or not np.isfinite(values).all() or (np.diff(values) < 0).any():
            raise ValueError("knots that are not ascending numbers")
    if encoding == "quantile" and len({len(values) for values in knots} - {1}) > 1:
        raise ValueError("columns with different numbers of quantiles")


def make_encoding_fn(
    encoding: EncodingKind,
    fill: Sequence[float],
    center: Sequence[float],
    scale: Sequence[float],
    knots: Knots,
    device: torch.device,
    work: torch.dtype,
) -> Callable[[Tensor], Tensor]:
    """Return a function from numbers (B, n) of type `work` on `device`, NaN if missing, to their encoding (B, m).

    Parameters
    ----------
    fill: replacements of missing numbers, (n,).
    center, scale: of each number, (n,): for `robust`, what it is shifted and divided by (a scale of 0 gives 0);
        for the others, any number near its values.
    """
    # Columns far from zero keep their digits only if a number near their values is subtracted first.
    exact_center = torch.tensor(center, dtype=torch.float64)
    shift = exact_center.to(work)
    filled = (torch.tensor(fill, dtype=torch.float64) - shift.double()).to(device, work)
    if encoding == "robust":
        encode = _make_robust_fn(exact_center - shift.double(), scale, device, work)
    else:
        shifted_knots = [np.array(values) - near for values, near in zip(knots, shift.tolist(), strict=True)]
        make_fn = _make_quantile_fn if encoding == "quantile" else _make_piecewise_fn
        encode = make_fn(shifted_knots, device, work)
    shift = shift.to(device)

    def transform(values: Tensor) -> Tensor:
        shifted = values - shift
        return encode(torch.where(shifted.isnan(), filled, shifted))

    return transform


def _make_robust_fn(
    offset: Tensor, scale: Sequence[float], device: torch.device, work: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return z / sqrt(1 + (z / 3)^2) of z = (x - offset) / scale (arXiv 2407.04491): nearly z for small z, below 3."""
    with np.errstate(divide="ignore", over="ignore"):
        scales = np.array(scale, np.float64)
        factor = torch.from_numpy(np.where(scales > 0, 1 / scales, 0.0))
    factor = factor.clamp(max=torch.finfo(work).max).to(device, work)
    offset = offset.to(device, work)

    def encode(shifted: Tensor) -> Tensor:
        scaled = ((shifted - offset) * factor).clamp_(-MAX_SCALED, MAX_SCALED)
        return scaled / (scaled / SMOOTH_CLIP).square_().add_(1).sqrt_()

    return encode


def _make_quantile_fn(
    knots: Sequence[np.ndarray], device: torch.device, work: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the normal quantile of a number's position among the quantiles of its column, as scikit-learn's
    `QuantileTransformer(output_distribution="normal")` computes it: linear between two quantiles, the middle of equal
    ones, and at the limits from the outermost on."""
    count = max((len(values) for values in knots), default=1)
    table = torch.from_numpy(np.stack([np.resize(values, count) for values in knots])).to(device, work)
    is_constant = table[:, :1] == table[:, -1:]
    last = max(count - 1, 1)
    first_equal = torch.searchsorted(table, table)  # for each quantile, the index of the first that equals it

    def encode(shifted: Tensor) -> Tensor:
        values = shifted.t().contiguous()
        up_to = torch.searchsorted(table, values, right=True)
        index = (up_to - 1).clamp_(min=0)
        lower, upper = table.gather(1, index), table.gather(1, up_to.clamp(max=count - 1))
        below = torch.where(lower == values, first_equal.gather(1, index), up_to)
        width = upper - lower
        # Distances from both ends: near the upper end, 1 - position would lose the digits that matter.
        is_between = below == up_to
        from_low = torch.where(is_between, below - 1 + (values - lower) / width, (below + up_to - 1) / 2) / last
        from_high = torch.where(
            is_between, count - 1 - below + (upper - values) / width, count - (below + up_to + 1) / 2
        )
        from_high = from_high / last
        normal = torch.where(
            from_low < 0.5, torch.special.ndtri(from_low.clamp(0, 1)), -torch.special.ndtri(from_high.clamp(0, 1))
        )
        normal = torch.where(values <= table[:, :1], -MAX_NORMAL, normal)
        normal = torch.where(values >= table[:, -1:], MAX_NORMAL, normal).clamp_(-MAX_NORMAL, MAX_NORMAL)
        return normal.masked_fill_(is_constant, 0.0).t()

    return encode


def _make_piecewise_fn(
    knots: Sequence[np.ndarray], device: torch.device, work: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the piecewise-linear encoding of arXiv 2203.05556, equation 1: for each bin 0 below it, 1 above it, and
    the fraction of its width inside it; the first bin goes on below, and the last above."""
    owners, starts, factors, low, high = [], [], [], [], []
    for number, edges in enumerate(knots):
        bins = max(1, len(edges) - 1)
        owners += [number] * bins
        starts.append(edges[:bins])
        with np.errstate(over="ignore", divide="ignore"):
            factors.append(1 / np.diff(edges) if len(edges) > 1 else np.zeros(1))
        low.append(np.r_[-MAX_SCALED, np.zeros(bins - 1)])
        high.append(np.r_[np.ones(bins - 1), MAX_SCALED])
    columns = torch.tensor(owners, device=device)
    largest = torch.finfo(work).max
    start, factor, lowest, highest = (
        torch.from_numpy(np.concatenate(parts)).clamp(-largest, largest).to(device, work)
        for parts in (starts, factors, low, high)
    )

    def encode(shifted: Tensor) -> Tensor:
        fractions = (shifted.index_select(1, columns) - start).mul_(factor)
        return fractions.clamp_(lowest, highest)

    return encode
