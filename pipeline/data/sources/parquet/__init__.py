"""Tables in Parquet files as a source: decoded in memory, or once into a memory-mapped cache where they are larger."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.data.cache import cached
from pipeline.data.sources.arrays import Arrays, Source
from pipeline.data.sources.parquet.choosing import Choice, choose
from pipeline.data.sources.parquet.decoding import (
    Decoded,
    decode,
    decode_to,
    inputs_layout,
    schema_of,
    split_column,
)
from pipeline.data.sources.parquet.files import Files
from pipeline.data.tables.encode import near
from pipeline.errors import DataError
from pipeline.job import Cache, Job

__all__ = ["batches", "open_parquet"]

FORMAT = 2
"""Of what lies in the cache. A change of the code that fills it takes the next number."""

BESIDE_INPUTS = 1 << 20
"""Bytes of an entry for headers."""


def open_parquet(job: Job, say: Callable[[str], None], *, float64: bool) -> Source:
    """The job's columns of all rows of `data.url`: files in the order of their names, rows as stored.

    Inputs are a matrix laid out by `Source.schema`, float32 or float64. A single feature of fixed-size bytes
    gives uint8 samples of `data.shape` instead, and one of fixed-size lists floating ones where `data.shape` is given.
    Labels of text are positions in `Source.label_names`; whole numbers and booleans stay as they are; for regression,
    labels are float64 (N,), or (N, T) of T columns.

    Inputs of more than `data.cache.in_memory_mb` are turned into a memory-mapped file once, batch by batch; a later
    start reads nothing of the Parquet data but footers (and, up to 1 GiB, the bytes for the fingerprint).

    Parameters
    ----------
    say: told of progress, at most once a second.
    float64: whether inputs are float64.

    Raises
    ------
    DataError: files, columns or values that cannot be used, with file, column, row and count.
    """
    data = job.data
    assert data.url is not None, "a job with source: parquet has a url"
    dtype = np.float64 if float64 else np.float32
    with Files(data.url, data.cache) as files:
        if not files.rows:
            raise DataError(
                f"no rows in {len(files.files):,} files",
                where=files.url,
                fix="check data.url, and what wrote the files",
            )
        fingerprint = files.fingerprint()
        choice = choose(files, job)
        shape, kind = inputs_layout(choice, files.rows, dtype)
        _check_shape(choice)
        size = math.prod(shape) * np.dtype(kind).itemsize
        if size <= data.cache.in_memory_mb * 10**6:
            decoded = decode(files, choice, np.empty(shape, kind), lambda _: None)
        else:
            beside = files.rows * 8 * (len(choice.labels) + 1) + BESIDE_INPUTS
            folder = cached(
                data.cache,
                _key(fingerprint, choice, dtype),
                lambda folder: decode_to(folder, files, choice, dtype, say),
                size=size + beside,
            )
            decoded = Decoded.load(folder)
        source = _source(choice, decoded, fingerprint, files.url)
    if float64 or source.rounding is None:
        return source
    return replace(source, in_float64=lambda: open_parquet(job, say, float64=True))


def batches(url: str, columns: Sequence[str] | None, rows: int, cache: Cache | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of Parquet files in order, up to `rows` at once.

    Parameters
    ----------
    url: as `data.url`.
    columns: which, in this order; None for all of the first file.
    cache: where remote files lie while they are read.

    Raises
    ------
    DataError: files that cannot be read, or a column that one of them lacks.
    """
    with Files(url, cache or Cache()) as files:
        for number, file in enumerate(files.files):
            here = list(files.contents(number))
            columns = here if columns is None else columns
            for name in columns:
                if name not in here:
                    raise DataError(
                        f"there is no column {name!r} ({files.row_counts[number]:,} rows)",
                        where=file.where,
                        fix=near(name, here),
                    )
            yield from files.batches(number, columns, rows)
            files.forget(number)


def _source(choice: Choice, decoded: Decoded, fingerprint: str, url: str) -> Source:
    names = [decoded.levels[name] for name, found in choice.labels if found.kind == "text"]
    return Source(
        train=Arrays(decoded.inputs, decoded.targets),
        test=None,
        classes=(),
        fingerprint=fingerprint,
        schema=schema_of(choice, decoded.levels),
        label_names=names[0] if names else (),
        columns=split_column(choice, decoded, url),
        rounding=_rounding(choice, decoded.rounding),
    )


def _rounding(choice: Choice, rounding: np.ndarray) -> np.ndarray | None:
    """For each column of the inputs; of samples of further axes, for each channel."""
    if not rounding.any():
        return None
    if len(choice.shape) < 2:
        return rounding
    channels = choice.shape[0] if len(choice.shape) > 2 else 1
    largest: np.ndarray = rounding.reshape(channels, -1).max(1)
    return largest


def _check_shape(choice: Choice) -> None:
    if choice.shape and math.prod(choice.shape) != choice.width:
        raise DataError(
            f"{list(choice.shape)} makes {math.prod(choice.shape):,} numbers, but a row of "
            f"{choice.features[0].name!r} has {choice.width:,}",
            where="data.shape",
            fix="for images: [channels, height, width]",
        )


def _key(fingerprint: str, choice: Choice, dtype: type[np.generic]) -> str:
    """Names what the cache holds of some files."""
    return hashlib.sha256(f"{FORMAT} {fingerprint} {choice!r} {dtype.__name__}".encode()).hexdigest()
