"""Arrays as tensors: where they lie (here, or resident on a GPU), and how they get to the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.sources.arrays import Arrays

RESIDENT_SHARE = 0.25
"""A split that takes up to this share of a GPU's free memory lies there for the whole run."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Tensors:
    """What a loader gathers from.

    inputs: raw samples (N, ...), uint8 or floating. targets: (N,) or (N, T).
    rows: positions of the loader's rows in both, int64 (n,), in this machine's memory.
    """

    inputs: Tensor
    targets: Tensor
    rows: np.ndarray

    @property
    def device(self) -> torch.device:
        return self.inputs.device


def place(arrays: Arrays, rows: np.ndarray, device: torch.device) -> Tensors:
    """Views of the arrays; or, on a GPU with room for it, a copy of the rows alone that stays there."""
    row_bytes = sum(values[:1].nbytes for values in (arrays.inputs, arrays.targets))
    if device.type == "cuda" and len(rows) * row_bytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        inputs, targets = (torch.from_numpy(values[rows]).to(device) for values in (arrays.inputs, arrays.targets))
        return Tensors(inputs, targets, np.arange(len(rows), dtype=np.int64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
        return Tensors(torch.from_numpy(arrays.inputs), torch.from_numpy(arrays.targets), rows)


def moved(pairs: Iterator[Pair], device: torch.device) -> Iterator[Pair]:
    """Pairs of tensors on the device, in order; on CUDA each is under way while the one before it is worked on."""
    if device.type == "cpu":
        return pairs
    if device.type == "cuda":
        return _one_ahead(pairs, device)
    return ((inputs.to(device), targets.to(device)) for inputs, targets in pairs)


def _one_ahead(pairs: Iterator[Pair], device: torch.device) -> Iterator[Pair]:
    """Copies run on a stream of their own; the stream that computes waits for its batch alone, the host for none."""
    copies = torch.cuda.Stream(device)

    def start(pair: Pair) -> tuple[Pair, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            inputs, targets = (tensor.to(device, non_blocking=True) for tensor in pair)
        return (inputs, targets), copies.record_event()

    def finish(started: tuple[Pair, torch.cuda.Event]) -> Pair:
        pair, arrived = started
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        for tensor in pair:
            tensor.record_stream(computing)  # else its memory could be given to the next copy too early
        return pair

    under_way: tuple[Pair, torch.cuda.Event] | None = None
    for pair in pairs:
        coming = start(pair)
        if under_way is not None:
            yield finish(under_way)
        under_way = coming
    if under_way is not None:
        yield finish(under_way)


def gather(tensors: Tensors, rows: Tensor, pin: bool) -> Pair:
    """Inputs and targets of some rows, (b, ...) each, where the tensors lie.

    rows: int64 (b,), on the tensors' device. pin: into page-locked memory, which a GPU can copy from by itself.
    """
    if not pin:
        return tensors.inputs.index_select(0, rows), tensors.targets.index_select(0, rows)
    inputs, targets = (
        torch.empty((len(rows), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
        for values in (tensors.inputs, tensors.targets)
    )
    torch.index_select(tensors.inputs, 0, rows, out=inputs)
    torch.index_select(tensors.targets, 0, rows, out=targets)
    return inputs, targets
