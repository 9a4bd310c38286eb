"""Which rows a step takes: the samples of global step s are a function of (seed, epoch, s) alone."""

from __future__ import annotations

import numpy as np

from pipeline.data.rng import make_generator, random_permutation


class GlobalBatchSampler:
    """The global batches of a run: each epoch is the training split once, in blocks of `batch_size`.

    Nothing here depends on what was asked before, so a run can begin at any step. One order is kept in memory.

    Parameters
    ----------
    rows: size of the training split, at least 1.
    batch_size: rows of a global batch; the last one of an epoch may be short.
    shuffle: a new order each epoch, or always the order of the split.
    seed: the job's seed of the stream "shuffle".
    """

    def __init__(self, rows: int, batch_size: int, *, shuffle: bool, seed: int) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(f"rows and batch_size must be at least 1, not {rows} and {batch_size}")
        self.num_rows = rows
        self.batch_size = batch_size
        self.steps_per_epoch = -(-rows // batch_size)
        self._shuffle = shuffle
        self._seed = seed
        self._cached: tuple[int, np.ndarray] = (0, np.arange(rows, dtype=np.int64))

    def epoch_and_position(self, step: int) -> tuple[int, int]:
        """The epoch of a global step, counted from 1, and its position in that epoch, counted from 0."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        return epoch + 1, position

    def bounds(self, position: int) -> tuple[int, int]:
        """First and end of the batch at a position, within its epoch's order."""
        first = position * self.batch_size
        return first, min(first + self.batch_size, self.num_rows)

    def epoch_permutation(self, epoch: int) -> np.ndarray:
        """All positions within the training split in the order of an epoch: (rows,) int64. Not to be changed."""
        if self._shuffle and self._cached[0] != epoch:
            self._cached = (epoch, random_permutation(make_generator(self._seed, "shuffle", epoch), self.num_rows))
        return self._cached[1]

    def batch_indices(self, step: int) -> np.ndarray:
        """Positions within the training split of a global step's samples: (batch_size or fewer,) int64."""
        epoch, position = self.epoch_and_position(step)
        first, end = self.bounds(position)
        return self.epoch_permutation(epoch)[first:end]


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """One rank's part of `count` samples: contiguous, ranks in order, sizes differ by one at most, may be empty."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)
