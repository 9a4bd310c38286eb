"""What is drawn for a global batch, on the host: functions of (seed, step, position in the batch) alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pipeline.data.random import generator, permutation, words
from pipeline.job import Augment, Jitter

HALF_STEP = 2.0**-54
"""Half the distance of uniform draws of 53 bits: added, it keeps them off 0, which has no logarithm."""


@dataclass(frozen=True, eq=False)
class Draws:
    """The draws of some samples, one row each. What a job does not ask for is not drawn, and None.

    windows: int64 (b, 3): top and left in the padded image, 0 to 2 crop, and 1 where it is mirrored.
    turns: float32 (b, 2): cosine and sine of the angle.
    factors: float32 (b, 3): of brightness, contrast and saturation.
    """

    windows: Tensor | None = None
    turns: Tensor | None = None
    factors: Tensor | None = None

    def of(self, positions: np.ndarray) -> Draws:
        """The draws at some positions, int64 (n,)."""
        return Draws(*(None if values is None else values[positions] for values in self._all()))

    def to(self, device: torch.device) -> Draws:
        """On a device; the host does not wait for the copy."""
        return Draws(*(None if values is None else sent(values, device) for values in self._all()))

    def _all(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device, without the host waiting for it."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def draw(spec: Augment, seed: int, step: int, rows: int) -> Draws:
    """The changes of one global batch of so many rows, but for mixup."""
    return Draws(
        windows=_windows(spec, seed, step, rows) if spec.crop or spec.flip else None,
        turns=_turns(spec.rotate, seed, step, rows) if spec.rotate else None,
        factors=_factors(spec.jitter, seed, step, rows) if spec.jitter != Jitter() else None,
    )


def _windows(spec: Augment, seed: int, step: int, rows: int) -> Tensor:
    raw = words(generator(seed, "augment", step), rows)
    num_offsets = np.uint64(2 * spec.crop + 1)
    crops = np.empty((rows, 3), dtype=np.int64)
    # Each takes bits of its own; k * windows >> 24 spreads 24 random bits k over the windows.
    crops[:, 0] = (raw >> np.uint64(40)) * num_offsets >> np.uint64(24)
    crops[:, 1] = (raw >> np.uint64(16) & np.uint64(0xFFFFFF)) * num_offsets >> np.uint64(24)
    crops[:, 2] = raw & np.uint64(1) if spec.flip else 0
    return torch.from_numpy(crops)


def _turns(degrees: float, seed: int, step: int, rows: int) -> Tensor:
    angles = np.deg2rad(degrees) * (2 * _uniforms(seed, "augment rotate", step, rows, 1)[:, 0] - 1)
    return torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32))


def _factors(jitter: Jitter, seed: int, step: int, rows: int) -> Tensor:
    ranges = np.array([jitter.brightness, jitter.contrast, jitter.saturation])
    factors = 1 + ranges * (2 * _uniforms(seed, "augment jitter", step, rows, 3) - 1)
    return torch.from_numpy(factors.astype(np.float32))


def draw_partners(seed: int, step: int, rows: int) -> np.ndarray:
    """With whom each sample of a global batch is mixed: a random order of its positions, int64 (rows,)."""
    return permutation(generator(seed, "augment partners", step), rows)


def draw_shares(alpha: float, seed: int, step: int, rows: int) -> np.ndarray:
    """The share that each sample keeps of itself: Beta(alpha, alpha), float64 (rows,), from four uniforms each.

    Without rejection, so that a position's draw is a function of that position's words. With G, H ~ Gamma(a + 1) and
    uniform U, V: G U^(1/a) and H V^(1/a) are Gamma(a) (Marsaglia and Tsang 2000), and the first's part of their sum is
    Beta(a, a). That needs only the ratio of G and H, which a draw (1 + x) / 2 of Beta(a + 1, a + 1) gives:
    x = cos(2 pi W) sqrt(1 - Z^(2 / (2 a + 1))), Ulrich's polar method (Devroye 1986, chapter IX). In logits, since a
    small alpha leaves the range of floats.
    """
    u, v, w, z = _uniforms(seed, "augment shares", step, rows, 4).T
    x = np.cos(2 * np.pi * w) * np.sqrt(1 - z ** (2 / (2 * alpha + 1)))
    logit = 2 * np.arctanh(np.clip(x, -1 + 2 * HALF_STEP, 1 - 2 * HALF_STEP)) + (np.log(u) - np.log(v)) / alpha
    lam: np.ndarray = (1 + np.tanh(logit / 2)) / 2
    return lam


def _uniforms(seed: int, stream: str, step: int, rows: int, columns: int) -> np.ndarray:
    """Uniform over (0, 1], float64 (rows, columns)."""
    raw = words(generator(seed, stream, step), rows * columns).reshape(rows, columns)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 + HALF_STEP
