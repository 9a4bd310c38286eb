"""A rank's share of each global batch, gathered from where the data lies, here or by loader processes."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import copy_to_device_async, required_positions
from pipeline.data.processes import map_in_processes
from pipeline.data.sampler import GlobalBatchSampler, rank_slice
from pipeline.data.tensors import DatasetTensors, TensorPair, index_rows

FETCH_BYTES = 1 << 20
"""What a loader process hands over at once, in whole steps: each hand-over takes it and the worker about 2 ms."""


class RankBatches:
    """A rank's share of each global batch, by step; with mixup, and the partners that the share takes.

    mixing: the seed of the stream "augment" where samples are mixed, else None.
    """

    def __init__(
        self,
        tensors: DatasetTensors,
        sampler: GlobalBatchSampler,
        rank: int,
        world_size: int,
        *,
        pin: bool,
        mixup_seed: int | None = None,
    ) -> None:
        self._tensors, self._sampler = tensors, sampler
        self._rank, self._world_size = rank, world_size
        self._pin, self._mixup_seed = pin, mixup_seed
        self._epoch_indices: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))

    def bounds(self, step: int) -> tuple[int, int, slice]:
        """First and end of a step's global batch in its epoch's order, and this rank's part of the batch."""
        first, end = self._sampler.bounds(self._sampler.epoch_and_position(step)[1])
        return first, end, rank_slice(end - first, self._rank, self._world_size)

    def step_bytes(self) -> int:
        """Size of this rank's share of a full batch."""
        return self._tensors.sample_bytes * -(-self._sampler.batch_size // self._world_size)

    def positions(self, step: int) -> np.ndarray:
        """Which samples of the global batch this rank takes, its own first: int64 (b + e,)."""
        first, end, local_slice = self.bounds(step)
        if self._mixup_seed is None:
            return np.arange(local_slice.start, local_slice.stop, dtype=np.int64)
        return required_positions(self._mixup_seed, step, end - first, local_slice)

    def num_samples(self, step: int) -> int:
        """How many samples this rank takes."""
        _, _, mine = self.bounds(step)
        return mine.stop - mine.start if self._mixup_seed is None else len(self.positions(step))

    def row_indices(self, step: int) -> Tensor:
        """Where the samples that this rank takes lie in the tensors: int64 (b + e,), on their device."""
        epoch, _ = self._sampler.epoch_and_position(step)
        if self._epoch_indices[0] != epoch:
            rows = torch.from_numpy(self._tensors.indices[self._sampler.epoch_permutation(epoch)])
            self._epoch_indices = (epoch, rows.to(self._tensors.device))
        first, _, mine = self.bounds(step)
        if self._mixup_seed is None:
            return self._epoch_indices[1][first + mine.start : first + mine.stop]
        return self._epoch_indices[1][
            copy_to_device_async(torch.from_numpy(first + self.positions(step)), self._tensors.device)
        ]

    def gather(self, rows: Tensor) -> TensorPair:
        return index_rows(self._tensors, rows, self._pin)


def fetch_batches(rank_batches: RankBatches, steps: range, num_processes: int, pin: bool) -> Generator[TensorPair]:
    """Batches from loader processes, which live as long as this generator; several steps come in one piece."""
    step_bytes = rank_batches.step_bytes()
    stride = max(1, min(FETCH_BYTES // max(step_bytes, 1), len(steps) // num_processes))
    step_ranges = [steps[first : first + stride] for first in range(0, len(steps), stride)]

    def fetch(piece: range) -> TensorPair:
        return rank_batches.gather(torch.cat([rank_batches.row_indices(step) for step in piece]))

    for step_range, (inputs, targets) in zip(
        step_ranges, map_in_processes(fetch, step_ranges, num_processes, pin), strict=True
    ):
        sizes = [rank_batches.num_samples(step) for step in step_range]
        yield from zip(inputs.split(sizes), targets.split(sizes), strict=True)
