"""Pictures of a listing, decoded one at a time or some when they are asked for."""

from __future__ import annotations

import sys

import numpy as np

from pipeline.data.pictures import (
    ImageFormat,
    ImageTooSmallError,
    InvalidImageError,
    decode_image,
    silence_pillow_warnings,
)
from pipeline.data.sources.digests import changed_file_error, select_num_read_threads
from pipeline.data.sources.image_folder.listing import ImageDigests, ImageListing
from pipeline.errors import DataError, WorkError
from pipeline.storage.read_files import map_in_threads


class ImageDecoder:
    """Decodes single pictures of a listing, of the content that was identified alone.

    shape: (C, H, W) of each; where the job does not decide it, of the first whole picture.
    """

    def __init__(self, listing: ImageListing, digests: ImageDigests, image_format: ImageFormat) -> None:
        self.listing, self.digests, self._image_format = listing, digests, image_format
        self._first: tuple[int, tuple[int, ...]] | None = None
        self.shape: tuple[int, ...] = (image_format.channels, *(image_format.output_size or self._find_first_size()))

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
                f"{self.path_of(row)} is {actual_size} pixels, but {self.path_of(self._first[0])} is {expected_size}",
                where=self.where,
                fix="give them one size, for example data: {resize: [224, 224]}, or {resize: 256, crop: 224}",
            )
        return picture

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
            raise DataError(f"{self.path_of(row)} is gone", where=self.where, fix="leave the folder as it is") from None
        except ImageTooSmallError as error:
            raise DataError(
                f"{self.path_of(row)} is {error}, too small for crop: {self._image_format.crop}",
                where=self.where,
                fix="resize: enlarges pictures before they are cut",
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
            f"none of {len(self.listing.paths):,} pictures can be decoded; {self.path_of(0)}: {reason}",
            where=self.where,
            fix="see that they are pictures",
        )


class LazyImages:
    """Rows that are decoded when they are asked for: uint8 (N, C, H, W), see `data.tensors.RowsOnDemand`."""

    def __init__(self, decoder: ImageDecoder, rows: np.ndarray) -> None:
        self._decoder, self._indices = decoder, rows
        self.shape = (len(rows), *decoder.shape)
        self.dtype = np.dtype(np.uint8)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Some rows, uint8 (b, C, H, W), by as many threads as there are cores; by one in a loader process.

        Raises
        ------
        WorkError: a broken picture.
        """
        files, indices = self._decoder.listing.reader, self._indices[rows]
        threads = select_num_read_threads(files.is_remote) if files.is_remote or not _is_in_loader_process() else 1
        decoded = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        with silence_pillow_warnings():
            for position, picture in enumerate(map_in_threads(self._decode, indices.tolist(), threads)):
                decoded[position] = picture
        return decoded

    def _decode(self, row: int) -> np.ndarray:
        try:
            return self._decoder(row)
        except InvalidImageError as error:
            raise WorkError(
                f"the picture {self._decoder.path_of(row)} is broken: {error}",
                where=self._decoder.where,
                fix="replace or delete it; or data: {on_error: skip}",
            ) from None


def _is_in_loader_process() -> bool:
    loaded = sys.modules.get("torch.utils.data")  # who looks at data alone has not imported it
    return loaded is not None and loaded.get_worker_info() is not None
