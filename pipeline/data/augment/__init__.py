"""Augmentation of training images: parameters are sampled for the whole global batch on the host, and applied on the
device.

The order is crop and flip, rotation, color jitter, mixup. The parameters depend only on (seed, step, position in the
global batch), so the ranks' shares of an augmented batch, in the order of ranks, are the augmented batch.
"""

from __future__ import annotations

from pipeline.config import AugmentConfig, ColorJitterConfig
from pipeline.data.augment.mixup import MixupParams, required_positions
from pipeline.data.augment.sampling import (
    AugmentParams,
    copy_to_device_async,
    sample_mixup_lambda,
    sample_mixup_permutation,
    sample_params,
)
from pipeline.data.augment.transforms import apply_augment
from pipeline.errors import DataError

__all__ = [
    "is_enabled",
    "check_images",
    "AugmentParams",
    "sample_params",
    "apply_augment",
    "sample_mixup_permutation",
    "sample_mixup_lambda",
    "required_positions",
    "MixupParams",
    "copy_to_device_async",
]

IMAGE_NDIMS = (2, 3)
"""Axes of a sample that is an image: (H, W) or (C, H, W)."""

COLOR_CHANNELS = (1, 3)
"""Channels of an image that color jitter supports: gray, or red, green and blue."""


def is_enabled(config: AugmentConfig) -> bool:
    """Return whether a job asks for any augmentation."""
    return (
        config.crop > 0 or config.flip or config.rotate > 0 or config.jitter != ColorJitterConfig() or config.mixup > 0
    )


def check_images(config: AugmentConfig, sample_shape: tuple[int, ...]) -> None:
    """Raise DataError if samples are not images, or do not have the channels that color jitter needs."""
    if len(sample_shape) not in IMAGE_NDIMS:
        raise DataError(
            f"augmentation is for images, but a sample has the shape {sample_shape}",
            where="data.augment",
            fix="leave it out",
        )
    channels = sample_shape[0] if len(sample_shape) == 3 else 1
    if config.jitter != ColorJitterConfig() and channels not in COLOR_CHANNELS:
        raise DataError(
            f"color jitter needs images of 1 or 3 channels, but these have {channels}",
            where="data.augment.jitter",
            fix="leave it out",
        )
