"""Raw samples from what users hold in their hands: frames and tables, arrays and tensors, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.pictures import BrokenPictureError, Form, TooSmallError, decode, quiet
from pipeline.data.preprocess import Preprocess, SamplePreprocess, TablePreprocess
from pipeline.data.sources.image_folder.files import Files
from pipeline.data.tables.encode import encode, to_arrow
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
        return _rows(data, preprocess, np.float64 if job.train.precision == "fp64" else np.float32)
    if job.data.source == "image_folder" and isinstance(data, Sequence):
        return np.stack([_picture(one, job) for one in data]) if data else np.empty((0, *preprocess.sample_shape))
    return _arrays(data, preprocess)


def _rows(data: Any, preprocess: TablePreprocess, dtype: type[np.float32] | type[np.float64]) -> np.ndarray:
    schema = preprocess.schema
    if isinstance(data, np.ndarray | torch.Tensor) and not preprocess.categories:
        rows = np.asarray(data, dtype)
        if rows.ndim != 2 or rows.shape[1] != schema.width:
            names = ", ".join(column.name for column in schema.columns)
            raise DataError(
                f"has the shape {rows.shape}, not (N, {schema.width})",
                where=WHERE,
                fix=f"one row a sample, with these columns in this order: {names}",
            )
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
    return np.ascontiguousarray(samples, wanted_type)


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
    import io

    buffer = io.BytesIO()
    one.save(buffer, format="PNG")
    return buffer.getvalue()
