"""Raw samples from what users hold in their hands: frames and tables, arrays and tensors, pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.data.pictures import BrokenPictureError, Form, TooSmallError, decode, quiet
from pipeline.data.preprocess import Preprocess, SamplePreprocess, TablePreprocess
from pipeline.data.sources.image_folder.files import Files
from pipeline.data.tables.contents import content, null_inside, raw_bytes
from pipeline.data.tables.encode import encode, to_arrow
from pipeline.data.tables.schema import Column, Schema
from pipeline.errors import DataError
from pipeline.job import Job

WHERE = "predict"


def raw_samples(data: Any, preprocess: Preprocess, job: Job) -> np.ndarray:
    """Samples (N, ...) of the shape and type that `preprocess` was fitted on.

    Parameters
    ----------
    data: see `pipeline.predictor.Predictor.predict`.

    Raises
    ------
    DataError: columns, shapes or types that are others than in training; a picture that cannot be read.
    """
    if isinstance(preprocess, TablePreprocess):
        return _rows(data, preprocess, np.float64 if _is_wide(preprocess, job) else np.float32)
    if job.data.source == "image_folder" and isinstance(data, Sequence):
        return np.stack([_picture(one, job) for one in data]) if data else np.empty((0, *preprocess.sample_shape))
    if job.data.source == "parquet" and not isinstance(data, np.ndarray | torch.Tensor):
        return _single_column(to_arrow(data), preprocess, job)
    return _arrays(data, preprocess)


def _is_wide(preprocess: TablePreprocess, job: Job) -> bool:
    return preprocess.dtype == "float64" if preprocess.dtype else job.train.precision == "fp64"


def _single_column(table: pa.Table, preprocess: SamplePreprocess, job: Job) -> np.ndarray:
    """Samples that are one column of bytes or of lists, found as in training."""
    apart, shape = {*job.data.labels, *job.data.keys, job.data.splits_column}, preprocess.sample_shape
    names = [name for name in table.schema.names if name not in apart]
    names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in job.data.features)]
    width = math.prod(shape)
    if len(names) != 1:
        raise DataError(
            f"{len(names)} columns could be the samples: {', '.join(names) or 'none'}",
            where=WHERE,
            fix=f"give one, of {width} {'bytes' if preprocess.dtype == 'uint8' else 'numbers'} a row",
        )
    column = table.column(names[0])
    if column.null_count:
        raise DataError(f"{column.null_count:,} rows of {names[0]!r} are null", where=WHERE, fix="leave them out")
    if preprocess.dtype != "uint8":
        schema = Schema((Column(names[0], "number", width),))
        dtype = np.float64 if preprocess.dtype == "float64" else np.float32
        return _finite(encode(table, schema, dtype=dtype, where=WHERE).reshape(-1, *shape))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):  # as pandas and polars have it
        with suppress(pa.ArrowException):  # of other lengths: refused below
            column = column.cast(pa.binary(width))
    found = content(column.type)
    if found.kind != "bytes" or found.width != width:
        raise DataError(
            f"the column {names[0]!r} does not hold {width} bytes a row", where=WHERE, fix="give what was trained on"
        )
    if inside := sum(int(null_inside(chunk, width).sum()) for chunk in column.chunks):
        raise DataError(f"{inside:,} rows of {names[0]!r} hold nulls", where=WHERE, fix="leave them out")
    parts = [raw_bytes(chunk, width) for chunk in column.chunks]
    return np.concatenate([np.empty((0, width), np.uint8), *parts]).reshape(-1, *shape)


def _rows(data: Any, preprocess: TablePreprocess, dtype: type[np.float32] | type[np.float64]) -> np.ndarray:
    schema = preprocess.schema
    if isinstance(data, np.ndarray | torch.Tensor) and not preprocess.categories:
        with np.errstate(over="ignore"):  # found below
            rows = np.asarray(data, dtype)
        if rows.ndim != 2 or rows.shape[1] != schema.width:
            names = ", ".join(column.name for column in schema.columns)
            raise DataError(
                f"has the shape {rows.shape}, not (N, {schema.width})",
                where=WHERE,
                fix=f"one row a sample, with these columns in this order: {names}",
            )
        _finite(rows, but_nan=True)  # what is missing is filled in, as in training
    else:
        rows = encode(to_arrow(data), schema, dtype=dtype, where=WHERE)
    preprocess.check(rows)
    return rows


def _arrays(data: Any, preprocess: SamplePreprocess) -> np.ndarray:
    samples, shape = np.asarray(data), preprocess.sample_shape
    if len(shape) == 1 and samples.ndim == 1 and shape == (1,):
        samples = samples[:, None]
    if samples.shape[1:] != shape and samples.ndim == 4 and (samples.shape[3], *samples.shape[1:3]) == shape:
        samples = samples.transpose(0, 3, 1, 2)  # channels last, as NumPy's images are
    if samples.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise DataError(f"has the shape {samples.shape}, not (N, {wanted})", where=WHERE, fix="one sample a row")
    wanted_type = np.dtype(preprocess.dtype)
    if wanted_type == np.uint8 and samples.dtype != np.uint8:
        raise DataError(
            f"holds {samples.dtype}, but the model was trained on bytes, 0 to 255",
            where=WHERE,
            fix="(images * 255).round().astype('uint8') makes them of numbers between 0 and 1",
        )
    if samples.dtype.kind not in "biuf":
        raise DataError(f"holds {samples.dtype}, not numbers", where=WHERE, fix="encode it as numbers first")
    with np.errstate(over="ignore"):  # found below
        return _finite(np.ascontiguousarray(samples, wanted_type))


def _finite(samples: np.ndarray, *, but_nan: bool = False) -> np.ndarray:
    """The samples; DataError where they hold NaN or infinity, as training would have refused them."""
    wrong = np.isinf(samples) if but_nan else ~np.isfinite(samples)
    if wrong.any():
        row, *place = (int(axis) for axis in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        rows = int(wrong.reshape(len(wrong), -1).any(1).sum())
        raise DataError(
            f"{samples[row, *place]} at row {row}, position {', '.join(map(str, place))} ({rows:,} of {len(wrong):,} "
            "rows hold such values): the model was trained on finite numbers alone",
            where=WHERE,
            fix="fill them in, or leave these rows out",
        )
    return samples


def _picture(one: Any, job: Job) -> np.ndarray:
    """A path, URL or Pillow image as training saw pictures: uint8 (C, H, W)."""
    form, name = Form.of(job.data), str(one) if isinstance(one, str | Path) else type(one).__name__
    try:
        with quiet():
            return decode(_content(one), form)
    except FileNotFoundError:
        raise DataError("there is no such file", where=name) from None
    except (BrokenPictureError, TooSmallError) as error:
        raise DataError(f"cannot be used as a picture: {error}", where=name) from error


def _content(one: Any) -> bytes:
    if isinstance(one, str | Path):
        folder, _, file = str(one).rpartition("/")
        return Files(folder or ("." if not str(one).startswith("/") else "/")).read(file)
    if isinstance(one, bytes):
        return one
    if not hasattr(one, "save"):
        raise DataError(
            f"a {type(one).__name__} is no picture", where=WHERE, fix="give paths, URLs, bytes or Pillow images"
        )
    buffer = io.BytesIO()
    one.save(buffer, format="PNG")
    return buffer.getvalue()
