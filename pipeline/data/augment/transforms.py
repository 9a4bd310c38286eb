"""Crops, flips, rotations and color jitter of whole batches on the device, with given parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from pipeline.config import AugmentConfig, ColorJitterConfig
from pipeline.data.augment.sampling import AugmentParams
from pipeline.data.transforms.arrays import UINT8_MAX

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray, the same as torchvision's."""

GRAY_STEPS = 2.0**24
"""Gray values are summed as integer multiples of 1 / GRAY_STEPS."""


def apply_augment(config: AugmentConfig, images: Tensor, params: AugmentParams) -> Tensor:
    """Augment images (b, H, W) or (b, C, H, W) of raw values: crop and flip, then rotation, then color jitter.

    uint8 images stay uint8 if they are only cropped or flipped, else become float32 in [0, 255]. Pixels outside an
    image are 0, in raw units. There is no loop over samples, and no sample depends on the rest of its batch, to the
    last bit.
    """
    max_value = UINT8_MAX if images.dtype == torch.uint8 else None
    if params.crops is not None:
        images = _crop_and_flip(images, params.crops, config.crop)
    if params.rotations is not None:
        images = _rotate(images, params.rotations)
    if params.color_factors is not None:
        images = _jitter_color(images, params.color_factors, config.jitter, max_value)
    return images


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32; floating-point images unchanged."""
    return images if images.is_floating_point() else images.float()


def _crop_and_flip(images: Tensor, crops: Tensor, crop: int) -> Tensor:
    """Crop the padded images and flip some of them, with one gather."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (crop,) * 4) if crop else images
    top, left, is_flipped = crops.unbind(1)
    across = torch.arange(width, device=images.device)
    columns = torch.where(is_flipped.bool()[:, None], across.flip(0), across) + left[:, None]
    rows = torch.arange(height, device=images.device) + top[:, None]
    pixel_indices = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)
    flat = padded.flatten(-2)
    if images.ndim == 4:
        pixel_indices = pixel_indices[:, None].expand(-1, images.shape[1], -1)
    return flat.gather(-1, pixel_indices).view(images.shape)


def _rotate(images: Tensor, rotations: Tensor) -> Tensor:
    """Rotate images around their center, counter-clockwise for a positive sine, with bilinear interpolation."""
    images = to_float(images)
    height, width = images.shape[-2:]
    cosine, sine = rotations.to(images.dtype)[:, :, None, None].unbind(1)
    across, down = (
        torch.arange(size, device=images.device, dtype=images.dtype) - (size - 1) / 2 for size in (width, height)
    )
    # The source of each pixel in the coordinates of grid_sample, which go from -1 to 1 between the edges of an image.
    from_across = (cosine * across[None, None] - sine * down[None, :, None]) * (2 / width)
    from_down = (sine * across[None, None] + cosine * down[None, :, None]) * (2 / height)
    grid = torch.stack([from_across, from_down], -1)
    with_channels = images if images.ndim == 4 else images[:, None]
    rotated = F.grid_sample(with_channels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rotated.view(images.shape)


def _jitter_color(images: Tensor, factors: Tensor, jitter: ColorJitterConfig, max_value: float | None) -> Tensor:
    """Change brightness, contrast and saturation as torchvision does; clamp to [0, max_value] after each, if given.

    With contrast 0 the result is the mean of the gray image, with saturation 0 the gray image. Saturation does not
    change gray images.
    """
    images = to_float(images)
    with_channels = images if images.ndim == 4 else images[:, None]
    brightness, contrast, saturation = factors.to(images.dtype)[:, :, None, None, None].unbind(1)
    if jitter.brightness:
        with_channels = _clamp(with_channels * brightness, max_value)
    if jitter.contrast:
        with_channels = _clamp(
            with_channels * contrast + _image_mean(_to_grayscale(with_channels)) * (1 - contrast), max_value
        )
    if jitter.saturation and with_channels.shape[1] == len(LUMA):
        with_channels = _clamp(with_channels * saturation + _to_grayscale(with_channels) * (1 - saturation), max_value)
    return with_channels.view(images.shape)


def _to_grayscale(images: Tensor) -> Tensor:
    """Convert (b, C, H, W) to (b, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def _image_mean(images: Tensor) -> Tensor:
    """Return the mean of each image: (b, 1, 1, 1). Integers are summed: a float sum would depend on the batch size."""
    total = (images * GRAY_STEPS).to(torch.int64).sum((1, 2, 3), keepdim=True)
    return total.to(images.dtype) / (GRAY_STEPS * images[0].numel() if len(images) else 1.0)


def _clamp(images: Tensor, max_value: float | None) -> Tensor:
    """Clamp in place: callers pass new tensors."""
    return images if max_value is None else images.clamp_(0.0, max_value)
