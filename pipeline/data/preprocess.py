"""From raw samples to what a model takes: fitted on the training rows alone, stored with every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.data.sources.arrays import Arrays
from pipeline.data.statistics import mean_and_std
from pipeline.errors import DataError
from pipeline.job import Job, Normalization

VERSION = 1

WHITE = 255.0
"""What uint8 images are divided by, so that they lie in [0, 1]."""

WHERE = "data.normalize"

Kind = Literal["none", "unit", "scaled"]
Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preprocess:
    """How raw samples are prepared: plain values, the same for training, evaluation and prediction.

    kind: none: as they are. unit: uint8 / 255. scaled: (x - mean) / std.
    dtype: NumPy's name of the raw samples' type; uint8 samples are divided by 255 before they are scaled.
    sample_shape: of a raw sample: (H, W), (C, H, W), (F,), or further.
    mean, std: one number, or one for each channel (images) or column; empty unless scaled.
    """

    kind: Kind
    dtype: str
    sample_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a prepared sample: as the raw one, images of two axes with a channel before them."""
        return (1, *self.sample_shape) if len(self.sample_shape) == 2 else self.sample_shape

    @property
    def channels(self) -> int:
        """Channels of an image, or columns."""
        return self.output_shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Prepare:
        """A function from raw samples (B, *sample_shape) on `device` to prepared ones (B, *output_shape) of `dtype`.

        The result never shares memory with its argument.
        """
        grey = len(self.sample_shape) == 2
        scale = self._scaling(device, dtype)

        def prepare(raw: Tensor) -> Tensor:
            prepared = scale(raw)
            return prepared.unsqueeze(1) if grey else prepared

        return prepare

    def _scaling(self, device: torch.device, dtype: torch.dtype) -> Prepare:
        if self.kind == "none":
            return lambda raw: raw.to(dtype, copy=True)
        if self.kind == "unit":
            return lambda raw: raw.to(dtype).div_(WHITE)
        mean = torch.tensor(self.mean, dtype=torch.float64)
        std = torch.tensor(self.std, dtype=torch.float64)
        if len(self.sample_shape) > 2:
            mean, std = (values.view(-1, *[1] * (len(self.sample_shape) - 1)) for values in (mean, std))
        if self.dtype == "uint8":
            # One operation: 0 to 255 lose nothing by being scaled before the mean is taken off.
            factor, offset = ((values.to(device, dtype)) for values in (1 / (WHITE * std), -mean / std))
            return lambda raw: torch.addcmul(offset, raw.to(dtype), factor)
        # Columns far from zero keep their digits only if the mean goes first.
        mean, factor = mean.to(device, dtype), (1 / std).to(device, dtype)
        return lambda raw: (raw.to(dtype) - mean).mul_(factor)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same object back."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "dtype": self.dtype,
            "sample_shape": list(self.sample_shape),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocess:
        """What `to_json` gave.

        Raises
        ------
        DataError: written by another version, or damaged.
        """
        if values.get("version") != VERSION:
            raise DataError(
                f"version {values.get('version')!r} of preprocessing; this program knows {VERSION}",
                where="preprocess.json",
                fix="use the version of Trainyard that wrote it",
            )
        try:
            kind, dtype = str(values["kind"]), str(values["dtype"])
            shape = tuple(int(size) for size in values["sample_shape"])
            mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"damaged: {error!r}", where="preprocess.json") from error
        if kind not in ("none", "unit", "scaled"):
            raise DataError(f"damaged: kind {kind!r}", where="preprocess.json")
        return cls(cast(Kind, kind), dtype, shape, mean, std)


def fit_preprocess(job: Job, arrays: Arrays, rows: np.ndarray) -> Preprocess:
    """Fit what `data.normalize` asks for.

    Parameters
    ----------
    arrays: the training part of the source.
    rows: positions of the training split in it, int64 (n,): no other row is looked at.

    Raises
    ------
    DataError: a normalisation that does not fit the samples.
    """
    wanted, inputs = job.data.normalize, arrays.inputs
    plain = Preprocess("none", inputs.dtype.name, tuple(inputs.shape[1:]))
    if wanted == "none":
        return plain
    if wanted == "unit":
        if inputs.dtype != np.uint8:
            raise DataError(
                f"unit is for images of bytes, but the inputs are {inputs.dtype}",
                where=WHERE,
                fix="use standard, scalar or none",
            )
        return replace(plain, kind="unit")
    if isinstance(wanted, Normalization):
        mean, std = _given(wanted, plain)
    else:
        channelled = inputs[:, None] if len(plain.sample_shape) == 2 else inputs
        mean, std = mean_and_std(channelled, rows, per_channel=wanted == "standard")
        if inputs.dtype == np.uint8:
            mean, std = mean / WHITE, std / WHITE
        std = np.where(std == 0, 1.0, std)
    return replace(plain, kind="scaled", mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _given(wanted: Normalization, plain: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (np.atleast_1d(np.asarray(value, dtype=np.float64)) for value in (wanted.mean, wanted.std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, plain.channels):
            raise DataError(
                f"{len(values)} numbers for {plain.channels} channels or columns",
                where=f"{WHERE}.{name}",
                fix=f"give 1 or {plain.channels}",
            )
        if not np.isfinite(values).all() or (name == "std" and (values <= 0).any()):
            raise DataError(
                f"{values.tolist()} holds a number that cannot be used",
                where=f"{WHERE}.{name}",
                fix="finite numbers, and deviations above 0",
            )
    return mean, std
