"""Tables in Parquet files as a source: decoded in memory, or once into a memory-mapped cache where they are larger."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

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
from pipeline.errors import DataError
from pipeline.job import Job, ParquetDataConfig

__all__ = ["open_parquet", "parquet_fingerprint"]

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
    with Files(data.url, data.cache) as files:
        if not files.rows:
            raise DataError(
                f"no rows in {len(files.files):,} files",
                where=files.url,
                fix="check data.url, and what wrote the files",
            )
        fingerprint = files.fingerprint(say)
        selection = choose(files, job)
        shape, kind = inputs_layout(selection, files.rows, dtype)
        _check_shape(selection)
        size = math.prod(shape) * np.dtype(kind).itemsize
        if size <= data.cache.in_memory_mb * 10**6:
            decoded = decode(files, selection, np.empty(shape, kind), lambda _: None)
            files.verify()
        else:
            other_bytes = files.rows * 8 * (len(selection.labels) + 1) + BESIDE_INPUTS

            def build(folder: Path) -> None:
                decode_to(folder, files, selection, dtype, say)
                files.verify()

            entry = cached(data.cache, _key(fingerprint, selection, dtype), build, size=size + other_bytes)
            decoded = Decoded.load(entry)
        source = _source(selection, decoded, fingerprint, files)
    if float64 or source.rounding is None:
        return source
    return replace(source, in_float64=lambda: open_parquet(job, say, float64=True))


def parquet_fingerprint(job: Job, say: Callable[[str], None]) -> str:
    """That of `open_parquet`, without decoding anything.

    Raises
    ------
    DataError: files that cannot be read.
    """
    assert isinstance(job.data, ParquetDataConfig), "a job with source: parquet"
    with Files(job.data.url, job.data.cache, footers=False) as files:
        return files.fingerprint(say)


def _source(choice: Choice, decoded: Decoded, fingerprint: str, files: Files) -> Source:
    names = [decoded.levels[name] for name, found in choice.labels if found.kind == "text"]
    return Source(
        train=Arrays(decoded.inputs, decoded.targets),
        test=None,
        classes=(),
        fingerprint=fingerprint,
        schema=schema_of(choice, decoded.levels),
        label_names=names[0] if names else (),
        columns=split_column(choice, decoded, files.url),
        warnings=files.warnings,
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
