"""Loaders: a rank's samples as batches on the device, in training order or in the order of a split."""

from __future__ import annotations

import ctypes
import signal
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.augment import augmented, check_images, draw, is_wanted
from pipeline.data.sampler import GlobalBatches, share
from pipeline.data.sources.arrays import Arrays
from pipeline.data.tensors import Pair, Tensors, gather, moved, place
from pipeline.errors import WorkError
from pipeline.job import Augment, Loader

PinMemory = Literal["auto"] | bool

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: the signal that a process gets when the thread that forked it ends."""

FETCH_BYTES = 1 << 20
"""What a loader process hands over at once, in whole steps: each hand-over takes it and the worker about 2 ms."""


@dataclass(slots=True)
class Batch:
    """One rank's share of a global batch, on the device.

    inputs: raw samples (b, ...), augmented where the job says so. targets: (b,) or (b, T). Both may be empty.
    """

    step: int
    inputs: Tensor
    targets: Tensor


class TrainLoader:
    """This rank's shares of the global batches of steps `first_step` to `last_step`, both included.

    What comes out is the same for any number of loader processes, and the ranks' shares of a step, one after another,
    are its global batch for any world size. Can be iterated more than once; each time from `first_step`.

    Parameters
    ----------
    arrays: the part in which the training split lies, with prepared targets.
    rows: the training split within it, int64 (n,).
    batches: the order of positions within `rows`; `batches.rows` is n.
    loader: the job's `data.loader`. Processes are of no use to data that is resident on a GPU, and not started.
    device: where batches come out.
    augment: the job's `data.augment`.
    seed: of the stream "augment".

    Raises
    ------
    DataError: augmentation of what is no image.
    """

    def __init__(
        self,
        arrays: Arrays,
        rows: np.ndarray,
        batches: GlobalBatches,
        *,
        first_step: int,
        last_step: int,
        rank: int,
        world_size: int,
        loader: Loader,
        device: torch.device,
        augment: Augment,
        seed: int,
    ) -> None:
        assert len(rows) == batches.rows, f"{len(rows)} rows, but batches of {batches.rows}"
        if is_wanted(augment):
            check_images(arrays.inputs.shape[1:])
        tensors = place(arrays, rows, device)
        self._steps = range(first_step, last_step + 1)
        self._device = device
        self._moves = tensors.device.type != device.type
        self._processes = loader.processes if tensors.device.type == "cpu" else 0
        self._pin = self._moves and _pins(loader.pin_memory, device)
        self._shares = _Shares(tensors, batches, rank, world_size, pin=self._pin and not self._processes)
        self._augment, self._seed = augment, seed
        self._fetching: list[Generator[Pair]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        pairs: Iterator[Pair] = (self._shares.gathered(self._shares.rows(step)) for step in self._steps)
        if self._processes and self._steps:
            pairs = fetched = self._fetched()
            self._fetching.append(fetched)
        if self._moves:
            pairs = moved(pairs, self._device)
        changes = is_wanted(self._augment)
        for step, (inputs, targets) in zip(self._steps, pairs, strict=True):
            yield Batch(step, self._changed(step, inputs) if changes else inputs, targets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the loader processes of every iteration, finished or not."""
        while self._fetching:
            self._fetching.pop().close()

    def _fetched(self) -> Generator[Pair]:
        """Batches from loader processes, which live as long as this generator; several steps come in one piece."""
        steps = self._steps
        step_bytes = self._shares.step_bytes()
        stride = max(1, min(FETCH_BYTES // max(step_bytes, 1), len(steps) // self._processes))
        pieces = [steps[first : first + stride] for first in range(0, len(steps), stride)]
        fetching = DataLoader(
            _Pieces(self._shares),
            batch_size=None,
            sampler=pieces,
            num_workers=self._processes,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            worker_init_fn=_live_and_die_with_the_worker,
            generator=torch.Generator(),  # torch's own would be drawn from
            multiprocessing_context="fork",  # the data is shared, not copied
        )
        with warnings.catch_warnings(), _unchanged_sigchld():
            # Python warns of forks beside other threads. The children only index tensors and take no lock of ours.
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            iterator = iter(fetching)
        for piece in pieces:
            inputs, targets = _next(iterator)
            sizes = [mine.stop - mine.start for _, _, mine in map(self._shares.bounds, piece)]
            yield from zip(inputs.split(sizes), targets.split(sizes), strict=True)

    def _changed(self, step: int, inputs: Tensor) -> Tensor:
        first, end, mine = self._shares.bounds(step)
        draws = torch.from_numpy(draw(self._augment, self._seed, step, end - first)[mine])
        if self._device.type == "cuda":
            draws = draws.pin_memory()  # or the host would wait for the copy
        return augmented(self._augment, inputs, draws.to(self._device, non_blocking=True))


class EvalLoader:
    """A rank's share of a split in blocks, in order: over all ranks every row exactly once.

    Can be iterated as often as needed. Consecutive rows come as views, without a copy; do not write into them.

    Parameters
    ----------
    arrays: the part in which the split lies, with prepared targets.
    rows: the split, int64 (n,).
    batch_size: rows of a block, on each rank.
    limit: only the first rows of the split.
    """

    def __init__(
        self,
        arrays: Arrays,
        rows: np.ndarray,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        device: torch.device,
        limit: int | None = None,
        pin_memory: PinMemory = "auto",
    ) -> None:
        rows = rows[:limit]
        self._tensors = place(arrays, rows[share(len(rows), rank, world_size)], device)
        self._batch_size = batch_size
        self._device = device
        self._moves = self._tensors.device.type != device.type
        self._pin = self._moves and _pins(pin_memory, device)

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-len(self._tensors.rows) // self._batch_size)

    def __iter__(self) -> Iterator[Pair]:
        blocks = map(self._block, range(len(self)))
        return moved(blocks, self._device) if self._moves else blocks

    def _block(self, number: int) -> Pair:
        tensors = self._tensors
        rows = tensors.rows[number * self._batch_size : (number + 1) * self._batch_size]
        first, end = int(rows[0]), int(rows[-1]) + 1
        if (np.diff(rows) == 1).all() and not self._pin:
            return tensors.inputs[first:end], tensors.targets[first:end]
        return gather(tensors, torch.from_numpy(rows).to(tensors.device), self._pin)


class _Shares:
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


class _Pieces(Dataset[Pair]):
    """What a loader process fetches at once: the shares of consecutive steps, one after another."""

    def __init__(self, shares: _Shares) -> None:
        self._shares = shares

    def __getitem__(self, steps: Sequence[int]) -> Pair:
        return self._shares.gathered(torch.cat([self._shares.rows(step) for step in steps]))


@contextmanager
def _unchanged_sigchld() -> Iterator[None]:
    """Torch's handler would raise in whatever the worker is doing when a loader process dies; its queue tells too."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


def _next(fetched: Iterator[Pair]) -> Pair:
    try:
        return next(fetched)
    except RuntimeError as error:  # torch has no type of its own for it
        raise WorkError(
            f"a loader process ended: {error}",
            where="data.loader.processes",
            fix="set it to 0, or give the worker more memory",
        ) from error


def _pins(wanted: PinMemory, device: torch.device) -> bool:
    return device.type == "cuda" if wanted == "auto" else wanted


def _as_it_is(pair: Any) -> Any:
    return pair


def _live_and_die_with_the_worker(_: int) -> None:
    """A signal to the whole process group is the worker's to answer; its loader processes end when it does.

    At once, on Linux: what a loader process has inherited, such as the file lock of an attempt, must not outlive it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
