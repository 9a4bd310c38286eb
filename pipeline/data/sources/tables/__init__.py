"""Tables in files as a source: decoded in memory, or, if they are large, once into a memory-mapped cache."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import JobConfig, TableColumnsConfig, TableDataConfig
from pipeline.data.cache import get_or_build
from pipeline.data.dataset import Dataset, DatasetPart
from pipeline.data.sources.tables.auto_features import select_auto_features, with_features
from pipeline.data.sources.tables.columns import TableSelection, select_columns
from pipeline.data.sources.tables.decode import (
    DecodedTable,
    build_schema,
    build_split_column,
    decode_files,
    decode_to_cache,
    input_array_layout,
)
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.sources.tables.formats import open_table_files
from pipeline.errors import DataError

__all__ = ["open_table", "fingerprint_table"]

FORMAT = 2
"""Version of the cache entries, to be increased when the code that writes them changes."""

HEADER_BYTES = 1 << 20
"""Number of bytes reserved for headers in the size of an entry."""


def open_table(job: JobConfig, on_progress: Callable[[str], None], *, float64: bool) -> Dataset:
    """Open the job's columns of all rows of `data.url`: files sorted by name, rows in stored order.

    Inputs are a float32 or float64 matrix with the layout `Dataset.schema`. If the only feature is a column of
    fixed-size bytes, inputs are uint8 samples of `data.shape` instead; if it is a column of fixed-size lists and
    `data.shape` is given, they are floating-point samples of that shape. Text labels are indices into
    `Dataset.label_names`; whole numbers and booleans are unchanged; for regression, labels are float64 (N,), or (N, T)
    for T columns.

    Inputs of more than `data.cache.in_memory_mb` are written once to a memory-mapped file, batch by batch. Later starts
    read only the footers of the Parquet files, and what the fingerprint requires (see `file_digests`).

    Parameters
    ----------
    on_progress: called with a progress message, at most once a second.
    float64: whether inputs are float64.

    Raises
    ------
    DataError: unusable files, columns or values, with file, column, row and count.
    """
    data = job.data
    assert isinstance(data, TableDataConfig), "a job of table files"
    with open_table_files(data) as files:
        if not files.num_rows:
            raise DataError(
                f"no rows in {len(files.files):,} files",
                where=files.url,
                fix="check data.url, and the program that wrote the files",
            )
        return read_dataset(
            files,
            job,
            on_progress,
            float64=float64,
            reopen=lambda job, float64: open_table(job, on_progress, float64=float64),
        )


def read_dataset(
    files: TableFiles,
    job: JobConfig,
    on_progress: Callable[[str], None],
    *,
    float64: bool,
    reopen: Callable[[JobConfig, bool], Dataset],
) -> Dataset:
    """Return the job's columns of all rows as one training part, see `open_table`.

    Parameters
    ----------
    reopen: opens the same data again for a job with other features, in float64 or not.

    Raises
    ------
    DataError: unusable columns or values.
    """
    data, dtype = job.data, np.float64 if float64 else np.float32
    assert isinstance(data, TableColumnsConfig), "a job of tables"
    fingerprint = files.compute_fingerprint(on_progress)
    job, left_out = select_auto_features(files, job, fingerprint, on_progress)
    selection = select_columns(files, job)
    shape, kind = input_array_layout(selection, files.num_rows, dtype)
    _check_shape(selection)
    size = math.prod(shape) * np.dtype(kind).itemsize
    if size <= data.cache.in_memory_mb * 10**6:
        decoded = decode_files(files, selection, np.empty(shape, kind), lambda _: None)
        files.verify()
    else:
        other_bytes = files.num_rows * 8 * (len(selection.labels) + 1) + HEADER_BYTES

        def build(folder: Path) -> None:
            decode_to_cache(folder, files, selection, dtype, on_progress)
            files.verify()

        entry = get_or_build(
            data.cache, _cache_key(fingerprint, selection, dtype), build, size_bytes=size + other_bytes
        )
        decoded = DecodedTable.load(entry)
    dataset = replace(
        _to_dataset(selection, decoded, fingerprint, files),
        left_out=left_out,
        reopen_with_features=lambda names: reopen(with_features(job, names), float64),
    )
    if float64 or dataset.rounding_errors is None:
        return dataset
    return replace(dataset, reopen_in_float64=lambda: reopen(job, True))


def fingerprint_table(job: JobConfig, on_progress: Callable[[str], None]) -> str:
    """Return the fingerprint that `open_table` gives, without decoding the data.

    Raises
    ------
    DataError: files that cannot be read.
    """
    assert isinstance(job.data, TableDataConfig), "a job of tables"
    with open_table_files(job.data, read_layouts=False) as files:
        return files.compute_fingerprint(on_progress)


def _to_dataset(selection: TableSelection, decoded: DecodedTable, fingerprint: str, files: TableFiles) -> Dataset:
    label_names = [decoded.categories[name] if kind.kind == "text" else () for name, kind in selection.labels]
    booleans = tuple(index for index, (_, kind) in enumerate(selection.labels) if kind.kind == "truth")
    has_columns = selection.label_as == "classes" and len(selection.labels) > 1
    return Dataset(
        train=DatasetPart(decoded.inputs, decoded.targets),
        test=None,
        classes=(),
        fingerprint=fingerprint,
        schema=build_schema(selection, decoded.categories),
        label_names=label_names[0] if label_names and not has_columns else (),
        has_boolean_labels=bool(booleans) and not has_columns,
        column_label_names=tuple(label_names) if has_columns else (),
        boolean_label_columns=booleans if has_columns else (),
        split_columns=build_split_column(selection, decoded, files.url),
        warnings=files.warnings,
        rounding_errors=_rounding_by_channel(selection, decoded.rounding),
    )


def _rounding_by_channel(selection: TableSelection, rounding: np.ndarray) -> np.ndarray | None:
    """Return the largest error of each column of the inputs, or of each channel if samples have several axes."""
    if not rounding.any():
        return None
    if len(selection.shape) < 2:
        return rounding
    channels = selection.shape[0] if len(selection.shape) > 2 else 1
    largest: np.ndarray = rounding.reshape(channels, -1).max(1)
    return largest


def _check_shape(selection: TableSelection) -> None:
    if selection.shape and math.prod(selection.shape) != selection.width:
        raise DataError(
            f"{list(selection.shape)} has {math.prod(selection.shape):,} numbers, but a row of "
            f"{selection.features[0].name!r} has {selection.width:,}",
            where="data.shape",
            fix="for images: [channels, height, width]",
        )


def _cache_key(fingerprint: str, selection: TableSelection, dtype: type[np.generic]) -> str:
    """Return the cache key of the selected columns of the files with this fingerprint."""
    return hashlib.sha256(f"{FORMAT} {fingerprint} {selection.cache_key} {dtype.__name__}".encode()).hexdigest()
