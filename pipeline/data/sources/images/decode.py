"""One picture: from the content of a file to bytes of the shape that a job asks for."""

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
"""What Pillow names, but hands to programs of others or cannot read."""


class InvalidImageError(Exception):
    """A file that is no picture, or not a whole one. Its text says why."""


class ImageTooSmallError(Exception):
    """A picture that `crop` does not fit into. Its text says how large it is."""


@dataclass(frozen=True)
class ImageFormat:
    """What pictures become: uint8 (C, H, W), grey or red, green and blue. See `data.mode`, `resize` and `crop`."""

    mode: Literal["rgb", "grey"] = "rgb"
    resize: int | ImageSize | None = None
    crop: ImageSize | None = None

    @classmethod
    def from_config(cls, data: ImageFolderDataConfig) -> ImageFormat:
        """What a job asks for.

        Raises
        ------
        DataError: a crop that is larger than what is resized to.
        """
        crop = (data.crop, data.crop) if isinstance(data.crop, int) else data.crop
        form = cls(data.mode, data.resize, crop)
        if crop is not None and isinstance(data.resize, tuple) and not _contains(data.resize, crop):
            raise DataError(
                f"{list(crop)} is larger than resize: {list(data.resize)}", where="data.crop", fix="make it smaller"
            )
        return form

    @property
    def channels(self) -> int:
        return 3 if self.mode == "rgb" else 1

    @property
    def output_size(self) -> ImageSize | None:
        """What every picture comes to, where the job decides that."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    @property
    def accepts_any_size(self) -> bool:
        """Whether any whole picture comes to that size."""
        if isinstance(self.resize, int):
            return self.crop is not None and max(self.crop) <= self.resize
        return self.resize is not None


@cache
def image_extensions() -> frozenset[str]:
    """How the names of files end that may be pictures, such as ".png"."""
    from PIL import Image

    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in _supported_formats())


def is_image_path(path: str) -> bool:
    """Whether a file may be an image by its extension."""
    return PurePosixPath(path).suffix.lower() in image_extensions()


def decode_image(content: bytes, image_format: ImageFormat) -> np.ndarray:
    """The picture in a file's content: uint8 (C, H, W).

    It is turned as its EXIF orientation says; of an animation it is the first frame. Transparency is dropped and
    sizes are rounded as torchvision does. Resizing is bilinear with anti-aliasing; 16 bits become 8.

    Raises
    ------
    BrokenPictureError: no picture, not whole, or of more pixels than Pillow takes for harmless.
    TooSmallError: the crop does not fit into it.
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
        raise InvalidImageError(f"no picture that Pillow knows; it begins with {content[:8]!r}") from None
    except Exception as error:  # decoders raise whatever they stumble over
        raise InvalidImageError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
    cropped = _crop(_resize(converted, image_format.resize), image_format.crop)
    pixels = np.asarray(cropped)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


@contextmanager
def silence_pillow_warnings() -> Iterator[None]:
    """Without Pillow's remarks on odd files: what it can read counts, and what it cannot is an error here."""
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
    if image.mode == "P":  # its transparency may lie in the palette
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
