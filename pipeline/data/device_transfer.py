"""Arrays as tensors, in host memory or resident on a GPU, and their transfer to the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import DatasetPart

MAX_RESIDENT_FRACTION = 0.25
"""A split that takes up to this fraction of a GPU's free memory is kept there for the whole run."""

COPY_BLOCK_BYTES = 64 << 20
"""Bytes that are copied to a GPU at once, so that a split that is resident there is never in host memory as a whole."""

TensorPair = tuple[Tensor, Tensor]


class LazyArray(Protocol):
    """Rows that are computed when they are indexed: loaders accept it in place of an array of inputs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return some rows, as indexing an array would."""


@dataclass(frozen=True, eq=False)
class DatasetTensors:
    """The tensors that a loader gathers batches from.

    inputs: raw samples (N, ...), uint8 or floating. targets: (N,) or (N, T).
    indices: positions of the loader's rows in both, int64 (n,), in host memory.
    """

    inputs: Tensor | LazyArray
    targets: Tensor
    indices: np.ndarray

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def sample_bytes(self) -> int:
        """Size of a sample and its target, in bytes."""
        return sum(math.prod(values.shape[1:]) * values.dtype.itemsize for values in (self.inputs, self.targets))

    def slice_rows(self, first: int, end: int) -> TensorPair:
        """Return consecutive rows, first to end; views, unless inputs are a `LazyArray`."""
        inputs = self.inputs[first:end]
        return inputs if isinstance(inputs, Tensor) else torch.from_numpy(inputs), self.targets[first:end]


def to_tensors(dataset_part: DatasetPart, indices: np.ndarray, device: torch.device) -> DatasetTensors:
    """Return views of the arrays; or, on a GPU with enough free memory, a resident copy of the given rows only.

    Rows of a `LazyArray` are computed again each time they are read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the tensors are only read
        inputs = (
            torch.from_numpy(dataset_part.inputs)
            if isinstance(dataset_part.inputs, np.ndarray)
            else dataset_part.inputs
        )
        tensors = DatasetTensors(inputs, torch.from_numpy(dataset_part.targets), indices)
    if device.type != "cuda" or not isinstance(tensors.inputs, Tensor):
        return tensors
    if len(indices) * tensors.sample_bytes >= MAX_RESIDENT_FRACTION * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return DatasetTensors(
        _copy_to_device_in_blocks(tensors.inputs, indices, device),
        _copy_to_device_in_blocks(tensors.targets, indices, device),
        np.arange(len(indices), dtype=np.int64),
    )


def _copy_to_device_in_blocks(values: Tensor, indices: np.ndarray, device: torch.device) -> Tensor:
    """Copy some rows to a GPU, a block at a time."""
    resident = torch.empty((len(indices), *values.shape[1:]), dtype=values.dtype, device=device)
    size = max(1, COPY_BLOCK_BYTES // max(1, math.prod(values.shape[1:]) * values.itemsize))
    for block, block_indices in zip(resident.split(size), torch.from_numpy(indices).split(size), strict=True):
        block.copy_(values.index_select(0, block_indices))
    return resident


def prefetch_to_device(pairs: Iterator[TensorPair], device: torch.device) -> Iterator[TensorPair]:
    """Yield the pairs of tensors on the device, in order; on CUDA each is copied while the one before it is in use."""
    if device.type == "cpu":
        return pairs
    if device.type == "cuda":
        return _double_buffer(pairs, device)
    return ((inputs.to(device), targets.to(device)) for inputs, targets in pairs)


def _double_buffer(pairs: Iterator[TensorPair], device: torch.device) -> Iterator[TensorPair]:
    """Copies run on a separate stream. The computing stream waits only for its batch; the host does not wait."""
    copy_stream = torch.cuda.Stream(device)

    def start(pair: TensorPair) -> tuple[TensorPair, torch.cuda.Event]:
        with torch.cuda.stream(copy_stream):
            inputs, targets = (tensor.to(device, non_blocking=True) for tensor in pair)
        return (inputs, targets), copy_stream.record_event()

    def finish(started: tuple[TensorPair, torch.cuda.Event]) -> TensorPair:
        pair, copied = started
        compute_stream = torch.cuda.current_stream(device)
        compute_stream.wait_event(copied)
        for tensor in pair:
            tensor.record_stream(compute_stream)  # else its memory could be given to the next copy too early
        return pair

    pending: tuple[TensorPair, torch.cuda.Event] | None = None
    for pair in pairs:
        next_copy = start(pair)
        if pending is not None:
            yield finish(pending)
        pending = next_copy
    if pending is not None:
        yield finish(pending)


def index_rows(tensors: DatasetTensors, indices: Tensor, pin: bool) -> TensorPair:
    """Return inputs and targets of some rows, (b, ...) each, on the tensors' device.

    indices: int64 (b,), on the tensors' device. pin: whether to return page-locked memory, from which a GPU copies
    without the host.
    """
    if not isinstance(tensors.inputs, Tensor):
        inputs = torch.from_numpy(tensors.inputs[indices.numpy()])
        return inputs.pin_memory() if pin else inputs, _index_select(tensors.targets, indices, pin)
    return _index_select(tensors.inputs, indices, pin), _index_select(tensors.targets, indices, pin)


def _index_select(values: Tensor, indices: Tensor, pin: bool) -> Tensor:
    if not pin:
        return values.index_select(0, indices)
    gathered = torch.empty((len(indices), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
    return torch.index_select(values, 0, indices, out=gathered)
