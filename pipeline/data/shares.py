"""A rank's share of each global batch, gathered from where the data lies, here or by loader processes."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import needed, sent
from pipeline.data.processes import made
from pipeline.data.sampler import GlobalBatches, share
from pipeline.data.tensors import Pair, Tensors, gather

FETCH_BYTES = 1 << 20
"""What a loader process hands over at once, in whole steps: each hand-over takes it and the worker about 2 ms."""


class Shares:
    """A rank's share of each global batch, by step; with mixup, and the partners that the share takes.

    mixing: the seed of the stream "augment" where samples are mixed, else None.
    """

    def __init__(
        self,
        tensors: Tensors,
        batches: GlobalBatches,
        rank: int,
        world_size: int,
        *,
        pin: bool,
        mixing: int | None = None,
    ) -> None:
        self._tensors, self._batches = tensors, batches
        self._rank, self._world_size = rank, world_size
        self._pin, self._mixing = pin, mixing
        self._order: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))

    def bounds(self, step: int) -> tuple[int, int, slice]:
        """First and end of a step's global batch in its epoch's order, and this rank's part of the batch."""
        first, end = self._batches.bounds(self._batches.locate(step)[1])
        return first, end, share(end - first, self._rank, self._world_size)

    def step_bytes(self) -> int:
        """Size of this rank's share of a full batch."""
        return self._tensors.row_bytes * -(-self._batches.batch_size // self._world_size)

    def positions(self, step: int) -> np.ndarray:
        """Which samples of the global batch this rank takes, its own first: int64 (b + e,)."""
        first, end, local_slice = self.bounds(step)
        if self._mixing is None:
            return np.arange(local_slice.start, local_slice.stop, dtype=np.int64)
        return needed(self._mixing, step, end - first, local_slice)

    def size(self, step: int) -> int:
        """How many samples this rank takes."""
        _, _, mine = self.bounds(step)
        return mine.stop - mine.start if self._mixing is None else len(self.positions(step))

    def rows(self, step: int) -> Tensor:
        """Where the samples that this rank takes lie in the tensors: int64 (b + e,), on their device."""
        epoch, _ = self._batches.locate(step)
        if self._order[0] != epoch:
            rows = torch.from_numpy(self._tensors.rows[self._batches.order(epoch)])
            self._order = (epoch, rows.to(self._tensors.device))
        first, _, mine = self.bounds(step)
        if self._mixing is None:
            return self._order[1][first + mine.start : first + mine.stop]
        return self._order[1][sent(torch.from_numpy(first + self.positions(step)), self._tensors.device)]

    def gathered(self, rows: Tensor) -> Pair:
        return gather(self._tensors, rows, self._pin)


def fetched(shares: Shares, steps: range, processes: int, pin: bool) -> Generator[Pair]:
    """Batches from loader processes, which live as long as this generator; several steps come in one piece."""
    step_bytes = shares.step_bytes()
    stride = max(1, min(FETCH_BYTES // max(step_bytes, 1), len(steps) // processes))
    step_ranges = [steps[first : first + stride] for first in range(0, len(steps), stride)]

    def fetch(piece: range) -> Pair:
        return shares.gathered(torch.cat([shares.rows(step) for step in piece]))

    for step_range, (inputs, targets) in zip(step_ranges, made(fetch, step_ranges, processes, pin), strict=True):
        sizes = [shares.size(step) for step in step_range]
        yield from zip(inputs.split(sizes), targets.split(sizes), strict=True)
