"""Pictures: a folder for each class, or a table of paths and labels, at any fsspec URL."""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np

from pipeline.config import ImageFolderDataConfig, JobConfig
from pipeline.data.dataset import Dataset, DatasetPart, SplitColumn
from pipeline.data.sources.file_digests import ProgressFn
from pipeline.data.sources.images.dataset import decode_all
from pipeline.data.sources.images.listing import ImageDigests, ImageListing, check_images_exist, list_images

__all__ = ["fingerprint_image_folder", "open_image_folder"]


def open_image_folder(job: JobConfig, on_progress: ProgressFn) -> Dataset:
    """The pictures that a job names, all as uint8 (N, C, H, W); without a test set of their own.

    `data.url` is a folder: each folder in it is a class, rows in the order of their paths. Or a Parquet file: rows as
    stored, paths in `data.path`, labels in `data.label`. What `data.on_error: skip` leaves out is no row.

    Inputs are an array, memory-mapped or not, or `RowsOnDemand`, see `decoding.decoded`.

    Parameters
    ----------
    say: takes word of the progress, at most once a second.

    Raises
    ------
    DataError: no pictures, broken ones, ones of different sizes, or labels that cannot be used.
    StorageError: a URL that cannot be used, or not be read.
    """
    assert isinstance(job.data, ImageFolderDataConfig), "a job with source: image_folder"
    listing = _list_existing_images(job)
    digests = ImageDigests(listing, job.data.cache, on_progress)
    images, rows, warnings = decode_all(listing, digests, job.data, on_progress)
    digest = digests.fingerprint
    left_out = np.setdiff1d(np.arange(len(listing.paths)), rows)
    if len(left_out):  # what this machine's Pillow could not read is part of what is learnt
        digest = hashlib.sha256(f"{digest} without {left_out.tolist()}".encode()).hexdigest()
    return Dataset(
        train=DatasetPart(cast(np.ndarray, images), listing.targets[rows]),
        test=None,
        classes=(),
        fingerprint=digest,
        label_names=listing.label_names,
        split_columns={
            name: SplitColumn(column.values[rows], column.value_names, column.is_time)
            for name, column in listing.split_columns.items()
        },
        warnings=(*digests.warnings, *warnings),
    )


def fingerprint_image_folder(job: JobConfig, on_progress: ProgressFn) -> str:
    """That of `open_image_folder`. Nothing is decoded, unless `data.on_error: skip` makes what is broken count and no
    earlier start has left in the cache what that is.

    Raises
    ------
    DataError, StorageError: as `open_image_folder`.
    """
    if isinstance(job.data, ImageFolderDataConfig) and job.data.on_error == "skip":
        return open_image_folder(job, on_progress).fingerprint
    return ImageDigests(_list_existing_images(job), job.data.cache, on_progress).fingerprint


def _list_existing_images(job: JobConfig) -> ImageListing:
    listing = list_images(job)
    check_images_exist(listing)
    return listing
