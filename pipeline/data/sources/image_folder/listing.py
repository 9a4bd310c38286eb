"""Which pictures there are and what they show: from a folder for each class, or from a table of paths and labels."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from pipeline.data.pictures import endings
from pipeline.data.sources.arrays import SplitColumn
from pipeline.data.sources.image_folder.files import Files, in_threads
from pipeline.data.sources.image_folder.table import labels, path_values, splits
from pipeline.errors import DataError
from pipeline.job import Data, Job, TimeSplits

Say = Callable[[str], None]

WHOLE_BYTES = 1 << 30
"""Up to so many bytes of all files together, their content counts for the fingerprint."""

END_BYTES = 64 << 10
"""Of larger data, so many bytes at the beginning and at the end of each file."""

PARTS = frozenset({"train", "training", "val", "valid", "validation", "test"})
"""Folders of these names alone are splits and no classes."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The pictures of a source, in the order of its rows.

    paths: relative to the folder, or whole URLs. sizes: bytes of each file, int64 (N,).
    targets: int64 (N,), or float64 (N,) for numbers. columns: what the job's splits go by.
    """

    files: Files
    paths: tuple[str, ...]
    sizes: np.ndarray
    targets: np.ndarray
    label_names: tuple[str, ...] = ()
    columns: dict[str, SplitColumn] = field(default_factory=dict)


def listed(job: Job) -> Listing:
    """The pictures of a job's source.

    Raises
    ------
    DataError: no pictures, pictures without a class, or a table that does not fit. StorageError: a URL that cannot be
        used, or not be read.
    """
    url = job.data.url
    assert url is not None, "the job's schema asks for it"
    return _in_table(job, url) if url.endswith(".parquet") else _in_folders(job, url)


def _in_folders(job: Job, url: str) -> Listing:
    """Folders directly below are the classes, by name; pictures may lie at any depth in them, sorted by path."""
    where = f"data.url: {url}"
    _check_job(job.data, where)
    if job.task.kind == "regression":
        raise DataError(
            "a folder of classes has no numbers to learn",
            where="task",
            fix="point data.url at a Parquet file of paths and numbers",
        )
    files = Files(url)
    found = files.list()
    sizes = {path: size for path, size in found.items() if _ending(path) in endings()}
    if not sizes:
        others = Counter(_ending(path) or "none" for path in found)
        told = ", ".join(f"{ending} ({count:,})" for ending, count in others.most_common(5))
        raise DataError(
            f"no pictures among {len(found):,} files; their endings: {told or 'none'}",
            where=where,
            fix="one folder for each class, with pictures that Pillow reads, such as .png and .jpg",
        )
    loose = [path for path in sizes if "/" not in path]
    if loose:
        raise DataError(
            f"{loose[0]} is in no folder of a class ({len(loose):,} of {len(sizes):,} pictures)",
            where=where,
            fix="one folder for each class; or point data.url at a Parquet file of paths and labels",
        )
    classes = tuple(sorted({path.partition("/")[0] for path in sizes}))
    if PARTS.issuperset(classes):
        raise DataError(
            f"the folders {', '.join(classes)} look like splits, not classes",
            where=where,
            fix=f"point data.url at one of them, such as {url.rstrip('/')}/{classes[-1]}; or list all pictures in a "
            "Parquet file, with splits: {by: column}",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    targets = np.array([numbers[path.partition("/")[0]] for path in sizes], dtype=np.int64)
    return Listing(files, tuple(sizes), np.array(list(sizes.values()), dtype=np.int64), targets, label_names=classes)


def _check_job(data: Data, where: str) -> None:
    """Refuse what a folder cannot give."""
    if data.label is not None:
        raise DataError(
            f"label is {data.label!r}, but in a folder each class is a folder",
            where="data.label",
            fix="leave it out, or point data.url at a Parquet file of paths and labels",
        )
    if column := getattr(data.splits, "column", None):
        raise DataError(
            f"a folder has no column {column}",
            where="data.splits",
            fix="point data.url at a Parquet file of paths, labels and that column",
        )


def _in_table(job: Job, url: str) -> Listing:
    """Rows as stored. Paths are relative to the folder in which the table lies, or whole URLs."""
    import pyarrow.parquet as pq

    data = job.data
    if not isinstance(data.label, str):
        raise DataError("a table of pictures needs label, the column to learn", where="data.label", fix="name it")
    folder, _, name = url.rpartition("/")
    files = Files(folder or ".")
    where = f"data.url: {files.printable}/{name}"
    column = getattr(data.splits, "column", None)
    try:
        table = pq.read_table(io.BytesIO(files.read(name)))
    except FileNotFoundError:
        raise DataError("no such file", where=where, fix="check the URL") from None
    except pa.ArrowException as error:
        raise DataError(f"no Parquet file, or a damaged one: {error}", where=where, fix="write it again") from error
    for key, wanted in (("data.path", data.path), ("data.label", data.label), ("data.splits.column", column)):
        if wanted is not None and wanted not in table.column_names:
            raise DataError(
                f"no column {wanted}; there are {', '.join(table.column_names)}", where=where, fix=f"see {key}"
            )
    if not len(table):
        raise DataError("no rows", where=where, fix="list a picture a row")
    paths = path_values(table, data.path, where)
    targets, names = labels(table, data.label, job.task.kind, where)
    columns = {}
    if column is not None:
        columns[column] = splits(table, column, isinstance(data.splits, TimeSplits), where)
    sizes = np.array(list(in_threads(files.size, paths, files.threads)), dtype=np.int64)
    return Listing(files, paths, sizes, targets, label_names=names, columns=columns)


def check_present(listing: Listing) -> None:
    """Raise DataError for pictures that are not there."""
    absent = np.flatnonzero(listing.sizes < 0)
    if len(absent):
        raise DataError(
            f"no such picture: {listing.paths[absent[0]]} ({len(absent):,} of {len(listing.paths):,} are absent)",
            where=f"data.url: {listing.files.printable}",
            fix="paths are relative to the folder, or whole URLs",
        )


def fingerprint(listing: Listing, say: Say) -> str:
    """SHA-256 over paths, labels, sizes and content, and the splits' column, in hex. Neither places nor times count.

    Where all files together have more than 1 GiB, the content is the first and the last 64 KiB of each.
    """
    files, whole = listing.files, int(listing.sizes.sum()) <= WHOLE_BYTES

    def digest_of(row: int) -> str:
        path, size = listing.paths[row], int(listing.sizes[row])
        content = files.read(path) if whole else files.ends(path, size, END_BYTES)
        return hashlib.sha256(content).hexdigest()

    digest = hashlib.sha256()
    names, count = listing.label_names, len(listing.paths)
    progress = Progress("reading", count, say)
    for row, content in enumerate(in_threads(digest_of, range(count), files.threads)):
        label = names[listing.targets[row]] if names else repr(listing.targets[row].item())
        text = f"{listing.paths[row]}\0{label}\0{listing.sizes[row]}\0{content}\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
        progress(row + 1)
    for name, column in listing.columns.items():
        little = column.values.astype(column.values.dtype.newbyteorder("<"))
        digest.update(f"{name} {little.dtype.str} {column.names!r}\n".encode() + little.tobytes())
    return digest.hexdigest()


class Progress:
    """Tells how far it is, once a second."""

    def __init__(self, doing: str, count: int, say: Say) -> None:
        self._doing, self._count, self._say = doing, count, say
        self._said_at = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said_at >= 1:
            self._said_at = now
            self._say(f"{self._doing} {done:,} of {self._count:,} pictures")


def _ending(path: str) -> str:
    return PurePosixPath(path).suffix.lower()
