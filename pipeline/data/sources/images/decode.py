"""Decode one image file into pixels of the shape that a job requests."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.config import ImageFolderDataConfig
from pipeline.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

ImageSize = tuple[int, int]
"""Height and width in pixels."""

UNSUPPORTED_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow lists, but passes to external programs or cannot read."""


class InvalidImageError(Exception):
    """A file that is not an image, or is truncated. The message is the reason."""


class ImageTooSmallError(Exception):
    """An image that is smaller than `crop`. The message is its size."""


@dataclass(frozen=True)
class ImageFormat:
    """The format of decoded images: uint8 (C, H, W), RGB or grayscale. See `data.mode`, `resize` and `crop`."""

    mode: Literal["rgb", "grey"] = "rgb"
    resize: int | ImageSize | None = None
    crop: ImageSize | None = None

    @classmethod
    def from_config(cls, data: ImageFolderDataConfig) -> ImageFormat:
        """Return the format of a job.

        Raises
        ------
        DataError: a crop that is larger than the resized image.
        """
        crop = (data.crop, data.crop) if isinstance(data.crop, int) else data.crop
        if crop is not None and isinstance(data.resize, tuple) and not _contains(data.resize, crop):
            raise DataError(
                f"{list(crop)} is larger than resize: {list(data.resize)}", where="data.crop", fix="make it smaller"
            )
        return cls(data.mode, data.resize, crop)

    @property
    def cache_key(self) -> str:
        """The text in keys of the cache. A change of it makes all entries of earlier versions useless."""
        return f"Form(mode={self.mode!r}, resize={self.resize!r}, crop={self.crop!r})"

    @property
    def channels(self) -> int:
        return 3 if self.mode == "rgb" else 1

    @property
    def output_size(self) -> ImageSize | None:
        """The size of every decoded image; None if it depends on the files."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    @property
    def accepts_any_size(self) -> bool:
        """Whether images of any size can be decoded to `output_size`."""
        if isinstance(self.resize, int):
            return self.crop is not None and max(self.crop) <= self.resize
        return self.resize is not None


@cache
def image_extensions() -> frozenset[str]:
    """Return the extensions of image files, such as ".png"."""
    from PIL import Image

    return frozenset(
        extension for extension, name in Image.registered_extensions().items() if name in _supported_formats()
    )


def is_image_path(path: str) -> bool:
    """Return whether a file has the extension of an image."""
    return PurePosixPath(path).suffix.lower() in image_extensions()


def decode_image(content: bytes, image_format: ImageFormat) -> np.ndarray:
    """Decode the content of an image file: uint8 (C, H, W).

    The EXIF orientation is applied. Of an animation the first frame is decoded. As in torchvision, transparency is
    dropped and sizes are rounded. Resizing is bilinear with anti-aliasing; 16 bits become 8.

    Raises
    ------
    InvalidImageError: not an image, a truncated one, or one of more pixels than Pillow considers safe.
    ImageTooSmallError: the image is smaller than the crop.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=_supported_formats()) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise InvalidImageError(f"{image.width:,} x {image.height:,} pixels, which may be an attack on memory")
            converted = _convert_mode(ImageOps.exif_transpose(image), image_format)
    except InvalidImageError:
        raise
    except UnidentifiedImageError:
        raise InvalidImageError(f"not an image format of Pillow; it begins with {content[:8]!r}") from None
    except Exception as error:  # decoders raise all kinds of errors
        raise InvalidImageError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
    cropped = _crop(_resize(converted, image_format.resize), image_format.crop)
    pixels = np.asarray(cropped)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


@contextmanager
def silence_pillow_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings of unusual files: a file that it can read is used, any other one is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


@cache
def _supported_formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(sorted(set(Image.OPEN) - UNSUPPORTED_FORMATS))


def _convert_mode(image: Image.Image, image_format: ImageFormat) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise InvalidImageError("floating-point pixels, which have no known white")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InvalidImageError(f"pixels from {values.min()} to {values.max()}, beyond 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "P":  # the palette may contain transparency
        image = image.convert("RGBA")
    return image.convert("RGB" if image_format.mode == "rgb" else "L")


def _resize(image: Image.Image, size: int | ImageSize | None) -> Image.Image:
    from PIL import Image

    if size is None:
        return image
    if isinstance(size, int):
        short, long = sorted(image.size)
        other = int(size * long / short)
        size = (size, other) if image.width >= image.height else (other, size)
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, size: ImageSize | None) -> Image.Image:
    if size is None:
        return image
    if not _contains((image.height, image.width), size):
        raise ImageTooSmallError(f"{image.height} x {image.width} pixels")
    top, left = (round((whole - part) / 2) for whole, part in zip((image.height, image.width), size, strict=True))
    return image.crop((left, top, left + size[1], top + size[0]))


def _contains(whole: ImageSize, part: ImageSize) -> bool:
    return whole[0] >= part[0] and whole[1] >= part[1]
