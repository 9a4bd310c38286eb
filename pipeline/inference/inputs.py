"""Raw samples from what users hold in their hands: frames and tables, arrays and tensors, pictures."""

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

from pipeline.config import ImageFolderDataConfig, JobConfig, ParquetDataConfig
from pipeline.data.sources.images.decode import (
    ImageFormat,
    ImageTooSmallError,
    InvalidImageError,
    decode_image,
    silence_pillow_warnings,
)
from pipeline.data.tabular.encoder import check_columns, encode_to_matrix, suggest_columns, to_arrow_table
from pipeline.data.tabular.schema import (
    NUMERIC_KINDS,
    ArrowKind,
    Column,
    Schema,
    arrow_kind,
    bytes_to_array,
    has_inner_null,
    unwrap_storage,
)
from pipeline.data.transforms import ArrayTransform, DataReport, InputTransform, TabularTransform
from pipeline.errors import DataError, StorageError
from pipeline.storage.read_files import FileReader

WHERE = "predict"


def to_raw_inputs(data: Any, input_transform: InputTransform, job: JobConfig, report: DataReport) -> np.ndarray:
    """Samples (N, ...) of the shape and type that `preprocess` was fitted on.

    Parameters
    ----------
    data: see `pipeline.inference.predictor.Predictor.predict`.
    report: these samples are counted in it.

    Raises
    ------
    DataError: columns, shapes or types that are others than in training; a picture that cannot be read.
    """
    if isinstance(input_transform, TabularTransform):
        return _read_rows(
            data, input_transform, np.float64 if _uses_float64(input_transform, job) else np.float32, report
        )
    if isinstance(job.data, ImageFolderDataConfig) and (_is_image(data) or isinstance(data, Sequence)):
        shape, images = input_transform.sample_shape, [data] if _is_image(data) else data
        return (
            np.stack([_read_image(one, job.data, shape) for one in images])
            if images
            else np.empty((0, *shape), np.uint8)
        )
    if isinstance(job.data, ParquetDataConfig) and not isinstance(data, np.ndarray | torch.Tensor):
        return _read_sample_column(to_arrow_table(data), input_transform, job.data)
    if input_transform.names and _has_named_columns(data):
        data = _read_named_columns(to_arrow_table(data), input_transform.names)
    samples = _read_arrays(data, input_transform)
    report.add(samples)
    return samples


def _has_named_columns(data: Any) -> bool:
    """Whether its columns have names."""
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(row, Mapping) for row in data)
    return isinstance(data, Mapping | pa.RecordBatch) or hasattr(data, "__arrow_c_stream__")


def _read_named_columns(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """The columns of a table by their names, (N, F); further columns are of no account.

    Raises
    ------
    DataError: a column that is absent, holds no numbers, or has no value in some row.
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
            raise DataError(f"the column {name!r} holds {kind}; wanted: numbers", where=WHERE, fix="cast it")
        column = pa.concat_arrays(
            [unwrap_storage(chunk) for chunk in table.column(index).chunks] or [pa.array([], pa.float64())]
        )
        nulls = pc.sum(pc.is_null(column, nan_is_null=True)).as_py()
        if nulls:
            raise DataError(
                f"{nulls:,} of {len(column):,} rows have no value in column {name!r}",
                where=WHERE,
                fix="fill them, or leave them out: the training rows had a value each",
            )
        columns.append(column.to_numpy(zero_copy_only=False))
    return np.column_stack(columns)


def find_input_columns(
    contents: Mapping[str, ArrowKind], preprocess: InputTransform, job: JobConfig, num_rows: int, where: str
) -> list[str]:
    """Which columns of a table the model takes, told from what they hold.

    Raises
    ------
    DataError: one that is absent or of another kind, or several that could be the samples.
    """
    if isinstance(preprocess, TabularTransform):
        check_columns(preprocess.schema, contents, num_rows, where)
        return [column.name for column in preprocess.schema.columns]
    assert isinstance(job.data, ParquetDataConfig), "a job with source: parquet"
    return [_find_sample_column(contents, preprocess, job.data, where)]


def _find_sample_column(names: Iterable[str], preprocess: ArrayTransform, data: ParquetDataConfig, where: str) -> str:
    """The column of bytes or lists that holds samples, found as in training."""
    reserved = {*data.labels, *data.keys, data.splits_column}
    free = [name for name in names if name not in reserved]
    candidates = [name for name in free if any(fnmatchcase(name, pattern) for pattern in data.features)]
    if len(candidates) != 1:
        width = math.prod(preprocess.sample_shape)
        raise DataError(
            f"{len(candidates)} columns could be the samples: {', '.join(candidates) or 'none'}",
            where=where,
            fix=f"give one, of {width} {'bytes' if preprocess.dtype == 'uint8' else 'numbers'} a row",
        )
    return candidates[0]


def _uses_float64(preprocess: TabularTransform, job: JobConfig) -> bool:
    return preprocess.dtype == "float64" if preprocess.dtype else job.train.precision == "fp64"


def _read_sample_column(table: pa.Table, preprocess: ArrayTransform, data: ParquetDataConfig) -> np.ndarray:
    """Samples that are one column of bytes or of lists."""
    shape, width = preprocess.sample_shape, math.prod(preprocess.sample_shape)
    name = _find_sample_column(table.schema.names, preprocess, data, WHERE)
    column = table.column(name)
    if column.null_count:
        raise DataError(f"{column.null_count:,} rows of {name!r} are null", where=WHERE, fix="leave them out")
    if preprocess.dtype != "uint8":
        schema = Schema((Column(name, "number", width),))
        dtype = np.float64 if preprocess.dtype == "float64" else np.float32
        return _require_finite(encode_to_matrix(table, schema, dtype=dtype, where=WHERE).reshape(-1, *shape))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):  # as pandas and polars have it
        with suppress(pa.ArrowException):  # of other lengths: refused below
            column = column.cast(pa.binary(width))
    kind = arrow_kind(column.type)
    if kind.kind != "bytes" or kind.width != width:
        raise DataError(
            f"the column {name!r} does not hold {width} bytes a row", where=WHERE, fix="give what was trained on"
        )
    if inside := sum(int(has_inner_null(chunk, width).sum()) for chunk in column.chunks):
        raise DataError(f"{inside:,} rows of {name!r} hold nulls", where=WHERE, fix="leave them out")
    parts = [bytes_to_array(chunk, width) for chunk in column.chunks]
    return np.concatenate([np.empty((0, width), np.uint8), *parts]).reshape(-1, *shape)


def _read_rows(
    data: Any, preprocess: TabularTransform, dtype: type[np.float32] | type[np.float64], report: DataReport
) -> np.ndarray:
    schema, table = preprocess.schema, None
    if isinstance(data, np.ndarray | torch.Tensor) and not preprocess.categorical_columns:
        with np.errstate(over="ignore"):  # found below
            rows = np.asarray(data, dtype)
        if rows.ndim != 2 or rows.shape[1] != schema.width:
            names = ", ".join(column.name for column in schema.columns)
            raise DataError(
                f"has the shape {rows.shape}, not (N, {schema.width})",
                where=WHERE,
                fix=f"one row a sample, with these columns in this order: {names}",
            )
        _require_finite(rows, allow_nan=True)  # what is missing is filled in, as in training
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
        return _require_finite(np.ascontiguousarray(samples, wanted_type))


def _require_finite(samples: np.ndarray, *, allow_nan: bool = False) -> np.ndarray:
    """The samples; DataError where they hold NaN or infinity, as training would have refused them."""
    wrong = np.isinf(samples) if allow_nan else ~np.isfinite(samples)
    if wrong.any():
        row, *position = (int(axis) for axis in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        rows = int(wrong.reshape(len(wrong), -1).any(1).sum())
        raise DataError(
            f"{samples[row, *position]} at row {row}, position {', '.join(map(str, position))} ({rows:,} of "
            f"{len(wrong):,} "
            "rows hold such values): the model was trained on finite numbers alone",
            where=WHERE,
            fix="fill them in, or leave these rows out",
        )
    return samples


def _is_image(data: Any) -> bool:
    """Whether it is a single picture: a path or URL, the content of a file, or a Pillow image."""
    return isinstance(data, str | Path | bytes) or (hasattr(data, "save") and hasattr(data, "getbands"))


def _read_image(image: Any, data: ImageFolderDataConfig, shape: Sequence[int]) -> np.ndarray:
    """A path, URL, file's content or Pillow image as training saw pictures: uint8 `shape`."""
    name = str(image) if isinstance(image, str | Path) else type(image).__name__
    try:
        with silence_pillow_warnings():
            return decode_input_image(_read_content(image), name, data, shape)
    except FileNotFoundError:
        raise DataError("there is no such file", where=name) from None
    except InvalidImageError as error:
        raise DataError(f"cannot be used as a picture: {error}", where=name) from error
    except StorageError as error:  # a folder, for instance
        raise DataError(error.what, where=name, fix=error.fix) from None


def decode_input_image(content: bytes, name: str, data: ImageFolderDataConfig, shape: Sequence[int]) -> np.ndarray:
    """The picture in a file's content as training saw pictures: uint8 `shape`, which is (C, H, W).

    Raises
    ------
    BrokenPictureError: it cannot be decoded.
    DataError: it is of another size.
    """
    form = ImageFormat.from_config(data)
    try:
        pixels = decode_image(content, form)
    except ImageTooSmallError as error:
        raise DataError(f"is {error}, too small for the model's crop: {form.crop}", where=name) from None
    if pixels.shape != tuple(shape):
        actual_size, expected_size = (f"{height} x {width}" for _, height, width in (pixels.shape, shape))
        raise DataError(
            f"is {actual_size} pixels, but the model was trained on {expected_size}",
            where=name,
            fix="scale it; a job with data.resize takes pictures of any size",
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
            f"a {type(image).__name__} is no picture", where=WHERE, fix="give paths, URLs, bytes or Pillow images"
        )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
