"""All pictures of a listing: decoded into memory or the cache, or checked and left where they are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import PIL

from pipeline.data.cache import cached, fits
from pipeline.data.pictures import BrokenPictureError, Form, quiet
from pipeline.data.sources.digests import Say, reading_threads
from pipeline.data.sources.image_folder.decoder import Decoder, Pictures
from pipeline.data.sources.image_folder.listing import Identified, Listing, Progress
from pipeline.errors import DataError
from pipeline.job import ImageFolderDataConfig
from pipeline.storage.read_files import map_in_threads
from pipeline.watchdog import note_progress

if TYPE_CHECKING:  # imported where processes decode: who asks for the fingerprint alone needs none of it
    from torch import Tensor

BLOCK = 16
"""Pictures that a loader process decodes at once."""

PIXELS = "pixels.npy"
BROKEN = "broken.json"

LIST_BYTES = 1 << 12
"""What a list of broken pictures takes in the cache, roughly."""

Broken = dict[int, str]
"""Rows of broken pictures, and why they are so."""


def decoded(
    listing: Listing, identified: Identified, data: ImageFolderDataConfig, say: Say
) -> tuple[np.ndarray | Pictures, np.ndarray, tuple[str, ...]]:
    """The pictures, uint8 (n, C, H, W); their rows in the listing, int64 (n,); and warnings of what was left out.

    In memory, where `data.cache.in_memory_mb` allows; else memory-mapped from the cache, where they fit into it; else
    decoded when they are asked for. The bytes are the same.

    Raises
    ------
    DataError: broken pictures, with `on_error: skip` more of them than allowed; different sizes; pictures that change.
    """
    image_format, count = Form.of(data), len(listing.paths)
    decoder = Decoder(listing, identified, image_format)
    size = count * math.prod(decoder.shape)
    key = f"{identified.fingerprint} {image_format} {data.on_error} Pillow {PIL.__version__}"
    run = _Run(decoder, data, say)
    broken: Broken = {}
    images: np.ndarray | None = None
    if size <= data.cache.in_memory_mb * 1e6:
        images, filled = np.empty((count, *decoder.shape), dtype=np.uint8), 0
        for picture in run.whole(broken):
            images[filled] = picture
            filled += 1
        images = images[:filled]
    elif fits(data.cache, size + LIST_BYTES):
        entry = cached(data.cache, _digest(key), run.fill, size=size + LIST_BYTES)
        images, broken = entry.map(PIXELS), _read(entry.folder)
    elif data.on_error == "skip" or not image_format.suits_all:
        entry = cached(data.cache, _digest(f"broken of {key}"), run.check, size=LIST_BYTES)
        broken = _read(entry.folder)
    run.judge(broken)
    rows = np.setdiff1d(np.arange(count, dtype=np.int64), np.array(list(broken), dtype=np.int64))
    return Pictures(decoder, rows) if images is None else images, rows, run.warnings(broken)


class _Run:
    """One pass over all pictures."""

    def __init__(self, decoder: Decoder, data: ImageFolderDataConfig, say: Say) -> None:
        self._decoder, self._data, self._say = decoder, data, say
        self._count = len(decoder.listing.paths)

    def whole(self, broken: Broken) -> Iterator[np.ndarray]:
        """The pictures that can be decoded, in order; the others are noted.

        Raises
        ------
        DataError: after the last, if any was broken and none may be.
        """
        progress = Progress("decoding", self._count, self._say)
        for row, result in enumerate(self._results()):
            progress(row + 1)
            if isinstance(result, str):
                broken[row] = result
            elif not broken or self._data.on_error == "skip":
                yield result
        self._decoder.identified.verify()
        self.judge(broken)

    def fill(self, folder: Path) -> None:
        """Write all that can be decoded."""
        broken: Broken = {}
        shape, filled = self._decoder.shape, 0
        with (folder / PIXELS).open("wb") as file:
            header = _write_header(file, (self._count, *shape))
            for picture in self.whole(broken):
                file.write(picture.data)
                filled += 1
            file.seek(0)
            assert _write_header(file, (filled, *shape)) == header, "NumPy leaves room for the number of rows to grow"
        _write(folder, broken)

    def check(self, folder: Path) -> None:
        """Write which are broken."""
        broken: Broken = {}
        for _ in self.whole(broken):
            pass
        _write(folder, broken)

    def judge(self, broken: Broken) -> None:
        """Raise DataError for more broken pictures than the job allows."""
        skips = self._data.on_error == "skip"
        if len(broken) <= (self._data.skip_up_to * self._count if skips else 0):
            return
        row, reason = next(iter(broken.items()))
        allowed = f"; skip_up_to allows {self._data.skip_up_to:.2%}" if skips else ""
        raise DataError(
            f"{len(broken):,} of {self._count:,} pictures are broken{allowed}. The first is {self._decoder.name(row)}: "
            f"{reason}",
            where=self._decoder.where,
            fix="replace or delete them; or data: {on_error: skip, skip_up_to: 0.05}",
        )

    def warnings(self, broken: Broken) -> tuple[str, ...]:
        if not broken:
            return ()
        named = ", ".join(self._decoder.name(row) for row in list(broken)[:10])
        more = ", ..." if len(broken) > 10 else ""
        return (f"{len(broken):,} of {self._count:,} pictures are broken and left out: {named}{more}",)

    def _results(self) -> Iterator[np.ndarray | str]:
        """A picture, or why there is none, for every row."""
        processes = self._data.loader.processes
        with quiet():
            if not processes:
                threads = reading_threads(self._decoder.listing.files.is_remote)
                yield from map_in_threads(self._result, range(self._count), threads)
                return
            from pipeline.data.processes import made

            blocks = [range(first, min(first + BLOCK, self._count)) for first in range(0, self._count, BLOCK)]
            for block in made(self._block, blocks, processes):
                note_progress()
                yield from (result if isinstance(result, str) else result.numpy() for result in block)

    def _block(self, rows: Sequence[int]) -> list[Tensor | str]:
        """As tensors, which go from process to process without a copy."""
        import torch

        files = self._decoder.listing.files
        results = map_in_threads(self._result, rows, reading_threads(True) if files.is_remote else 1)
        return [result if isinstance(result, str) else torch.from_numpy(result) for result in results]

    def _result(self, row: int) -> np.ndarray | str:
        try:
            return self._decoder(row)
        except BrokenPictureError as error:
            return str(error)


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    """NumPy's own for uint8; returns where it ends."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _write(folder: Path, broken: Broken) -> None:
    (folder / BROKEN).write_text(json.dumps(broken))


def _read(folder: Path) -> Broken:
    return {int(row): reason for row, reason in json.loads((folder / BROKEN).read_text()).items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
