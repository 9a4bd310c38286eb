"""Pictures: a folder for each class, or a table of paths and labels, at any fsspec URL."""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np

from pipeline.data.sources.arrays import Arrays, Source, SplitColumn
from pipeline.data.sources.digests import Say
from pipeline.data.sources.image_folder.decoding import decoded
from pipeline.data.sources.image_folder.listing import Identified, Listing, check_present, listed
from pipeline.job import ImageFolderDataConfig, Job

__all__ = ["image_folder_fingerprint", "open_image_folder"]


def open_image_folder(job: Job, say: Say) -> Source:
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
    listing = _present(job)
    digests = Identified(listing, job.data.cache, say)
    images, rows, warnings = decoded(listing, digests, job.data, say)
    digest = digests.fingerprint
    left_out = np.setdiff1d(np.arange(len(listing.paths)), rows)
    if len(left_out):  # what this machine's Pillow could not read is part of what is learnt
        digest = hashlib.sha256(f"{digest} without {left_out.tolist()}".encode()).hexdigest()
    return Source(
        train=Arrays(cast(np.ndarray, images), listing.targets[rows]),
        test=None,
        classes=(),
        fingerprint=digest,
        label_names=listing.label_names,
        columns={
            name: SplitColumn(column.values[rows], column.names, column.is_time)
            for name, column in listing.columns.items()
        },
        warnings=(*digests.warnings, *warnings),
    )


def image_folder_fingerprint(job: Job, say: Say) -> str:
    """That of `open_image_folder`. Nothing is decoded, unless `data.on_error: skip` makes what is broken count and no
    earlier start has left in the cache what that is.

    Raises
    ------
    DataError, StorageError: as `open_image_folder`.
    """
    if isinstance(job.data, ImageFolderDataConfig) and job.data.on_error == "skip":
        return open_image_folder(job, say).fingerprint
    return Identified(_present(job), job.data.cache, say).fingerprint


def _present(job: Job) -> Listing:
    listing = listed(job)
    check_present(listing)
    return listing
