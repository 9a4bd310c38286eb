"""Sampling of augmentation parameters for a global batch, on the host: they depend only on (seed, step, position)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pipeline.config import AugmentConfig, ColorJitterConfig
from pipeline.data.rng import make_generator, random_permutation, random_uint64

HALF_STEP = 2.0**-54
"""Half the distance between uniform draws of 53 bits: added to them, it excludes 0, which has no logarithm."""


@dataclass(frozen=True, eq=False)
class AugmentParams:
    """Augmentation parameters, one row per sample. What a job does not ask for is None.

    crops: int64 (b, 3): top and left in the padded image, 0 to 2 * crop, and 1 if the image is flipped.
    rotations: float32 (b, 2): cosine and sine of the angle.
    color_factors: float32 (b, 3): of brightness, contrast and saturation.
    """

    crops: Tensor | None = None
    rotations: Tensor | None = None
    color_factors: Tensor | None = None

    def select(self, positions: np.ndarray) -> AugmentParams:
        """Return the parameters at some positions, int64 (n,)."""
        return AugmentParams(*(None if values is None else values[positions] for values in self._values()))

    def to(self, device: torch.device) -> AugmentParams:
        """Copy to a device; the host does not wait for the copy."""
        return AugmentParams(
            *(None if values is None else copy_to_device_async(values, device) for values in self._values())
        )

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


def copy_to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to a device; the host does not wait for the copy."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def sample_params(config: AugmentConfig, seed: int, step: int, num_rows: int) -> AugmentParams:
    """Sample the parameters, except those of mixup, for a global batch of `num_rows` samples."""
    return AugmentParams(
        crops=_sample_crops(config, seed, step, num_rows) if config.crop or config.flip else None,
        rotations=_sample_rotations(config.rotate, seed, step, num_rows) if config.rotate else None,
        color_factors=_sample_color_factors(config.jitter, seed, step, num_rows)
        if config.jitter != ColorJitterConfig()
        else None,
    )


def _sample_crops(config: AugmentConfig, seed: int, step: int, num_rows: int) -> Tensor:
    raw = random_uint64(make_generator(seed, "augment", step), num_rows)
    num_offsets = np.uint64(2 * config.crop + 1)
    crops = np.empty((num_rows, 3), dtype=np.int64)
    # Each column uses separate bits; k * num_offsets >> 24 maps 24 random bits k to the offsets.
    crops[:, 0] = (raw >> np.uint64(40)) * num_offsets >> np.uint64(24)
    crops[:, 1] = (raw >> np.uint64(16) & np.uint64(0xFFFFFF)) * num_offsets >> np.uint64(24)
    crops[:, 2] = raw & np.uint64(1) if config.flip else 0
    return torch.from_numpy(crops)


def _sample_rotations(degrees: float, seed: int, step: int, num_rows: int) -> Tensor:
    angles = np.deg2rad(degrees) * (2 * _sample_uniform(seed, "augment rotate", step, num_rows, 1)[:, 0] - 1)
    return torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32))


def _sample_color_factors(jitter: ColorJitterConfig, seed: int, step: int, num_rows: int) -> Tensor:
    ranges = np.array([jitter.brightness, jitter.contrast, jitter.saturation])
    factors = 1 + ranges * (2 * _sample_uniform(seed, "augment jitter", step, num_rows, 3) - 1)
    return torch.from_numpy(factors.astype(np.float32))


def sample_mixup_permutation(seed: int, step: int, num_rows: int) -> np.ndarray:
    """Sample the partner that each sample of a global batch is mixed with: a permutation, int64 (num_rows,)."""
    return random_permutation(make_generator(seed, "augment partners", step), num_rows)


def sample_mixup_lambda(alpha: float, seed: int, step: int, num_rows: int) -> np.ndarray:
    """Sample the weight of each sample in its mixture: Beta(alpha, alpha), float64 (num_rows,).

    Each is computed from four uniform numbers, without rejection, so that a position's draw depends only on that
    position's random words. With G, H ~ Gamma(a + 1) and uniform U, V, both G U^(1/a) and H V^(1/a) are Gamma(a)
    (Marsaglia and Tsang 2000), and the first divided by their sum is Beta(a, a). That needs only the ratio of G and H,
    which follows from a draw (1 + x) / 2 of Beta(a + 1, a + 1): x = cos(2 pi W) sqrt(1 - Z^(2 / (2 a + 1))), Ulrich's
    polar method (Devroye 1986, chapter IX). Computed in logits, since for a small alpha the values exceed the range of
    floats.
    """
    u, v, w, z = _sample_uniform(seed, "augment shares", step, num_rows, 4).T
    x = np.cos(2 * np.pi * w) * np.sqrt(1 - z ** (2 / (2 * alpha + 1)))
    logit = 2 * np.arctanh(np.clip(x, -1 + 2 * HALF_STEP, 1 - 2 * HALF_STEP)) + (np.log(u) - np.log(v)) / alpha
    lam: np.ndarray = (1 + np.tanh(logit / 2)) / 2
    return lam


def _sample_uniform(seed: int, stream: str, step: int, num_rows: int, num_columns: int) -> np.ndarray:
    """Sample uniformly from (0, 1], float64 (num_rows, num_columns)."""
    raw = random_uint64(make_generator(seed, stream, step), num_rows * num_columns).reshape(num_rows, num_columns)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 + HALF_STEP
