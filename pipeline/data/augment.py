"""Crops and flips of training images: drawn for the whole global batch on the host, applied on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from pipeline.data.random import generator, words
from pipeline.errors import DataError
from pipeline.job import Augment

IMAGE_AXES = (2, 3)
"""Axes of a sample that is an image: (H, W) or (C, H, W)."""


def is_wanted(spec: Augment) -> bool:
    """Whether a job asks for any of it."""
    return spec.crop > 0 or spec.flip


def check_images(sample_shape: tuple[int, ...]) -> None:
    """Raise DataError for samples that are no images."""
    if len(sample_shape) not in IMAGE_AXES:
        raise DataError(
            f"augmentation is for images, but a sample here has the shape {sample_shape}",
            where="data.augment",
            fix="leave it out",
        )


def draw(spec: Augment, seed: int, step: int, rows: int) -> np.ndarray:
    """The draws of one global batch: int64 (rows, 3).

    Each row holds the top and left of its window in the padded image, 0 to 2 crop, and 1 where it is mirrored.
    A function of (seed, step, position in the batch) alone.
    """
    raw = words(generator(seed, "augment", step), rows)
    windows = np.uint64(2 * spec.crop + 1)
    draws = np.empty((rows, 3), dtype=np.int64)
    # Each takes bits of its own; k * windows >> 24 spreads 24 random bits k over the windows.
    draws[:, 0] = (raw >> np.uint64(40)) * windows >> np.uint64(24)
    draws[:, 1] = (raw >> np.uint64(16) & np.uint64(0xFFFFFF)) * windows >> np.uint64(24)
    draws[:, 2] = raw & np.uint64(1) if spec.flip else 0
    return draws


def augmented(spec: Augment, images: Tensor, draws: Tensor) -> Tensor:
    """Images (B, H, W) or (B, C, H, W) of any type, changed as drawn: (B, 3) int64 on the same device.

    What lies outside an image is 0, in raw units. One gather for all, without a loop over samples.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (spec.crop,) * 4) if spec.crop else images
    top, left, mirrored = draws.unbind(1)
    across = torch.arange(width, device=images.device)
    columns = torch.where(mirrored.bool()[:, None], across.flip(0), across) + left[:, None]
    lines = torch.arange(height, device=images.device) + top[:, None]
    places = (lines[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)
    flat = padded.flatten(-2)
    if images.ndim == 4:
        places = places[:, None].expand(-1, images.shape[1], -1)
    return flat.gather(-1, places).view(images.shape)
