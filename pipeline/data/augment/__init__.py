"""Random changes of training images: drawn for the whole global batch on the host, applied on the device.

Windows (crop and flip), then turns, then colours, then mixup. What is drawn is a function of (seed, step, position in
the global batch) alone, so the ranks' shares of a changed batch, one after another, are the changed batch.
"""

from __future__ import annotations

from pipeline.data.augment.changes import augmented
from pipeline.data.augment.drawing import Draws, draw, draw_partners, draw_shares, sent
from pipeline.data.augment.mixing import Mix, needed
from pipeline.errors import DataError
from pipeline.job import Augment, Jitter

__all__ = [
    "is_wanted",
    "check_images",
    "Draws",
    "draw",
    "augmented",
    "draw_partners",
    "draw_shares",
    "needed",
    "Mix",
    "sent",
]

IMAGE_AXES = (2, 3)
"""Axes of a sample that is an image: (H, W) or (C, H, W)."""

COLOURS = (1, 3)
"""Channels of an image whose colours can be changed: grey, or red, green and blue."""


def is_wanted(spec: Augment) -> bool:
    """Whether a job asks for any of it."""
    return spec.crop > 0 or spec.flip or spec.rotate > 0 or spec.jitter != Jitter() or spec.mixup > 0


def check_images(spec: Augment, sample_shape: tuple[int, ...]) -> None:
    """Raise DataError for samples that are no images, or not of the colours that jitter needs."""
    if len(sample_shape) not in IMAGE_AXES:
        raise DataError(
            f"augmentation is for images, but a sample here has the shape {sample_shape}",
            where="data.augment",
            fix="leave it out",
        )
    channels = sample_shape[0] if len(sample_shape) == 3 else 1
    if spec.jitter != Jitter() and channels not in COLOURS:
        raise DataError(
            f"colours are changed in images of 1 or 3 channels, but here are {channels}",
            where="data.augment.jitter",
            fix="leave it out",
        )
