"""Images as a source: a folder for each class, or a table of paths and labels, at any fsspec URL."""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np

from pipeline.config import ImageFolderDataConfig, JobConfig
from pipeline.data.dataset import Dataset, DatasetPart, SplitColumn
from pipeline.data.sources.images.dataset import decode_all
from pipeline.data.sources.images.listing import ImageDigests, ImageListing, check_images_exist, list_images
from pipeline.events import ProgressFn

__all__ = ["fingerprint_image_folder", "open_image_folder"]


def open_image_folder(job: JobConfig, on_progress: ProgressFn, *, float64: bool) -> Dataset:
    """Open the images of a job as uint8 (N, C, H, W), so that `float64` makes no difference; without a test set.

    If `data.url` is a folder, each folder in it is a class, and the samples are sorted by path. If it is a Parquet
    file, the samples are its rows in order, with paths in `data.path` and labels in `data.label`. Images that
    `data.on_error: skip` skips are not part of the dataset.

    Inputs are an array, memory-mapped or not, or `LazyImages`, see `images.dataset.decode_all`.

    Parameters
    ----------
    on_progress: called with a progress message, at most once a second.

    Raises
    ------
    DataError: no images, broken images, images of different sizes, or unusable labels.
    StorageError: a URL that is invalid or cannot be read.
    """
    assert isinstance(job.data, ImageFolderDataConfig), "a job with source: image_folder"
    listing = _list_existing_images(job)
    digests = ImageDigests(listing, job.data.cache, on_progress)
    images, rows, warnings = decode_all(listing, digests, job.data, on_progress)
    digest = digests.fingerprint
    skipped = np.setdiff1d(np.arange(len(listing.paths)), rows)
    if len(skipped):  # which images are skipped, which depends on the version of Pillow, affects the training
        digest = hashlib.sha256(f"{digest} without {skipped.tolist()}".encode()).hexdigest()
    return Dataset(
        train=DatasetPart(cast(np.ndarray, images), listing.targets[rows]),
        test=None,
        classes=(),
        fingerprint=digest,
        label_names=listing.label_names,
        has_boolean_labels=listing.has_boolean_labels,
        split_columns={
            name: SplitColumn(column.values[rows], column.value_names, column.is_time)
            for name, column in listing.split_columns.items()
        },
        warnings=(*digests.warnings, *warnings),
    )


def fingerprint_image_folder(job: JobConfig, on_progress: ProgressFn) -> str:
    """Return the fingerprint that `open_image_folder` gives.

    No image is decoded, unless `data.on_error` is `skip` and the list of broken images is not cached yet.

    Raises
    ------
    DataError, StorageError: as `open_image_folder`.
    """
    if isinstance(job.data, ImageFolderDataConfig) and job.data.on_error == "skip":
        return open_image_folder(job, on_progress, float64=False).fingerprint
    return ImageDigests(_list_existing_images(job), job.data.cache, on_progress).fingerprint


def _list_existing_images(job: JobConfig) -> ImageListing:
    listing = list_images(job)
    check_images_exist(listing)
    return listing
