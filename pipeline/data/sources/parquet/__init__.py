"""Tables in Parquet files as a source: decoded in memory, or once into a memory-mapped cache where they are larger."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import JobConfig, ParquetDataConfig
from pipeline.data.cache import get_or_build
from pipeline.data.dataset import Dataset, DatasetPart
from pipeline.data.sources.parquet.columns import ParquetSelection, select_columns
from pipeline.data.sources.parquet.decode import (
    DecodedTable,
    build_schema,
    build_split_column,
    decode_files,
    decode_to_cache,
    input_array_layout,
)
from pipeline.data.sources.parquet.reader import ParquetFiles
from pipeline.errors import DataError

__all__ = ["open_parquet", "fingerprint_parquet"]

FORMAT = 2
"""Of what lies in the cache. A change of the code that fills it takes the next number."""

HEADER_BYTES = 1 << 20
"""Bytes of an entry for headers."""


def open_parquet(job: JobConfig, on_progress: Callable[[str], None], *, float64: bool) -> Dataset:
    """The job's columns of all rows of `data.url`: files in the order of their names, rows as stored.

    Inputs are a matrix laid out by `Source.schema`, float32 or float64. A single feature of fixed-size bytes
    gives uint8 samples of `data.shape` instead, and one of fixed-size lists floating ones where `data.shape` is given.
    Labels of text are positions in `Source.label_names`; whole numbers and booleans stay as they are; for regression,
    labels are float64 (N,), or (N, T) of T columns.

    Inputs of more than `data.cache.in_memory_mb` are turned into a memory-mapped file once, batch by batch; a later
    start reads nothing of the Parquet data but footers, and whatever the fingerprint takes, see `digests`.

    Parameters
    ----------
    say: told of progress, at most once a second.
    float64: whether inputs are float64.

    Raises
    ------
    DataError: files, columns or values that cannot be used, with file, column, row and count.
    """
    data = job.data
    assert isinstance(data, ParquetDataConfig), "a job with source: parquet"
    dtype = np.float64 if float64 else np.float32
    with ParquetFiles(data.url, data.cache) as files:
        if not files.num_rows:
            raise DataError(
                f"no rows in {len(files.files):,} files",
                where=files.url,
                fix="check data.url, and what wrote the files",
            )
        fingerprint = files.compute_fingerprint(on_progress)
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
        source = _to_dataset(selection, decoded, fingerprint, files)
    if float64 or source.rounding_errors is None:
        return source
    return replace(source, reopen_in_float64=lambda: open_parquet(job, on_progress, float64=True))


def fingerprint_parquet(job: JobConfig, on_progress: Callable[[str], None]) -> str:
    """That of `open_parquet`, without decoding anything.

    Raises
    ------
    DataError: files that cannot be read.
    """
    assert isinstance(job.data, ParquetDataConfig), "a job with source: parquet"
    with ParquetFiles(job.data.url, job.data.cache, read_footers=False) as files:
        return files.compute_fingerprint(on_progress)


def _to_dataset(selection: ParquetSelection, decoded: DecodedTable, fingerprint: str, files: ParquetFiles) -> Dataset:
    names = [decoded.categories[name] for name, found in selection.labels if found.kind == "text"]
    return Dataset(
        train=DatasetPart(decoded.inputs, decoded.targets),
        test=None,
        classes=(),
        fingerprint=fingerprint,
        schema=build_schema(selection, decoded.categories),
        label_names=names[0] if names else (),
        split_columns=build_split_column(selection, decoded, files.url),
        warnings=files.warnings,
        rounding_errors=_rounding_by_channel(selection, decoded.rounding),
    )


def _rounding_by_channel(selection: ParquetSelection, rounding: np.ndarray) -> np.ndarray | None:
    """For each column of the inputs; of samples of further axes, for each channel."""
    if not rounding.any():
        return None
    if len(selection.shape) < 2:
        return rounding
    channels = selection.shape[0] if len(selection.shape) > 2 else 1
    largest: np.ndarray = rounding.reshape(channels, -1).max(1)
    return largest


def _check_shape(selection: ParquetSelection) -> None:
    if selection.shape and math.prod(selection.shape) != selection.width:
        raise DataError(
            f"{list(selection.shape)} makes {math.prod(selection.shape):,} numbers, but a row of "
            f"{selection.features[0].name!r} has {selection.width:,}",
            where="data.shape",
            fix="for images: [channels, height, width]",
        )


def _cache_key(fingerprint: str, selection: ParquetSelection, dtype: type[np.generic]) -> str:
    """Names what the cache holds of some files."""
    return hashlib.sha256(f"{FORMAT} {fingerprint} {selection!r} {dtype.__name__}".encode()).hexdigest()
