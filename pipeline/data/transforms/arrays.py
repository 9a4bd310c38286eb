"""Transforms of arrays and images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.config import IMAGENET, JobConfig, NormalizeConfig
from pipeline.data.dataset import DatasetPart
from pipeline.data.serialization import ENCODINGS_VERSION, VERSION, check_stored_values
from pipeline.data.statistics import compute_mean_and_std, compute_min_and_max
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.transforms.column_statistics import compute_statistics
from pipeline.data.transforms.number_encodings import (
    ENCODING_KINDS,
    QUARTILES,
    EncodingKind,
    Knots,
    check_knots,
    compute_knots,
    compute_robust_scale,
    count_outputs,
    make_encoding_fn,
    select_encoding,
)
from pipeline.errors import DataError

UINT8_MAX = 255.0
"""The divisor that brings uint8 images to [0, 1]."""

WHERE = "data.normalize"

MAX_SAMPLE_VALUES = 2**28
"""Values per sample; a stored transform with more is damaged."""

ScalingKind = Literal["none", "unit", "scaled"] | EncodingKind
TransformFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ArrayTransform:
    """How raw samples are transformed: plain values, the same for training, evaluation and prediction.

    kind: none: unchanged. unit: uint8 / 255. scaled: (x - mean) / std. Others are for samples (F,), see
        `number_encodings`.
    dtype: NumPy's name of the raw samples' type; uint8 samples are divided by 255 before they are scaled.
    sample_shape: of a raw sample: (H, W), (C, H, W), (F,), or more axes.
    mean, std: one number, or one for each channel (images) or column; empty for none and unit.
    names: of the columns of samples (F,) that are rows of a data frame; else empty.
    low, high: the smallest and the largest value in training of named floating-point columns. They are not used by the
        transform: new data is compared with them.
    knots: for each column, what its encoding was fitted to, for quantile and piecewise.
    """

    kind: ScalingKind
    dtype: str
    sample_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    knots: Knots = ()

    @property
    def encoding(self) -> EncodingKind | None:
        """The encoding of numbers other than (x - mean) / std, if any."""
        return None if self.kind == "none" or self.kind == "unit" or self.kind == "scaled" else self.kind

    @property
    def null_fractions(self) -> tuple[float, ...]:
        """Empty: arrays have no missing values."""
        return ()

    @property
    def named_columns(self) -> Schema:
        """The columns of a sample, if they have names."""
        return Schema(tuple(Column(name, "number") for name in self.names))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a transformed sample: that of a raw one; images of two axes get a channel axis in front. With
        `piecewise` it is wider."""
        if self.encoding is not None:
            return (count_outputs(self.encoding, self.sample_shape[0], self.knots),)
        return (1, *self.sample_shape) if len(self.sample_shape) == 2 else self.sample_shape

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Empty: only tables have columns of codes."""
        return ()

    @property
    def num_numbers(self) -> int:
        """How many of the first elements of a transformed sample (F,) are numbers: all."""
        return math.prod(self.output_shape)

    @property
    def schema(self) -> Schema | None:
        """None: only tables have one."""
        return None

    @property
    def channels(self) -> int:
        """Channels of an image, or columns."""
        return 1 if len(self.sample_shape) == 2 else self.sample_shape[0]

    def check_missing_values(self, raw: np.ndarray, schema: Schema | None = None) -> None:
        """Do nothing: arrays have no missing values."""

    def make_transform_fn(
        self, device: torch.device, dtype: torch.dtype, input_schema: Schema | None = None
    ) -> TransformFn:
        """Return a function from raw samples (B, *sample_shape) on `device` to (B, *output_shape) of `dtype`.

        Its result never shares memory with its argument.
        """
        assert input_schema is None, "arrays have no schema"
        is_gray = len(self.sample_shape) == 2
        scale = self._make_scaling_fn(device, dtype)

        def transform(raw: Tensor) -> Tensor:
            scaled = scale(raw)
            return scaled.unsqueeze(1) if is_gray else scaled

        return transform

    def _make_scaling_fn(self, device: torch.device, dtype: torch.dtype) -> TransformFn:
        if self.kind == "none":
            return lambda raw: raw.to(dtype, copy=True)
        if self.kind == "unit":
            return lambda raw: raw.to(dtype, copy=True).div_(UINT8_MAX)
        # Columns far from zero keep their digits only if the mean is subtracted first; then float64 is not needed.
        work = torch.float64 if self.dtype == "float64" else dtype
        if self.encoding is not None:
            encode = make_encoding_fn(self.encoding, self.mean, self.mean, self.std, self.knots, device, work)
            return lambda raw: encode(raw.to(work)).to(dtype)
        mean = torch.tensor(self.mean, dtype=torch.float64)
        std = torch.tensor(self.std, dtype=torch.float64)
        if len(self.sample_shape) > 2:
            mean, std = (values.view(-1, *[1] * (len(self.sample_shape) - 1)) for values in (mean, std))
        if self.dtype == "uint8":
            # One operation: for 0 to 255, scaling before the mean is subtracted costs no digits.
            factor, offset = ((values.to(device, dtype)) for values in (1 / (UINT8_MAX * std), -mean / std))
            return lambda raw: torch.addcmul(offset, raw.to(dtype), factor)
        mean, factor = mean.to(device, work), (1 / std).to(device, work)
        return lambda raw: (raw.to(work) - mean).mul_(factor).to(dtype)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `input_transform_from_json` restores the same object from them."""
        return {
            "version": VERSION if self.encoding is None else ENCODINGS_VERSION,
            "kind": self.kind,
            "dtype": self.dtype,
            "sample_shape": list(self.sample_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            **{name: list(getattr(self, name)) for name in ("names", "low", "high") if self.names},
            **({"knots": [list(values) for values in self.knots]} if self.knots else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ArrayTransform:
        """Restore an object from the values that `to_json` returned.

        Raises
        ------
        DataError: the values were written by another version, or are damaged.
        """
        with check_stored_values(values):
            kind, dtype = str(values["kind"]), str(values["dtype"])
            shape = tuple(int(size) for size in values["sample_shape"])
            mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
            if kind not in ("none", "unit", "scaled", *ENCODING_KINDS):
                raise ValueError(f"kind {kind!r}")
            names = tuple(str(name) for name in values.get("names", ()))
            low, high = (tuple(float(value) for value in values.get(name, ())) for name in ("low", "high"))
            knots = tuple(tuple(map(float, positions)) for positions in values.get("knots", ()))
            result = cls(cast(ScalingKind, kind), dtype, shape, mean, std, names, low, high, knots)
            if names and (shape != (len(names),) or len(low) not in (0, len(names)) or len(high) != len(low)):
                raise ValueError(f"{len(names)} names, {len(low)} and {len(high)} ends for samples of shape {shape}")
            if min(shape, default=0) < 1 or math.prod(shape) > MAX_SAMPLE_VALUES:
                raise ValueError(f"samples of shape {shape}")
            if result.encoding is not None and len(shape) != 1:
                raise ValueError(f"kind {kind!r} for samples of shape {shape}")
            check_knots(result.encoding, result.channels, knots)
            expected_lengths = (
                (result.channels,)
                if result.encoding is not None
                else (1, result.channels)
                if kind == "scaled"
                else (0,)
            )
            if len(mean) not in expected_lengths or len(std) not in expected_lengths:
                raise ValueError(f"{len(mean)} means and {len(std)} deviations for {result.channels} channels")
        return result


def fit_array_transform(
    job: JobConfig, dataset_part: DatasetPart, indices: np.ndarray, column_names: tuple[str, ...] = ()
) -> ArrayTransform:
    """Fit what `data.normalize` and `model.numeric_embedding` ask for; auto is unit for uint8 and standard for other
    numbers.

    Parameters
    ----------
    dataset_part: the training part of the dataset.
    indices: the training split in it, int64 (n,): no other row is read.
    column_names: empty if the columns have no names.

    Raises
    ------
    DataError: the normalization does not fit the samples.
    """
    normalize, inputs = job.data.normalize, dataset_part.inputs
    if normalize == "auto":
        normalize = "unit" if inputs.dtype == np.uint8 else "standard"
    low, high = compute_min_and_max(inputs, indices) if column_names and inputs.dtype.kind == "f" else ((), ())
    plain = ArrayTransform("none", inputs.dtype.name, tuple(inputs.shape[1:]), names=column_names, low=low, high=high)
    if (encoding := select_encoding(job)) is not None:
        return _fit_encoding(encoding, plain, inputs, indices)
    if normalize == "none":
        return plain
    if normalize == "unit":
        if inputs.dtype != np.uint8:
            raise DataError(
                f"unit is for uint8 images, but the inputs are {inputs.dtype}",
                where=WHERE,
                fix="use standard, scalar or none",
            )
        return replace(plain, kind="unit")
    if normalize == "imagenet":
        if len(plain.sample_shape) != 3 or plain.channels != 3:
            raise DataError(
                f"imagenet is for images of 3 channels, but a sample has the shape {plain.sample_shape}",
                where=WHERE,
                fix="use data.mode: rgb, or another normalization",
            )
        normalize = IMAGENET
    if isinstance(normalize, NormalizeConfig):
        mean, std = fixed_mean_and_std(normalize, plain.channels)
    else:
        mean, std = compute_mean_and_std(inputs, indices, per_channel=normalize == "standard")
        if inputs.dtype == np.uint8:
            mean, std = mean / UINT8_MAX, std / UINT8_MAX
        std = np.where(std == 0, 1.0, std)
    return replace(plain, kind="scaled", mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _fit_encoding(
    encoding: EncodingKind, plain: ArrayTransform, inputs: np.ndarray, indices: np.ndarray
) -> ArrayTransform:
    if len(plain.sample_shape) != 1 or inputs.dtype.kind != "f":
        raise DataError(
            f"{encoding} is for columns of numbers, but a sample is {inputs.dtype} of shape {plain.sample_shape}",
            where="model.numeric_embedding" if encoding == "piecewise" else WHERE,
            fix="use none" if encoding == "piecewise" else "use unit, standard, scalar or none",
        )
    columns = np.arange(inputs.shape[1])
    schema = Schema((Column("", "number", len(columns)),))
    statistics = compute_statistics(inputs, indices, schema, probabilities=QUARTILES if encoding == "robust" else ())
    center, scale = statistics.mean, np.sqrt(statistics.variance)
    if encoding == "robust":
        first, center, third = (statistics.quantiles[quartile] for quartile in QUARTILES)
        scale = compute_robust_scale(first, third, statistics.low, statistics.high)
    knots = compute_knots(encoding, inputs, indices, columns, center)
    return replace(plain, kind=encoding, mean=tuple(center.tolist()), std=tuple(scale.tolist()), knots=knots)


def fixed_mean_and_std(config: NormalizeConfig, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the job's fixed means and standard deviations, float64 (1,) or (channels,) each.

    Raises
    ------
    DataError: their number does not fit, or they cannot be used.
    """
    mean, std = (np.atleast_1d(np.asarray(value, dtype=np.float64)) for value in (config.mean, config.std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise DataError(
                f"{len(values)} numbers for {channels} channels or columns",
                where=f"{WHERE}.{name}",
                fix=f"use 1 or {channels}",
            )
        if not np.isfinite(values).all() or (name == "std" and (values <= 0).any()):
            raise DataError(
                f"{values.tolist()} holds a number that cannot be used",
                where=f"{WHERE}.{name}",
                fix="use finite numbers, and standard deviations above 0",
            )
    return mean, std
