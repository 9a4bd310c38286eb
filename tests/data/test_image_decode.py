"""Decoding of single images of all modes, formats and sizes."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipeline.config import ImageFolderDataConfig
from pipeline.data.sources.images.decode import (
    ImageFormat,
    ImageTooSmallError,
    InvalidImageError,
    decode_image,
    image_extensions,
    silence_pillow_warnings,
)
from pipeline.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (12, 9, 4), dtype=np.uint8)


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_rgb_image(height: int = 12, width: int = 9) -> Image.Image:
    return Image.fromarray(np.resize(NOISE[:, :, :3], (height, width, 3)))


MODES = {
    **dict.fromkeys(["RGB", "RGBA", "L", "LA", "1"], "PNG"),
    **dict.fromkeys(["CMYK", "YCbCr"], "JPEG"),
    "P": "GIF",
    "PA": "TIFF",
}
"""Pixel modes, each with a file format that supports it."""


def make_image(mode: str) -> Image.Image:
    """Make an image of noise, with transparency if the mode has it."""
    image = Image.fromarray(NOISE)
    if mode == "RGBA":
        return image
    return (
        image.convert("RGB").convert("L").convert(mode) if mode in ("LA", "PA") else image.convert("RGB").convert(mode)
    )


@pytest.mark.parametrize("mode", MODES)
def test_image_modes(mode: str) -> None:
    content = encode_image(make_image(mode), MODES[mode])
    with Image.open(io.BytesIO(content)) as stored:
        expected = {"rgb": np.asarray(stored.convert("RGB")), "grey": np.asarray(stored.convert("RGB").convert("L"))}
    for image_format in (ImageFormat(), ImageFormat("grey")):
        image = decode_image(content, image_format)
        assert image.dtype == np.uint8
        assert image.shape == (image_format.channels, 12, 9)
        assert image.flags.c_contiguous
        close = np.abs(image.astype(int) - np.atleast_3d(expected[image_format.mode]).transpose(2, 0, 1))
        assert close.max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_images(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    image = decode_image(encode_image(Image.fromarray(values), kind), ImageFormat())
    assert image.tolist() == [[[0, 0, 1, 1, 128, 255]]] * 3


@pytest.mark.parametrize("values", [np.array([[0, 70_000]], np.int32), np.array([[0.0, 1.0]], np.float32)])
def test_pixels_without_a_known_maximum_are_rejected(values: np.ndarray) -> None:
    with pytest.raises(InvalidImageError, match=r"beyond 16 bits|no known white"):
        decode_image(encode_image(Image.fromarray(values), "TIFF"), ImageFormat())


def test_transparency_of_a_palette_is_dropped() -> None:
    image = make_rgb_image().convert("P")
    content = encode_image(image, "PNG", transparency=bytes([0, 128] * 128))
    assert np.array_equal(decode_image(content, ImageFormat()), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[0:4, 0:8] = 255  # bright at the top left
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    sideways = upright.transpose(1, 0, 2)
    stored |= {5: sideways, 6: sideways[::-1], 7: sideways[::-1, ::-1], 8: sideways[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode_image(Image.fromarray(np.ascontiguousarray(stored[orientation])), "PNG", exif=exif)
    assert np.array_equal(decode_image(content, ImageFormat()), upright.transpose(2, 0, 1))


def test_first_frame_of_an_animation_is_decoded() -> None:
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    content = encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content, ImageFormat()).tolist() == [[[255] * 5] * 4, [[0] * 5] * 4, [[0] * 5] * 4]


@pytest.mark.parametrize("size", [(31, 47), (47, 31), (40, 40), (10, 60)])
@pytest.mark.parametrize(
    ("resize", "crop"),
    [(16, None), ((14, 22), None), (16, (16, 11)), (None, (9, 8)), ((30, 30), (7, 30)), (50, (50, 50))],
)
def test_resize_and_crop_match_torchvision(
    size: tuple[int, int], resize: int | tuple[int, int] | None, crop: tuple[int, int] | None
) -> None:
    image = make_rgb_image(*size)
    expected = image
    if resize is not None:
        expected = v2.Resize(resize, antialias=True)(expected)
    if crop is not None:
        expected = v2.CenterCrop(crop)(expected)
    decoded = decode_image(encode_image(image), ImageFormat(resize=resize, crop=crop))
    assert torch.equal(torch.from_numpy(decoded), v2.functional.pil_to_tensor(expected))
    assert ImageFormat(resize=resize, crop=crop).output_size in (decoded.shape[1:], None)


def test_output_size_of_formats() -> None:
    for resize, crop, size, accepts_any_size in [
        (None, None, None, False),
        (16, None, None, False),
        (16, (16, 9), (16, 9), True),
        (16, (16, 17), (16, 17), False),
        (None, (8, 8), (8, 8), False),
        ((9, 8), None, (9, 8), True),
        ((9, 8), (9, 1), (9, 1), True),
    ]:
        image_format = ImageFormat(resize=resize, crop=crop)
        assert (image_format.output_size, image_format.accepts_any_size) == (size, accepts_any_size)


def test_cache_key_does_not_change_between_versions() -> None:
    assert ImageFormat().cache_key == "Form(mode='rgb', resize=None, crop=None)"
    assert ImageFormat("grey", (20, 17), (5, 6)).cache_key == "Form(mode='grey', resize=(20, 17), crop=(5, 6))"


def test_too_large_crops_are_rejected() -> None:
    with pytest.raises(ImageTooSmallError, match="12 x 9 pixels"):
        decode_image(encode_image(make_rgb_image()), ImageFormat(crop=(12, 10)))
    data = ImageFolderDataConfig.model_validate({"source": "image_folder", "url": "x", "resize": [8, 20], "crop": 10})
    with pytest.raises(DataError, match=r"data\.crop"):
        ImageFormat.from_config(data)


def make_broken_images() -> dict[str, bytes]:
    whole, jpeg = encode_image(make_rgb_image(64, 64)), encode_image(make_rgb_image(64, 64), "JPEG")
    return {
        "empty": b"",
        "text": b"This is not an image.",
        "page": b"<html><body>404</body></html>",
        "cut png": whole[: len(whole) // 2],
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "flipped": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "header": whole[:20],
        "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }


@pytest.mark.parametrize("name", make_broken_images())
def test_broken_files_are_rejected(name: str) -> None:
    with pytest.raises(InvalidImageError):
        decode_image(make_broken_images()[name], ImageFormat())


@pytest.mark.parametrize("factor", [1, 3])
def test_decompression_bombs_are_rejected(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow itself warns of the smaller excess, and raises for the larger.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 9 * 10 // 10 - 1 if factor == 1 else 12 * 9 // factor)
    with silence_pillow_warnings(), pytest.raises(InvalidImageError, match="pixels"):
        decode_image(encode_image(make_rgb_image()), ImageFormat())


def test_pillow_warnings_are_suppressed() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"  # has fewer entries than it declares
    content = encode_image(make_rgb_image(), "JPEG", exif=exif)
    with silence_pillow_warnings():
        assert decode_image(content, ImageFormat()).shape == (3, 12, 9)
        with pytest.raises(UserWarning):
            warnings.warn("not from Pillow", stacklevel=1)


def test_image_extensions() -> None:
    assert {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".webp"} <= image_extensions()
    assert not {".eps", ".pdf", ".txt", ".npy", ".parquet", ".h5"} & image_extensions()
