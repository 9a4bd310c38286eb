"""List the images of a source with their labels, from class folders or a table of paths, and identify their content."""

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
from pipeline.data.sources.file_digests import DataFile, FileDigests, evenly_spaced_ranges, select_num_read_threads
from pipeline.data.sources.images.decode import is_image_path
from pipeline.data.sources.tables.decode import parse_times, read_label_values, read_split_values
from pipeline.data.tabular.arrow_types import InvalidValues, arrow_kind, dictionary_encode, unwrap_storage
from pipeline.errors import DataError
from pipeline.events import ProgressFn
from pipeline.storage.read_files import IGNORED_IMAGE_PREFIXES, MISSING, FileInfo, FileReader, map_in_threads

SPLIT_FOLDER_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
"""If all folders have such names, they are splits rather than classes."""


@dataclass(frozen=True, eq=False)
class ImageListing:
    """The images of a source, in the order of its rows.

    paths: paths relative to the folder, or URLs.
    sizes: number of bytes of each file, int64 (N,); -1 if it does not exist.
    checksums: checksum of each file's content by its store, see `storage.read_files.store_checksum`.
    targets: int64 (N,), or float64 (N,) for numbers.
    label_names: sorted label texts, which the targets index; empty for numbers.
    has_boolean_labels: whether the targets 0 and 1 are booleans in the table.
    split_columns: the column that the job's splits use, by name.
    is_folder: whether the files come from listing a folder, rather than from a table.
    """

    reader: FileReader
    paths: tuple[str, ...]
    sizes: np.ndarray
    checksums: tuple[str, ...]
    targets: np.ndarray
    label_names: tuple[str, ...] = ()
    has_boolean_labels: bool = False
    split_columns: dict[str, SplitColumn] = field(default_factory=dict)
    is_folder: bool = True


def list_images(job: JobConfig) -> ImageListing:
    """List the images of a job's source.

    Raises
    ------
    DataError: no images, images without a class, or an unusable table.
    StorageError: a URL that is invalid or cannot be read.
    """
    assert isinstance(job.data, ImageFolderDataConfig), "a job with source: image_folder"
    return _list_table(job, job.data) if job.data.url.endswith(".parquet") else _list_class_folders(job, job.data)


def check_images_exist(listing: ImageListing) -> None:
    """Raise DataError if files of the listing do not exist."""
    absent = np.flatnonzero(listing.sizes < 0)
    if len(absent):
        raise DataError(
            f"no such image: {listing.paths[absent[0]]} ({len(absent):,} of {len(listing.paths):,} are absent)",
            where=f"data.url: {listing.reader.printable}",
            fix="paths are relative to the folder, or whole URLs",
        )


def missing_file_error(listing: ImageListing, row: int) -> DataError:
    """Return the error for a file that was listed, but no longer exists."""
    return DataError(
        f"{listing.paths[row]} no longer exists",
        where=f"data.url: {listing.reader.printable}",
        fix="do not change the folder during a run",
    )


class ImageDigests:
    """Computes the tokens that identify the content of the images of a listing, when it is created.

    fingerprint: SHA-256 in hex over paths, labels, sizes, content and the split column, without locations and times.
        For the tokens of the content see `pipeline.data.sources.file_digests`.
    warnings: assumptions of the fingerprint.

    Raises
    ------
    DataError: a file that changes or is deleted meanwhile.
    """

    def __init__(self, listing: ImageListing, cache: CacheConfig, on_progress: ProgressFn) -> None:
        reader, access = listing.reader, _ImageFileAccess(listing)
        digests = FileDigests(
            [
                DataFile(path, int(size), reader.local_path(path), checksum)
                for path, size, checksum in zip(listing.paths, listing.sizes, listing.checksums, strict=True)
            ],
            access,
            url=reader.url,
            cache=cache,
            num_threads=select_num_read_threads(reader.is_remote),
            on_progress=on_progress,
            where=f"data.url: {reader.printable}, ",
        )
        self.warnings = digests.warnings
        self.fingerprint = _compute_fingerprint(listing, digests.tokens)
        self._digests: FileDigests | None = None
        self._contents = b""
        if digests.are_content_hashes:  # for a million images, the object with all file names takes much memory
            self._contents = b"".join(map(bytes.fromhex, digests.tokens))
        else:
            self._digests = digests

    def is_unchanged(self, number: int, content: bytes) -> bool:
        """Return whether the content has the digest of the listing; True if its digest is unknown, see `verify`."""
        if not self._contents:
            return True
        digest = hashlib.sha256(content).digest()
        return self._contents[number * len(digest) : (number + 1) * len(digest)] == digest

    def verify(self) -> None:
        """After images were read, raise DataError if a file has changed for which `is_unchanged` has no digest."""
        if self._digests is not None:
            self._digests.verify()


class ThrottledProgress:
    """Reports the number of processed images, at most once a second."""

    def __init__(self, doing: str, count: int, on_progress: ProgressFn) -> None:
        self._doing, self._count, self._on_progress = doing, count, on_progress
        self._last_report_s = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last_report_s >= 1:
            self._last_report_s = now
            self._on_progress(f"{self._doing} {done:,} of {self._count:,} images")


def _list_class_folders(job: JobConfig, data: ImageFolderDataConfig) -> ImageListing:
    """List the images of a folder. The folders directly in it are the classes, sorted by name; images can be at any
    depth in them, and are sorted by path."""
    url = data.url
    where = f"data.url: {url}"
    _check_folder_config(data)
    if job.task.kind == "regression":
        raise DataError(
            "a folder of classes has no numeric targets",
            where="task",
            fix="point data.url at a Parquet file of paths and numbers",
        )
    reader = FileReader(url)
    files = _list_folder(reader)
    images = {path: info for path, info in files.items() if is_image_path(path)}
    if not images:
        extensions = Counter(_extension(path) or "none" for path in files)
        extension_counts = ", ".join(f"{extension} ({count:,})" for extension, count in extensions.most_common(5))
        raise DataError(
            f"no images among {len(files):,} files; their extensions: {extension_counts or 'none'}",
            where=where,
            fix="use one folder per class, with images that Pillow reads, such as .png and .jpg",
        )
    without_class = [path for path in images if "/" not in path]
    if without_class:
        raise DataError(
            f"{without_class[0]} is not in the folder of a class ({len(without_class):,} of {len(images):,} images)",
            where=where,
            fix="use one folder per class; or point data.url at a Parquet file of paths and labels",
        )
    classes = tuple(sorted({path.partition("/")[0] for path in images}))
    if SPLIT_FOLDER_NAMES.issuperset(classes):
        raise DataError(
            f"the folders {', '.join(classes)} look like splits, not classes",
            where=where,
            fix=f"point data.url at one of them, such as {url.rstrip('/')}/{classes[-1]}; or list all images in a "
            "Parquet file, with splits: {by: column}",
        )
    class_indices = {name: index for index, name in enumerate(classes)}
    targets = np.array([class_indices[path.partition("/")[0]] for path in images], dtype=np.int64)
    return ImageListing(reader, tuple(images), *_sizes_and_checksums(images.values()), targets, label_names=classes)


def _list_folder(reader: FileReader) -> dict[str, FileInfo]:
    try:
        return reader.list_files(IGNORED_IMAGE_PREFIXES)
    except FileNotFoundError:
        raise DataError(
            "no such folder or bucket, or it is empty", where=f"data.url: {reader.printable}", fix="check the URL"
        ) from None


def _sizes_and_checksums(infos: Iterable[FileInfo]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return sizes, int64 (N,), and checksums."""
    sizes, checksums = zip(*infos, strict=True)
    return np.array(sizes, dtype=np.int64), checksums


def _check_folder_config(data: ImageFolderDataConfig) -> None:
    """Raise DataError for configuration keys that need a table."""
    if data.label is not None:
        raise DataError(
            f"label is {data.label!r}, but the classes of a folder are the folders in it",
            where="data.label",
            fix="remove it, or point data.url at a Parquet file of paths and labels",
        )
    if column := getattr(data.splits, "column", None):
        raise DataError(
            f"a folder has no column {column}",
            where="data.splits",
            fix="point data.url at a Parquet file of paths, labels and that column",
        )


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _list_table(job: JobConfig, data: ImageFolderDataConfig) -> ImageListing:
    """List the images of a table, in the order of its rows. Paths are relative to the table's folder, or URLs."""
    import pyarrow.parquet as pq

    url = data.url
    if not isinstance(data.label, str):
        raise DataError("a table of images needs a label column", where="data.label", fix="set its name")
    folder, _, name = url.rpartition("/")
    reader = FileReader(folder or ".")
    where = f"data.url: {reader.printable}/{name}"
    column = getattr(data.splits, "column", None)
    try:
        table = pq.read_table(io.BytesIO(reader.read(name)))
    except FileNotFoundError:
        raise DataError("no such file", where=where, fix="check the URL") from None
    except pa.ArrowException as error:
        raise DataError(f"not a Parquet file, or damaged: {error}", where=where, fix="write it again") from error
    for key, column_name in (("data.path", data.path), ("data.label", data.label), ("data.splits.column", column)):
        if column_name is not None and column_name not in table.column_names:
            raise DataError(
                f"no column {column_name}; the columns are {', '.join(table.column_names)}",
                where=where,
                fix=f"change {key}",
            )
    if not len(table):
        raise DataError("no rows", where=where, fix="write one row per image")
    paths = read_paths(table, data.path, where)
    targets, names = read_labels(table, data.label, job.task.kind, where)
    columns = {}
    if column is not None:
        columns[column] = read_splits(table, column, isinstance(data.splits, TimeSplitsConfig), where)
    sizes_and_checksums = _sizes_and_checksums(
        map_in_threads(reader.stat, paths, select_num_read_threads(reader.is_remote))
    )
    return ImageListing(
        reader,
        paths,
        *sizes_and_checksums,
        targets,
        label_names=names,
        has_boolean_labels=arrow_kind(table.schema.field(data.label).type).kind == "truth",
        split_columns=columns,
        is_folder=False,
    )


def read_paths(table: pa.Table, name: str, where: str) -> tuple[str, ...]:
    """Return the paths in a column.

    Raises
    ------
    DataError: nulls, or values that are not text.
    """
    array, invalid = _get_column(table, name, where)
    if arrow_kind(array.type).kind != "text":
        raise DataError(
            f"the column {name!r} has {arrow_kind(array.type)}, not paths", where=where, fix="change data.path"
        )
    invalid.add(name, "nulls", "remove these rows", array.is_null().to_numpy(zero_copy_only=False))
    _raise_if_invalid(invalid, len(array))
    return tuple(unwrap_storage(array).to_pylist())


def read_labels(table: pa.Table, name: str, task: str, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the targets, int64 (N,), or float64 (N,) for regression; and the sorted label texts that they index.

    Raises
    ------
    DataError: nulls, NaN or infinity, or a type that the task cannot use.
    """
    array, invalid = _get_column(table, name, where)
    kind, is_regression = arrow_kind(array.type).kind, task == "regression"
    if kind not in ("whole", "real", "truth") and (is_regression or kind != "text"):
        raise DataError(
            f"the label {name!r} has {arrow_kind(array.type)}, which {task} cannot use",
            where=where,
            fix="change task" if kind == "text" else "use a column of numbers or text",
        )
    names = _sorted_categories(array, name, invalid) if kind == "text" else None
    values = read_label_values(array, name, names, is_regression, invalid)
    _raise_if_invalid(invalid, len(array))
    return values, () if names is None else tuple(names.to_pylist())


def read_splits(table: pa.Table, name: str, is_time: bool, where: str) -> SplitColumn:
    """Return the values of the column that the splits use.

    Parameters
    ----------
    is_time: whether text is parsed as times.

    Raises
    ------
    DataError: nulls, or values that are not text, numbers or times.
    """
    array, invalid = _get_column(table, name, where)
    kind = arrow_kind(array.type).kind
    if kind not in ("text", "whole", "real", "truth", "time"):
        raise DataError(f"the column {name!r} has {arrow_kind(array.type)}", where=where, fix="change data.splits")
    categories = _sorted_categories(array, name, invalid) if kind == "text" else None
    values = read_split_values(array, name, categories, kind == "real", invalid)
    _raise_if_invalid(invalid, len(array))
    texts = () if categories is None else tuple(categories.to_pylist())
    if categories is not None and is_time:
        return SplitColumn(parse_times(texts, name, where)[values], is_time=True)
    return SplitColumn(values, ("false", "true") if kind == "truth" else texts, kind == "time")


def _get_column(table: pa.Table, name: str, where: str) -> tuple[pa.Array, InvalidValues]:
    array = table.column(name).combine_chunks()
    return array, InvalidValues(where)


def _raise_if_invalid(invalid: InvalidValues, num_rows: int) -> None:
    """Raise DataError for the invalid values of a table of `num_rows` rows."""
    invalid.num_rows = num_rows
    invalid.raise_if_any()


def _sorted_categories(array: pa.Array, name: str, invalid: InvalidValues) -> pa.Array:
    """Return the distinct texts of a column, sorted."""
    distinct, codes = dictionary_encode(array, name, invalid)
    present = np.unique(codes)
    return pa.array(sorted(distinct.take(pa.array(present[present >= 0])).to_pylist()), pa.string())


def _compute_fingerprint(listing: ImageListing, tokens: Iterable[str]) -> str:
    digest, names = hashlib.sha256(), listing.label_names
    for row, token in enumerate(tokens):
        label = names[listing.targets[row]] if names else repr(listing.targets[row].item())
        text = f"{listing.paths[row]}\0{label}\0{listing.sizes[row]}\0{token}\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
    for name, column in listing.split_columns.items():
        little_endian = column.values.astype(column.values.dtype.newbyteorder("<"))
        digest.update(f"{name} {little_endian.dtype.str} {column.value_names!r}\n".encode() + little_endian.tobytes())
    return digest.hexdigest()


class _ImageFileAccess:
    """The `FileAccess` of a listing."""

    def __init__(self, listing: ImageListing) -> None:
        self._listing = listing

    def call(self, number: int, action: Callable[[], Any]) -> Any:
        with self._missing_file_errors(number):
            return self._listing.reader.retry(action)

    def read(self, number: int, first: int, end: int) -> bytes:
        reader, path = self._listing.reader, self._listing.paths[number]
        with self._missing_file_errors(number):
            is_whole = (first, end) == (0, self._listing.sizes[number])
            return reader.read(path) if is_whole else reader.read_range(path, first, end)

    def sample_ranges(self, number: int) -> list[tuple[int, int]]:
        return evenly_spaced_ranges(int(self._listing.sizes[number]))

    def list_checksums(self) -> list[str]:
        reader, paths = self._listing.reader, self._listing.paths
        if self._listing.is_folder:
            files = _list_folder(reader)
            return [files.get(path, MISSING).checksum for path in paths]
        return [info.checksum for info in map_in_threads(reader.stat, paths, select_num_read_threads(reader.is_remote))]

    @contextmanager
    def _missing_file_errors(self, number: int) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise missing_file_error(self._listing, number) from None
