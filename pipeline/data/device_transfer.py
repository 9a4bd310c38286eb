"""Arrays as tensors: where they lie (here, or resident on a GPU), and how they get to the device."""

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
"""A split that takes up to this share of a GPU's free memory lies there for the whole run."""

COPY_BLOCK_BYTES = 64 << 20
"""What is copied to a GPU at once, so that a split that lies there never lies in this machine's memory as a whole."""

TensorPair = tuple[Tensor, Tensor]


class LazyArray(Protocol):
    """Rows that are made when they are asked for: what a loader takes in place of an array of inputs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Some rows, as indexing an array would give them."""


@dataclass(frozen=True, eq=False)
class DatasetTensors:
    """What a loader gathers from.

    inputs: raw samples (N, ...), uint8 or floating. targets: (N,) or (N, T).
    rows: positions of the loader's rows in both, int64 (n,), in this machine's memory.
    """

    inputs: Tensor | LazyArray
    targets: Tensor
    indices: np.ndarray

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def sample_bytes(self) -> int:
        """Size of a sample and its target."""
        return sum(math.prod(values.shape[1:]) * values.dtype.itemsize for values in (self.inputs, self.targets))

    def slice_rows(self, first: int, end: int) -> TensorPair:
        """Consecutive rows, first to end; views where there is something to view."""
        inputs = self.inputs[first:end]
        return inputs if isinstance(inputs, Tensor) else torch.from_numpy(inputs), self.targets[first:end]


def to_tensors(dataset_part: DatasetPart, indices: np.ndarray, device: torch.device) -> DatasetTensors:
    """Views of the arrays; or, on a GPU with room for it, a copy of the rows alone that stays there.

    Rows that are made on demand are made anew each time.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
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
    """Some rows on a GPU, copied a block at a time."""
    resident = torch.empty((len(indices), *values.shape[1:]), dtype=values.dtype, device=device)
    size = max(1, COPY_BLOCK_BYTES // max(1, math.prod(values.shape[1:]) * values.itemsize))
    for block, block_indices in zip(resident.split(size), torch.from_numpy(indices).split(size), strict=True):
        block.copy_(values.index_select(0, block_indices))
    return resident


def prefetch_to_device(pairs: Iterator[TensorPair], device: torch.device) -> Iterator[TensorPair]:
    """Pairs of tensors on the device, in order; on CUDA each is under way while the one before it is worked on."""
    if device.type == "cpu":
        return pairs
    if device.type == "cuda":
        return _double_buffer(pairs, device)
    return ((inputs.to(device), targets.to(device)) for inputs, targets in pairs)


def _double_buffer(pairs: Iterator[TensorPair], device: torch.device) -> Iterator[TensorPair]:
    """Copies run on a stream of their own; the stream that computes waits for its batch alone, the host for none."""
    copies = torch.cuda.Stream(device)

    def start(pair: TensorPair) -> tuple[TensorPair, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            inputs, targets = (tensor.to(device, non_blocking=True) for tensor in pair)
        return (inputs, targets), copies.record_event()

    def finish(started: tuple[TensorPair, torch.cuda.Event]) -> TensorPair:
        pair, arrived = started
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        for tensor in pair:
            tensor.record_stream(computing)  # else its memory could be given to the next copy too early
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
    """Inputs and targets of some rows, (b, ...) each, where the tensors lie.

    rows: int64 (b,), on the tensors' device. pin: into page-locked memory, which a GPU can copy from by itself.
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
