"""Decode the images of a listing: all of them, into memory or the cache, or each on demand."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import PIL

from pipeline.config import ImageFolderDataConfig
from pipeline.data.cache import get_or_build, has_room_for
from pipeline.data.sources.file_digests import changed_file_error, select_num_read_threads
from pipeline.data.sources.images.decode import (
    ImageFormat,
    ImageTooSmallError,
    InvalidImageError,
    decode_image,
    silence_pillow_warnings,
)
from pipeline.data.sources.images.listing import ImageDigests, ImageListing, ThrottledProgress, missing_file_error
from pipeline.errors import DataError, WorkError
from pipeline.events import ProgressFn
from pipeline.storage.read_files import map_in_threads
from pipeline.watchdog import note_progress

if TYPE_CHECKING:
    from torch import Tensor

IMAGES_PER_BLOCK = 16
"""Number of images that a loader process decodes per task."""

PIXELS_FILE = "pixels.npy"
INVALID_IMAGES_FILE = "broken.json"

INVALID_LIST_BYTES = 1 << 12
"""Approximate size of a list of broken images in the cache."""

InvalidImages = dict[int, str]
"""The rows of broken images, each with the reason."""


def decode_all(
    listing: ImageListing, digests: ImageDigests, data: ImageFolderDataConfig, on_progress: ProgressFn
) -> tuple[np.ndarray | LazyImages, np.ndarray, tuple[str, ...]]:
    """Decode the images of a listing.

    They are stored in memory if `data.cache.in_memory_mb` allows; else memory-mapped from the cache if they fit into
    it; else they are decoded on demand. The pixels are the same.

    Returns
    -------
    The images, uint8 (n, C, H, W); their rows in the listing, int64 (n,); and warnings of skipped images.

    Raises
    ------
    DataError: broken images (with `on_error: skip`, more of them than allowed), different sizes, or files that change.
    """
    image_format, count = ImageFormat.from_config(data), len(listing.paths)
    decoder = ImageDecoder(listing, digests, image_format)
    size = count * math.prod(decoder.shape)
    key = f"{digests.fingerprint} {image_format.cache_key} {data.on_error} Pillow {PIL.__version__}"
    decode_pass = _DecodePass(decoder, data, on_progress)
    broken: InvalidImages = {}
    images: np.ndarray | None = None
    if size <= data.cache.in_memory_mb * 1e6:
        images, filled = np.empty((count, *decoder.shape), dtype=np.uint8), 0
        for image in decode_pass.decode_valid(broken):
            images[filled] = image
            filled += 1
        images = images[:filled]
    elif has_room_for(data.cache, size + INVALID_LIST_BYTES):
        entry = get_or_build(data.cache, _digest(key), decode_pass.write_images, size_bytes=size + INVALID_LIST_BYTES)
        images, broken = entry.map_array(PIXELS_FILE), _read_invalid(entry.folder)
    elif data.on_error == "skip" or not image_format.accepts_any_size:
        list_key = _digest(f"broken of {key}")
        entry = get_or_build(data.cache, list_key, decode_pass.write_invalid, size_bytes=INVALID_LIST_BYTES)
        broken = _read_invalid(entry.folder)
    decode_pass.check_broken_fraction(broken)
    rows = np.setdiff1d(np.arange(count, dtype=np.int64), np.array(list(broken), dtype=np.int64))
    return LazyImages(decoder, rows) if images is None else images, rows, decode_pass.format_warnings(broken)


class LazyImages:
    """Images that are decoded when they are indexed: uint8 (N, C, H, W), see `data.device_transfer.LazyArray`."""

    def __init__(self, decoder: ImageDecoder, rows: np.ndarray) -> None:
        self._decoder, self._rows = decoder, rows
        self.shape = (len(rows), *decoder.shape)
        self.dtype = np.dtype(np.uint8)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: np.ndarray | slice) -> np.ndarray:
        """Decode some images, uint8 (b, C, H, W), with one thread per core; in a loader process with one thread.

        Raises
        ------
        WorkError: a broken image.
        """
        reader, rows = self._decoder.listing.reader, self._rows[indices]
        threads = select_num_read_threads(reader.is_remote) if reader.is_remote or not _is_in_loader_process() else 1
        images = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        with silence_pillow_warnings():
            for position, image in enumerate(map_in_threads(self._decode, rows.tolist(), threads)):
                images[position] = image
        return images

    def _decode(self, row: int) -> np.ndarray:
        try:
            return self._decoder(row)
        except InvalidImageError as error:
            raise WorkError(
                f"the image {self._decoder.path_of(row)} is broken: {error}",
                where=self._decoder.where,
                fix="replace or delete it; or data: {on_error: skip}",
            ) from None


class ImageDecoder:
    """Decodes single images of a listing, after a check that their content has the digest of the listing.

    shape: (C, H, W) of every image; if the job does not set the size, that of the first valid image.
    """

    def __init__(self, listing: ImageListing, digests: ImageDigests, image_format: ImageFormat) -> None:
        self.listing, self.digests, self._image_format = listing, digests, image_format
        self._first: tuple[int, tuple[int, ...]] | None = None
        self.shape: tuple[int, ...] = (image_format.channels, *(image_format.output_size or self._find_first_size()))

    def __call__(self, row: int) -> np.ndarray:
        """Decode one image, uint8 of `shape`.

        Raises
        ------
        InvalidImageError: it cannot be decoded.
        DataError: it has another size, has changed, or no longer exists.
        """
        image = self._decode(row)
        if image.shape != self.shape:
            assert self._first is not None
            actual_size, expected_size = (f"{shape[1]} x {shape[2]}" for shape in (image.shape, self.shape))
            raise DataError(
                f"{self.path_of(row)} is {actual_size} pixels, but {self.path_of(self._first[0])} is {expected_size}",
                where=self.where,
                fix="resize them to one size, for example data: {resize: [224, 224]}, or {resize: 256, crop: 224}",
            )
        return image

    def path_of(self, row: int) -> str:
        return self.listing.paths[row]

    @property
    def where(self) -> str:
        return f"data.url: {self.listing.reader.printable}"

    def _decode(self, row: int) -> np.ndarray:
        try:
            content = self.listing.reader.read(self.path_of(row))
            if not self.digests.is_unchanged(row, content):
                raise changed_file_error(f"{self.where}, {self.path_of(row)}")
            return decode_image(content, self._image_format)
        except FileNotFoundError:
            raise missing_file_error(self.listing, row) from None
        except ImageTooSmallError as error:
            raise DataError(
                f"{self.path_of(row)} is {error}, too small for crop: {self._image_format.crop}",
                where=self.where,
                fix="set resize to enlarge images before they are cropped",
            ) from None

    def _find_first_size(self) -> tuple[int, ...]:
        reason = ""
        with silence_pillow_warnings():
            for row in range(len(self.listing.paths)):
                try:
                    self._first = row, self._decode(row).shape
                except InvalidImageError as error:
                    reason = reason or str(error)
                else:
                    return self._first[1][1:]
        raise DataError(
            f"none of {len(self.listing.paths):,} images can be decoded; {self.path_of(0)}: {reason}",
            where=self.where,
            fix="check that the files are images",
        )


class _DecodePass:
    """One pass over all images of a listing."""

    def __init__(self, decoder: ImageDecoder, data: ImageFolderDataConfig, on_progress: ProgressFn) -> None:
        self._decoder, self._data, self._on_progress = decoder, data, on_progress
        self._count = len(decoder.listing.paths)

    def decode_valid(self, broken: InvalidImages) -> Iterator[np.ndarray]:
        """Yield the images that can be decoded, in order, and add the others to `broken`.

        Raises
        ------
        DataError: after the last image, if more are broken than the job allows.
        """
        progress = ThrottledProgress("decoding", self._count, self._on_progress)
        for row, result in enumerate(self._iter_results()):
            progress(row + 1)
            if isinstance(result, str):
                broken[row] = result
            elif not broken or self._data.on_error == "skip":
                yield result
        self._decoder.digests.verify()
        self.check_broken_fraction(broken)

    def write_images(self, folder: Path) -> None:
        """Write all images that can be decoded, and the list of the broken ones."""
        broken: InvalidImages = {}
        shape, filled = self._decoder.shape, 0
        with (folder / PIXELS_FILE).open("wb") as file:
            header = _write_header(file, (self._count, *shape))
            for image in self.decode_valid(broken):
                file.write(image.data)
                filled += 1
            file.seek(0)
            assert _write_header(file, (filled, *shape)) == header, "NumPy leaves room for the number of rows to grow"
        _write_invalid(folder, broken)

    def write_invalid(self, folder: Path) -> None:
        """Write only the list of the broken images."""
        broken: InvalidImages = {}
        for _ in self.decode_valid(broken):
            pass
        _write_invalid(folder, broken)

    def check_broken_fraction(self, broken: InvalidImages) -> None:
        """Raise DataError for more broken images than the job allows."""
        skips = self._data.on_error == "skip"
        if len(broken) <= (self._data.skip_up_to * self._count if skips else 0):
            return
        row, reason = next(iter(broken.items()))
        allowed = f"; skip_up_to allows {self._data.skip_up_to:.2%}" if skips else ""
        raise DataError(
            f"{len(broken):,} of {self._count:,} images are broken{allowed}. The first is "
            f"{self._decoder.path_of(row)}: {reason}",
            where=self._decoder.where,
            fix="replace or delete them; or data: {on_error: skip, skip_up_to: 0.05}",
        )

    def format_warnings(self, broken: InvalidImages) -> tuple[str, ...]:
        if not broken:
            return ()
        paths = ", ".join(self._decoder.path_of(row) for row in list(broken)[:10])
        more = ", ..." if len(broken) > 10 else ""
        return (f"{len(broken):,} of {self._count:,} images are broken and skipped: {paths}{more}",)

    def _iter_results(self) -> Iterator[np.ndarray | str]:
        """Yield for every row the image, or the reason why it is broken."""
        processes = self._data.loader.processes
        with silence_pillow_warnings():
            if not processes:
                threads = select_num_read_threads(self._decoder.listing.reader.is_remote)
                yield from map_in_threads(self._decode_or_reason, range(self._count), threads)
                return
            from pipeline.data.loader_workers import map_in_processes

            blocks = [
                range(first, min(first + IMAGES_PER_BLOCK, self._count))
                for first in range(0, self._count, IMAGES_PER_BLOCK)
            ]
            for block in map_in_processes(self._decode_block, blocks, processes):
                note_progress()
                yield from (result if isinstance(result, str) else result.numpy() for result in block)

    def _decode_block(self, rows: Sequence[int]) -> list[Tensor | str]:
        """Decode images to tensors, which are sent between processes without a copy."""
        import torch

        threads = select_num_read_threads(True) if self._decoder.listing.reader.is_remote else 1
        results = map_in_threads(self._decode_or_reason, rows, threads)
        return [result if isinstance(result, str) else torch.from_numpy(result) for result in results]

    def _decode_or_reason(self, row: int) -> np.ndarray | str:
        try:
            return self._decoder(row)
        except InvalidImageError as error:
            return str(error)


def _is_in_loader_process() -> bool:
    torch_data = sys.modules.get("torch.utils.data")  # not imported where data is only inspected
    return torch_data is not None and torch_data.get_worker_info() is not None


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    """Write NumPy's header of a uint8 array, and return its length."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _write_invalid(folder: Path, broken: InvalidImages) -> None:
    (folder / INVALID_IMAGES_FILE).write_text(json.dumps(broken))


def _read_invalid(folder: Path) -> InvalidImages:
    return {int(row): reason for row, reason in json.loads((folder / INVALID_IMAGES_FILE).read_text()).items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
