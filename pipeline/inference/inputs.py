"""Conversion of user data to model inputs: data frames and tables, arrays and tensors, images."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.config import ImageFolderDataConfig, JobConfig, TableColumnsConfig
from pipeline.data.sources.images.decode import (
    ImageFormat,
    ImageTooSmallError,
    InvalidImageError,
    decode_image,
    silence_pillow_warnings,
)
from pipeline.data.tabular.arrow_types import (
    NUMERIC_KINDS,
    ArrowKind,
    arrow_kind,
    bytes_to_array,
    has_inner_null,
    unwrap_storage,
)
from pipeline.data.tabular.encoder import check_columns, encode_to_matrix, suggest_columns, to_arrow_table
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.transforms import ArrayTransform, DataReport, InputTransform, TabularTransform
from pipeline.errors import DataError, StorageError
from pipeline.storage.read_files import FileReader

WHERE = "predict"


def to_raw_inputs(data: Any, input_transform: InputTransform, job: JobConfig, report: DataReport) -> np.ndarray:
    """Return samples (N, ...) of the shape and dtype that `input_transform` was fitted on.

    Parameters
    ----------
    data: see `pipeline.inference.predictor.Predictor.predict`.
    report: the samples are added to it.

    Raises
    ------
    DataError: columns, shapes or types differ from those in training, or an image cannot be read.
    """
    if isinstance(input_transform, TabularTransform):
        return _read_rows(
            data, input_transform, np.float64 if _uses_float64(input_transform, job) else np.float32, report
        )
    if isinstance(job.data, ImageFolderDataConfig) and (_is_image(data) or isinstance(data, Sequence)):
        shape, images = input_transform.sample_shape, [data] if _is_image(data) else data
        return (
            np.stack([_read_image(image, job.data, shape) for image in images])
            if images
            else np.empty((0, *shape), np.uint8)
        )
    if isinstance(job.data, TableColumnsConfig) and not isinstance(data, np.ndarray | torch.Tensor):
        return _read_sample_column(to_arrow_table(data), input_transform, job.data)
    if input_transform.names and _has_named_columns(data):
        data = _read_named_columns(to_arrow_table(data), input_transform.names)
    samples = _read_arrays(data, input_transform)
    report.add(samples)
    return samples


def _has_named_columns(data: Any) -> bool:
    """Return whether the data has named columns."""
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(row, Mapping) for row in data)
    return isinstance(data, Mapping | pa.RecordBatch) or hasattr(data, "__arrow_c_stream__")


def _read_named_columns(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Return the named columns of a table, (N, F); other columns are ignored.

    Raises
    ------
    DataError: a column is missing, is not numeric, or has missing values.
    """
    columns = []
    for name in names:
        index = table.schema.get_field_index(name)
        if index < 0:
            raise DataError(
                f"there is no column {name!r} ({table.num_rows:,} rows)",
                where=WHERE,
                fix=suggest_columns(name, table.schema.names),
            )
        kind = arrow_kind(table.schema.field(index).type)
        if kind.kind not in (*NUMERIC_KINDS, "null"):
            raise DataError(f"the column {name!r} holds {kind}, not numbers", where=WHERE, fix="cast it")
        column = pa.concat_arrays(
            [unwrap_storage(chunk) for chunk in table.column(index).chunks] or [pa.array([], pa.float64())]
        )
        nulls = pc.sum(pc.is_null(column, nan_is_null=True)).as_py()
        if nulls:
            raise DataError(
                f"{nulls:,} of {len(column):,} rows have no value in column {name!r}",
                where=WHERE,
                fix="fill them, or leave the rows out: no training row had a missing value",
            )
        columns.append(column.to_numpy(zero_copy_only=False))
    return np.column_stack(columns)


def find_input_columns(
    contents: Mapping[str, ArrowKind], preprocess: InputTransform, job: JobConfig, num_rows: int, where: str
) -> list[str]:
    """Return the names of the columns that the model takes, given the kinds of a table's columns.

    Raises
    ------
    DataError: a column is missing or of another kind, or several columns could be the samples.
    """
    if isinstance(preprocess, TabularTransform):
        check_columns(preprocess.schema, contents, num_rows, where)
        return [column.name for column in preprocess.schema.columns]
    assert isinstance(job.data, TableColumnsConfig), "a job of tables"
    return [_find_sample_column(contents, preprocess, job.data, where)]


def _find_sample_column(names: Iterable[str], preprocess: ArrayTransform, data: TableColumnsConfig, where: str) -> str:
    """Return the name of the column of bytes or lists that holds the samples, by the rule used in training."""
    reserved = {*data.labels, *data.keys, data.splits_column}
    patterns = ["*"] if data.features == "auto" else data.features
    candidates = [
        name
        for name in names
        if name not in reserved
        and any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in data.exclude)
    ]
    if len(candidates) != 1:
        width = math.prod(preprocess.sample_shape)
        raise DataError(
            f"{len(candidates)} columns could be the samples: {', '.join(candidates) or 'none'}",
            where=where,
            fix=f"give one, of {width} {'bytes' if preprocess.dtype == 'uint8' else 'numbers'} per row",
        )
    return candidates[0]


def _uses_float64(preprocess: TabularTransform, job: JobConfig) -> bool:
    return preprocess.dtype == "float64" if preprocess.dtype else job.train.precision == "fp64"


def _read_sample_column(table: pa.Table, preprocess: ArrayTransform, data: TableColumnsConfig) -> np.ndarray:
    """Return samples that are stored as one column of bytes or lists."""
    shape, width = preprocess.sample_shape, math.prod(preprocess.sample_shape)
    name = _find_sample_column(table.schema.names, preprocess, data, WHERE)
    column = table.column(name)
    if column.null_count:
        raise DataError(f"{column.null_count:,} rows of {name!r} are null", where=WHERE, fix="leave them out")
    if preprocess.dtype != "uint8":
        schema = Schema((Column(name, "number", width),))
        dtype = np.float64 if preprocess.dtype == "float64" else np.float32
        return _require_finite(encode_to_matrix(table, schema, dtype=dtype, where=WHERE).reshape(-1, *shape))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):  # as pandas and polars store it
        with suppress(pa.ArrowException):  # other lengths: rejected below
            column = column.cast(pa.binary(width))
    kind = arrow_kind(column.type)
    if kind.kind != "bytes" or kind.width != width:
        raise DataError(
            f"the column {name!r} does not hold {width} bytes per row",
            where=WHERE,
            fix="give samples of the training format",
        )
    if num_invalid := sum(int(has_inner_null(chunk, width).sum()) for chunk in column.chunks):
        raise DataError(f"{num_invalid:,} rows of {name!r} hold nulls", where=WHERE, fix="leave them out")
    parts = [bytes_to_array(chunk, width) for chunk in column.chunks]
    return np.concatenate([np.empty((0, width), np.uint8), *parts]).reshape(-1, *shape)


def _read_rows(
    data: Any, preprocess: TabularTransform, dtype: type[np.float32] | type[np.float64], report: DataReport
) -> np.ndarray:
    schema, table = preprocess.schema, None
    if isinstance(data, np.ndarray | torch.Tensor) and all(column.kind == "number" for column in schema.columns):
        with np.errstate(over="ignore"):  # checked below
            rows = np.asarray(data, dtype)
        if rows.ndim != 2 or rows.shape[1] != schema.width:
            names = ", ".join(column.name for column in schema.columns)
            raise DataError(
                f"has the shape {rows.shape}, not (N, {schema.width})",
                where=WHERE,
                fix=f"give one row per sample, with these columns in this order: {names}",
            )
        _require_finite(rows, allow_nan=True)  # missing values are filled in, as in training
    else:
        table = to_arrow_table(data)
        rows = encode_to_matrix(table, schema, dtype=dtype, where=WHERE)
    preprocess.check_missing_values(rows)
    report.add(rows, original_value=None if table is None else lambda name, row: table.column(name)[row].as_py())
    return rows


def _read_arrays(data: Any, preprocess: ArrayTransform) -> np.ndarray:
    samples, shape = np.asarray(data), preprocess.sample_shape
    if len(shape) == 1 and samples.ndim == 1 and shape == (1,):
        samples = samples[:, None]
    if samples.shape[1:] != shape and samples.ndim == 4 and (samples.shape[3], *samples.shape[1:3]) == shape:
        samples = samples.transpose(0, 3, 1, 2)  # channels last, as NumPy's images are
    if samples.shape[1:] != shape:
        expected = ", ".join(map(str, shape))
        raise DataError(
            f"has the shape {samples.shape}, not (N, {expected})", where=WHERE, fix="give one sample per row"
        )
    expected_dtype = np.dtype(preprocess.dtype)
    if expected_dtype == np.uint8 and samples.dtype != np.uint8:
        raise DataError(
            f"holds {samples.dtype}, but the model was trained on bytes, 0 to 255",
            where=WHERE,
            fix="(images * 255).round().astype('uint8') converts numbers between 0 and 1",
        )
    if samples.dtype.kind not in "biuf":
        raise DataError(f"holds {samples.dtype}, not numbers", where=WHERE, fix="encode it as numbers first")
    with np.errstate(over="ignore"):  # checked below
        return _require_finite(np.ascontiguousarray(samples, expected_dtype))


def _require_finite(samples: np.ndarray, *, allow_nan: bool = False) -> np.ndarray:
    """Return the samples; raise DataError if they contain NaN or infinity, which training rejects too."""
    invalid = np.isinf(samples) if allow_nan else ~np.isfinite(samples)
    if invalid.any():
        row, *position = (int(axis) for axis in np.unravel_index(int(np.argmax(invalid)), invalid.shape))
        rows = int(invalid.reshape(len(invalid), -1).any(1).sum())
        raise DataError(
            f"{samples[row, *position]} at row {row}, position {', '.join(map(str, position))} ({rows:,} of "
            f"{len(invalid):,} rows hold such values): the model was trained on finite numbers only",
            where=WHERE,
            fix="fill them in, or leave these rows out",
        )
    return samples


def _is_image(data: Any) -> bool:
    """Return whether the data is a single image: a path or URL, the content of a file, or a Pillow image."""
    return isinstance(data, str | Path | bytes) or (hasattr(data, "save") and hasattr(data, "getbands"))


def _read_image(image: Any, data: ImageFolderDataConfig, shape: Sequence[int]) -> np.ndarray:
    """Return a path, URL, file content or Pillow image as an array in the training format: uint8 of `shape`."""
    name = str(image) if isinstance(image, str | Path) else type(image).__name__
    try:
        with silence_pillow_warnings():
            return decode_input_image(_read_content(image), name, data, shape)
    except FileNotFoundError:
        raise DataError("there is no such file", where=name) from None
    except InvalidImageError as error:
        raise DataError(f"cannot be used as an image: {error}", where=name) from error
    except StorageError as error:  # a folder, for instance
        raise DataError(error.what, where=name, fix=error.fix) from None


def decode_input_image(content: bytes, name: str, data: ImageFolderDataConfig, shape: Sequence[int]) -> np.ndarray:
    """Decode the content of an image file to the training format: uint8 of `shape`, which is (C, H, W).

    Raises
    ------
    InvalidImageError: it cannot be decoded.
    DataError: it has another size.
    """
    image_format = ImageFormat.from_config(data)
    try:
        pixels = decode_image(content, image_format)
    except ImageTooSmallError as error:
        raise DataError(f"is {error}, too small for the model's crop: {image_format.crop}", where=name) from None
    if pixels.shape != tuple(shape):
        actual_size, expected_size = (f"{height} x {width}" for _, height, width in (pixels.shape, shape))
        raise DataError(
            f"is {actual_size} pixels, but the model was trained on {expected_size}",
            where=name,
            fix="resize it; a job with data.resize takes images of any size",
        )
    return pixels


def _read_content(image: Any) -> bytes:
    if isinstance(image, str | Path):
        folder, _, file = str(image).rpartition("/")
        return FileReader(folder or ("." if not str(image).startswith("/") else "/")).read(file)
    if isinstance(image, bytes):
        return image
    if not hasattr(image, "save"):
        raise DataError(
            f"a {type(image).__name__} is not an image", where=WHERE, fix="give paths, URLs, bytes or Pillow images"
        )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
