"""Columns of a table of pictures: paths, labels, and what splits go by. Read as those of any table are.

Which pictures there are and what they show: from a folder for each class, or from a table of paths and labels.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import CacheConfig, ImageFolderDataConfig, JobConfig, TimeSplitsConfig
from pipeline.data.dataset import SplitColumn
from pipeline.data.sources.file_digests import (
    DataFile,
    FileDigests,
    ProgressFn,
    evenly_spaced_ranges,
    select_num_read_threads,
)
from pipeline.data.sources.images.decode import is_image_path
from pipeline.data.sources.parquet.decode import parse_times, read_label_values, read_split_values
from pipeline.data.tabular.schema import InvalidValues, arrow_kind, dictionary_encode, unwrap_storage
from pipeline.errors import DataError
from pipeline.storage.read_files import IGNORED_IMAGE_PREFIXES, MISSING, FileInfo, FileReader, map_in_threads


def read_paths(table: pa.Table, name: str, where: str) -> tuple[str, ...]:
    """The paths of the rows.

    Raises
    ------
    DataError: nulls, or no text.
    """
    array, findings = _get_column(table, name, where)
    if arrow_kind(array.type).kind != "text":
        raise DataError(
            f"the column {name!r} holds {arrow_kind(array.type)}, not paths", where=where, fix="see data.path"
        )
    findings.add(name, "nulls", "remove these rows", array.is_null().to_numpy(zero_copy_only=False))
    _raise_if_invalid(findings, len(array))
    return tuple(unwrap_storage(array).to_pylist())


def read_labels(table: pa.Table, name: str, task: str, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Targets of the rows, and the sorted texts that they are positions in: int64 (N,), or float64 (N,) for regression.

    Raises
    ------
    DataError: nulls, NaN or infinity, or a type that the task cannot learn.
    """
    array, findings = _get_column(table, name, where)
    kind, is_regression = arrow_kind(array.type).kind, task == "regression"
    if kind not in ("whole", "real", "truth") and (is_regression or kind != "text"):
        raise DataError(
            f"the label {name!r} holds {arrow_kind(array.type)}, which {task} cannot learn",
            where=where,
            fix="see task" if kind == "text" else "use a column of numbers or text",
        )
    names = _sorted_categories(array, name, findings) if kind == "text" else None
    values = read_label_values(array, name, names, is_regression, findings)
    _raise_if_invalid(findings, len(array))
    return values, () if names is None else tuple(names.to_pylist())


def read_splits(table: pa.Table, name: str, is_time: bool, where: str) -> SplitColumn:
    """What splits go by, one value a row.

    Parameters
    ----------
    is_time: whether text is to be read as times.

    Raises
    ------
    DataError: nulls, or a type that is neither text, number nor time.
    """
    array, findings = _get_column(table, name, where)
    kind = arrow_kind(array.type).kind
    if kind not in ("text", "whole", "real", "truth", "time"):
        raise DataError(f"the column {name!r} holds {arrow_kind(array.type)}", where=where, fix="see data.splits")
    categories = _sorted_categories(array, name, findings) if kind == "text" else None
    values = read_split_values(array, name, categories, kind == "real", findings)
    _raise_if_invalid(findings, len(array))
    texts = () if categories is None else tuple(categories.to_pylist())
    if categories is not None and is_time:
        return SplitColumn(parse_times(texts, name, where)[values], is_time=True)
    return SplitColumn(values, ("false", "true") if kind == "truth" else texts, kind == "time")


def _get_column(table: pa.Table, name: str, where: str) -> tuple[pa.Array, InvalidValues]:
    array = table.column(name).combine_chunks()
    return array, InvalidValues(where)


def _raise_if_invalid(findings: InvalidValues, rows: int) -> None:
    """Raise DataError for what was found; all rows have gone by at once."""
    findings.num_rows = rows
    findings.raise_if_any()


def _sorted_categories(array: pa.Array, name: str, findings: InvalidValues) -> pa.Array:
    """The distinct texts of the rows, sorted."""
    distinct, rows = dictionary_encode(array, name, findings)
    present = np.unique(rows)
    return pa.array(sorted(distinct.take(pa.array(present[present >= 0])).to_pylist()), pa.string())


SPLIT_FOLDER_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
"""Folders of these names alone are splits and no classes."""


@dataclass(frozen=True, eq=False)
class ImageListing:
    """The pictures of a source, in the order of its rows.

    paths: relative to the folder, or whole URLs. sizes: bytes of each file, int64 (N,).
    checksums: what the store says of the content of each, see `storage.read_files.store_checksum`.
    targets: int64 (N,), or float64 (N,) for numbers. columns: what the job's splits go by.
    is_folder: whether the files were found by listing a folder.
    """

    reader: FileReader
    paths: tuple[str, ...]
    sizes: np.ndarray
    checksums: tuple[str, ...]
    targets: np.ndarray
    label_names: tuple[str, ...] = ()
    split_columns: dict[str, SplitColumn] = field(default_factory=dict)
    is_folder: bool = True


def list_images(job: JobConfig) -> ImageListing:
    """The pictures of a job's source.

    Raises
    ------
    DataError: no pictures, pictures without a class, or a table that does not fit. StorageError: a URL that cannot be
        used, or not be read.
    """
    assert isinstance(job.data, ImageFolderDataConfig), "a job with source: image_folder"
    return _list_table(job, job.data) if job.data.url.endswith(".parquet") else _list_class_folders(job, job.data)


def _list_class_folders(job: JobConfig, data: ImageFolderDataConfig) -> ImageListing:
    """Folders directly below are the classes, by name; pictures may lie at any depth in them, sorted by path."""
    url = data.url
    where = f"data.url: {url}"
    _check_folder_config(data)
    if job.task.kind == "regression":
        raise DataError(
            "a folder of classes has no numbers to learn",
            where="task",
            fix="point data.url at a Parquet file of paths and numbers",
        )
    files = FileReader(url)
    files_by_path = _list_folder(files)
    pictures = {path: facts for path, facts in files_by_path.items() if is_image_path(path)}
    if not pictures:
        others = Counter(_extension(path) or "none" for path in files_by_path)
        extension_counts = ", ".join(f"{ending} ({count:,})" for ending, count in others.most_common(5))
        raise DataError(
            f"no pictures among {len(files_by_path):,} files; their endings: {extension_counts or 'none'}",
            where=where,
            fix="one folder for each class, with pictures that Pillow reads, such as .png and .jpg",
        )
    loose = [path for path in pictures if "/" not in path]
    if loose:
        raise DataError(
            f"{loose[0]} is in no folder of a class ({len(loose):,} of {len(pictures):,} pictures)",
            where=where,
            fix="one folder for each class; or point data.url at a Parquet file of paths and labels",
        )
    classes = tuple(sorted({path.partition("/")[0] for path in pictures}))
    if SPLIT_FOLDER_NAMES.issuperset(classes):
        raise DataError(
            f"the folders {', '.join(classes)} look like splits, not classes",
            where=where,
            fix=f"point data.url at one of them, such as {url.rstrip('/')}/{classes[-1]}; or list all pictures in a "
            "Parquet file, with splits: {by: column}",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    targets = np.array([numbers[path.partition("/")[0]] for path in pictures], dtype=np.int64)
    return ImageListing(files, tuple(pictures), *_sizes_and_checksums(pictures.values()), targets, label_names=classes)


def _list_folder(files: FileReader) -> dict[str, FileInfo]:
    try:
        return files.list_files(IGNORED_IMAGE_PREFIXES)
    except FileNotFoundError:
        raise DataError(
            "no such folder or bucket, or it is empty", where=f"data.url: {files.printable}", fix="check the URL"
        ) from None


def _sizes_and_checksums(facts: Iterable[FileInfo]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Sizes and checksums."""
    sizes, checksums = zip(*facts, strict=True)
    return np.array(sizes, dtype=np.int64), checksums


def _check_folder_config(data: ImageFolderDataConfig) -> None:
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


def _list_table(job: JobConfig, data: ImageFolderDataConfig) -> ImageListing:
    """Rows as stored. Paths are relative to the folder in which the table lies, or whole URLs."""
    import pyarrow.parquet as pq

    url = data.url
    if not isinstance(data.label, str):
        raise DataError("a table of pictures needs label, the column to learn", where="data.label", fix="name it")
    folder, _, name = url.rpartition("/")
    files = FileReader(folder or ".")
    where = f"data.url: {files.printable}/{name}"
    column = getattr(data.splits, "column", None)
    try:
        table = pq.read_table(io.BytesIO(files.read(name)))
    except FileNotFoundError:
        raise DataError("no such file", where=where, fix="check the URL") from None
    except pa.ArrowException as error:
        raise DataError(f"no Parquet file, or a damaged one: {error}", where=where, fix="write it again") from error
    for key, column_name in (("data.path", data.path), ("data.label", data.label), ("data.splits.column", column)):
        if column_name is not None and column_name not in table.column_names:
            raise DataError(
                f"no column {column_name}; there are {', '.join(table.column_names)}", where=where, fix=f"see {key}"
            )
    if not len(table):
        raise DataError("no rows", where=where, fix="list a picture a row")
    paths = read_paths(table, data.path, where)
    targets, names = read_labels(table, data.label, job.task.kind, where)
    columns = {}
    if column is not None:
        columns[column] = read_splits(table, column, isinstance(data.splits, TimeSplitsConfig), where)
    sizes_and_checksums = _sizes_and_checksums(
        map_in_threads(files.stat, paths, select_num_read_threads(files.is_remote))
    )
    return ImageListing(
        files, paths, *sizes_and_checksums, targets, label_names=names, split_columns=columns, is_folder=False
    )


def check_images_exist(listing: ImageListing) -> None:
    """Raise DataError for pictures that are not there."""
    absent = np.flatnonzero(listing.sizes < 0)
    if len(absent):
        raise DataError(
            f"no such picture: {listing.paths[absent[0]]} ({len(absent):,} of {len(listing.paths):,} are absent)",
            where=f"data.url: {listing.reader.printable}",
            fix="paths are relative to the folder, or whole URLs",
        )


class ImageDigests:
    """The pictures of a listing, their content identified.

    fingerprint: SHA-256 over paths, labels, sizes and content, and the splits' column, in hex. Neither places nor times
        count. What stands for the content: see `pipeline.data.sources.file_digests`.
    warnings: what the fingerprint assumes.

    Raises
    ------
    DataError: a picture that changes or vanishes meanwhile.
    """

    def __init__(self, listing: ImageListing, cache: CacheConfig, on_progress: ProgressFn) -> None:
        files, access = listing.reader, _ImageFileAccess(listing)
        digests = FileDigests(
            [
                DataFile(path, int(size), files.local_path(path), checksum)
                for path, size, checksum in zip(listing.paths, listing.sizes, listing.checksums, strict=True)
            ],
            access,
            url=files.url,
            cache=cache,
            num_threads=select_num_read_threads(files.is_remote),
            on_progress=on_progress,
            where=f"data.url: {files.printable}, ",
        )
        self.warnings = digests.warnings
        self.fingerprint = _compute_fingerprint(listing, digests.tokens)
        self._digests: FileDigests | None = None
        self._contents = b""
        if digests.are_content_hashes:  # of a million pictures, all else is much to hold
            self._contents = b"".join(map(bytes.fromhex, digests.tokens))
        else:
            self._digests = digests

    def is_unchanged(self, number: int, content: bytes) -> bool:
        """Whether this is the content that was identified, as far as it is known: see `verify`."""
        if not self._contents:
            return True
        digest = hashlib.sha256(content).digest()
        return self._contents[number * len(digest) : (number + 1) * len(digest)] == digest

    def verify(self) -> None:
        """After pictures were read: where `is_unchanged` cannot know, raise DataError if any has changed."""
        if self._digests is not None:
            self._digests.verify()


def _compute_fingerprint(listing: ImageListing, tokens: Iterable[str]) -> str:
    digest, names = hashlib.sha256(), listing.label_names
    for row, token in enumerate(tokens):
        label = names[listing.targets[row]] if names else repr(listing.targets[row].item())
        text = f"{listing.paths[row]}\0{label}\0{listing.sizes[row]}\0{token}\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
    for name, column in listing.split_columns.items():
        little = column.values.astype(column.values.dtype.newbyteorder("<"))
        digest.update(f"{name} {little.dtype.str} {column.value_names!r}\n".encode() + little.tobytes())
    return digest.hexdigest()


class _ImageFileAccess:
    """See `digests.Access`."""

    def __init__(self, listing: ImageListing) -> None:
        self._listing = listing

    def call(self, number: int, action: Callable[[], Any]) -> Any:
        with self._missing_file_errors(number):
            return self._listing.reader.retry(action)

    def read(self, number: int, first: int, end: int) -> bytes:
        files, path = self._listing.reader, self._listing.paths[number]
        with self._missing_file_errors(number):
            is_all = (first, end) == (0, self._listing.sizes[number])
            return files.read(path) if is_all else files.read_range(path, first, end)

    def sample_ranges(self, number: int) -> list[tuple[int, int]]:
        return evenly_spaced_ranges(int(self._listing.sizes[number]))

    def list_checksums(self) -> list[str]:
        files, paths = self._listing.reader, self._listing.paths
        if self._listing.is_folder:
            now = _list_folder(files)
            return [now.get(path, MISSING).checksum for path in paths]
        return [info.checksum for info in map_in_threads(files.stat, paths, select_num_read_threads(files.is_remote))]

    @contextmanager
    def _missing_file_errors(self, number: int) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DataError(
                f"{self._listing.paths[number]} is gone",
                where=f"data.url: {self._listing.reader.printable}",
                fix="leave the folder as it is",
            ) from None


class ThrottledProgress:
    """Tells how far it is, once a second."""

    def __init__(self, doing: str, count: int, on_progress: ProgressFn) -> None:
        self._doing, self._count, self._on_progress = doing, count, on_progress
        self._last_report_s = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last_report_s >= 1:
            self._last_report_s = now
            self._on_progress(f"{self._doing} {done:,} of {self._count:,} pictures")


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.lower()
