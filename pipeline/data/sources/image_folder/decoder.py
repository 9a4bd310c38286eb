"""Pictures of a listing, decoded one at a time or some when they are asked for."""

from __future__ import annotations

import sys

import numpy as np

from pipeline.data.pictures import BrokenPictureError, Form, TooSmallError, decode, quiet
from pipeline.data.sources.digests import changed, reading_threads
from pipeline.data.sources.image_folder.listing import Identified, Listing
from pipeline.errors import DataError, WorkError
from pipeline.storage.read_files import map_in_threads


class Decoder:
    """Decodes single pictures of a listing, of the content that was identified alone.

    shape: (C, H, W) of each; where the job does not decide it, of the first whole picture.
    """

    def __init__(self, listing: Listing, identified: Identified, form: Form) -> None:
        self.listing, self.identified, self._form = listing, identified, form
        self._first: tuple[int, tuple[int, ...]] | None = None
        self.shape: tuple[int, ...] = (form.channels, *(form.size or self._size_of_first()))

    def __call__(self, row: int) -> np.ndarray:
        """One picture, uint8 of `shape`.

        Raises
        ------
        BrokenPictureError: it cannot be decoded.
        DataError: it is of another size, has changed, or is gone.
        """
        picture = self._decode(row)
        if picture.shape != self.shape:
            assert self._first is not None
            actual_size, expected_size = (f"{shape[1]} x {shape[2]}" for shape in (picture.shape, self.shape))
            raise DataError(
                f"{self.name(row)} is {actual_size} pixels, but {self.name(self._first[0])} is {expected_size}",
                where=self.where,
                fix="give them one size, for example data: {resize: [224, 224]}, or {resize: 256, crop: 224}",
            )
        return picture

    def name(self, row: int) -> str:
        return self.listing.paths[row]

    @property
    def where(self) -> str:
        return f"data.url: {self.listing.files.printable}"

    def _decode(self, row: int) -> np.ndarray:
        try:
            content = self.listing.files.read(self.name(row))
            if not self.identified.is_unchanged(row, content):
                raise changed(f"{self.where}, {self.name(row)}")
            return decode(content, self._form)
        except FileNotFoundError:
            raise DataError(f"{self.name(row)} is gone", where=self.where, fix="leave the folder as it is") from None
        except TooSmallError as error:
            raise DataError(
                f"{self.name(row)} is {error}, too small for crop: {self._form.crop}",
                where=self.where,
                fix="resize: enlarges pictures before they are cut",
            ) from None

    def _size_of_first(self) -> tuple[int, ...]:
        reason = ""
        with quiet():
            for row in range(len(self.listing.paths)):
                try:
                    self._first = row, self._decode(row).shape
                except BrokenPictureError as error:
                    reason = reason or str(error)
                else:
                    return self._first[1][1:]
        raise DataError(
            f"none of {len(self.listing.paths):,} pictures can be decoded; {self.name(0)}: {reason}",
            where=self.where,
            fix="see that they are pictures",
        )


class Pictures:
    """Rows that are decoded when they are asked for: uint8 (N, C, H, W), see `data.tensors.RowsOnDemand`."""

    def __init__(self, decoder: Decoder, rows: np.ndarray) -> None:
        self._decoder, self._rows = decoder, rows
        self.shape = (len(rows), *decoder.shape)
        self.dtype = np.dtype(np.uint8)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Some rows, uint8 (b, C, H, W), by as many threads as there are cores; by one in a loader process.

        Raises
        ------
        WorkError: a broken picture.
        """
        files, indices = self._decoder.listing.files, self._rows[rows]
        threads = reading_threads(files.is_remote) if files.is_remote or not _is_in_loader_process() else 1
        decoded = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        with quiet():
            for position, picture in enumerate(map_in_threads(self._decoded, indices.tolist(), threads)):
                decoded[position] = picture
        return decoded

    def _decoded(self, row: int) -> np.ndarray:
        try:
            return self._decoder(row)
        except BrokenPictureError as error:
            raise WorkError(
                f"the picture {self._decoder.name(row)} is broken: {error}",
                where=self._decoder.where,
                fix="replace or delete it; or data: {on_error: skip}",
            ) from None


def _is_in_loader_process() -> bool:
    loaded = sys.modules.get("torch.utils.data")  # who looks at data alone has not imported it
    return loaded is not None and loaded.get_worker_info() is not None
