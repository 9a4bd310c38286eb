"""Which samples each step takes: those of global step s depend only on (seed, epoch, s)."""

from __future__ import annotations

import numpy as np

from pipeline.data.rng import make_generator, random_permutation


class GlobalBatchSampler:
    """The global batches of a run: each epoch is one pass over the training split, in batches of `batch_size`.

    Each member of an ensemble takes batches of its own: its order of an epoch depends on (seed, epoch, member) alone,
    and that of the first member is the order of a single model. A global batch of B rows for K members then has B K
    entries; entry i K + k is row i of member k.

    No result depends on earlier calls, so a run can begin at any step. The permutation of one epoch is kept in memory.

    Parameters
    ----------
    rows: size of the training split, at least 1.
    batch_size: samples of a global batch; the last one of an epoch may be smaller.
    shuffle: whether each epoch has a new order; otherwise all have the order of the split.
    seed: the job's seed of the stream "shuffle".
    members: networks of the ensemble, K; 1 for a single model.
    """

    def __init__(self, rows: int, batch_size: int, *, shuffle: bool, seed: int, members: int = 1) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(f"rows and batch_size must be at least 1, not {rows} and {batch_size}")
        self.num_rows = rows
        self.batch_size = batch_size
        self.members = members
        self.steps_per_epoch = -(-rows // batch_size)
        self._shuffle = shuffle
        self._seed = seed
        self._cached: tuple[int, np.ndarray] = (0, np.arange(rows, dtype=np.int64).repeat(members))

    def epoch_and_position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a global step, counted from 1, and its position in that epoch, counted from 0."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        return epoch + 1, position

    def bounds(self, position: int) -> tuple[int, int]:
        """Return the first row and the end of the batch at a position, in its epoch's order; of every member."""
        first = position * self.batch_size
        return first, min(first + self.batch_size, self.num_rows)

    def epoch_permutation(self, epoch: int) -> np.ndarray:
        """Return all positions in the training split in the order of an epoch: int64 (num_rows * members,), row after
        row, in each those of all members. Do not modify it."""
        if self._shuffle and self._cached[0] != epoch:
            order = np.empty((self.num_rows, self.members), dtype=np.int64)
            for member in range(self.members):
                counters = (epoch, member) if member else (epoch,)
                order[:, member] = random_permutation(make_generator(self._seed, "shuffle", *counters), self.num_rows)
            self._cached = (epoch, order.reshape(-1))
        return self._cached[1]

    def batch_indices(self, step: int) -> np.ndarray:
        """Return the positions in the training split of a global step's entries: int64 (batch_size * members or
        fewer,)."""
        epoch, position = self.epoch_and_position(step)
        first, end = self.bounds(position)
        return self.epoch_permutation(epoch)[first * self.members : end * self.members]


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """Return one rank's part of `count` samples: contiguous, in the order of ranks; sizes differ by at most one. It may
    be empty."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)
