"""Loader processes: they gather batches ahead of the worker, and live and die with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.data.shares import Shares
from pipeline.data.tensors import Pair
from pipeline.errors import WorkError

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: the signal that a process gets when the thread that forked it ends."""

FETCH_BYTES = 1 << 20
"""What a loader process hands over at once, in whole steps: each hand-over takes it and the worker about 2 ms."""


def fetched(shares: Shares, steps: range, processes: int, pin: bool) -> Generator[Pair]:
    """Batches from loader processes, which live as long as this generator; several steps come in one piece."""
    step_bytes = shares.step_bytes()
    stride = max(1, min(FETCH_BYTES // max(step_bytes, 1), len(steps) // processes))
    pieces = [steps[first : first + stride] for first in range(0, len(steps), stride)]
    with warnings.catch_warnings(), _unchanged_sigchld():
        # Python warns of forks beside other threads. The children only index tensors and take no lock of ours.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the job's warnings say so
        fetching = DataLoader(
            _Pieces(shares),
            batch_size=None,
            sampler=pieces,
            num_workers=processes,
            collate_fn=_as_it_is,
            pin_memory=pin,
            worker_init_fn=_live_and_die_with_the_worker,
            generator=torch.Generator(),  # torch's own would be drawn from
            multiprocessing_context="fork",  # the data is shared, not copied
        )
        iterator = iter(fetching)
    for piece in pieces:
        inputs, targets = _next(iterator)
        sizes = [mine.stop - mine.start for _, _, mine in map(shares.bounds, piece)]
        yield from zip(inputs.split(sizes), targets.split(sizes), strict=True)


class _Pieces(Dataset[Pair]):
    """What a loader process fetches at once: the shares of consecutive steps, one after another."""

    def __init__(self, shares: Shares) -> None:
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
    except (RuntimeError, OSError, EOFError) as error:  # by where in a hand-over it died
        raise WorkError(
            f"a loader process ended: {error}",
            where="data.loader.processes",
            fix="set it to 0, or give the worker more memory",
        ) from error


def _as_it_is(pair: Any) -> Any:
    return pair


def _live_and_die_with_the_worker(_: int) -> None:
    """A signal to the worker's process group is the worker's to answer; its loader processes end when it does.

    At once, on Linux: what a loader process has inherited, such as the file lock of an attempt, must not outlive it.
    """
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
