"""A rank's share of each global batch, gathered from where the data lies."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.sampler import GlobalBatches, share
from pipeline.data.tensors import Pair, Tensors, gather


class Shares:
    """A rank's share of each global batch, by step."""

    def __init__(self, tensors: Tensors, batches: GlobalBatches, rank: int, world_size: int, *, pin: bool) -> None:
        self._tensors, self._batches = tensors, batches
        self._rank, self._world_size = rank, world_size
        self._pin = pin
        self._order: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))

    def bounds(self, step: int) -> tuple[int, int, slice]:
        """First and end of a step's global batch in its epoch's order, and this rank's part of the batch."""
        first, end = self._batches.bounds(self._batches.locate(step)[1])
        return first, end, share(end - first, self._rank, self._world_size)

    def step_bytes(self) -> int:
        """Size of this rank's share of a full batch."""
        row_bytes = sum(values[:1].nbytes for values in (self._tensors.inputs, self._tensors.targets))
        return row_bytes * -(-self._batches.batch_size // self._world_size)

    def rows(self, step: int) -> Tensor:
        """Where this rank's samples of a step lie in the tensors: int64 (b,), on their device."""
        epoch, _ = self._batches.locate(step)
        if self._order[0] != epoch:
            rows = torch.from_numpy(self._tensors.rows[self._batches.order(epoch)])
            self._order = (epoch, rows.to(self._tensors.device))
        first, _, mine = self.bounds(step)
        return self._order[1][first + mine.start : first + mine.stop]

    def gathered(self, rows: Tensor) -> Pair:
        return gather(self._tensors, rows, self._pin)
