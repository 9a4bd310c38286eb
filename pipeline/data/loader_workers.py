"""Loader processes: they work ahead of the worker, and live and die with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import TrainyardError, WorkError

T = TypeVar("T")
R = TypeVar("R")

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: the signal that a process gets when the thread that forked it ends."""


def map_in_processes(fn: Callable[[T], R], items: Sequence[T], num_processes: int, pin: bool = False) -> Generator[R]:
    """`make` of every item, in order, by forked processes that work ahead and live as long as this generator.

    What they make are arrays, tensors and plain values; an error of ours comes through as it is.

    Raises
    ------
    WorkError: a process was killed.
    """
    with warnings.catch_warnings(), _preserve_sigchld_handler():
        # Python warns of forks beside other threads. The children take no lock of ours.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the job's warnings say so
        loader = DataLoader(
            _MapDataset(fn),
            batch_size=None,
            sampler=items,
            num_workers=num_processes,
            collate_fn=identity_collate,
            pin_memory=pin,
            worker_init_fn=_init_loader_worker,
            generator=torch.Generator(),  # torch's own would be drawn from
            multiprocessing_context="fork",  # the data is shared, not copied
        )
        iterator = iter(loader)
    try:
        for _ in items:
            with _translate_worker_death():
                result = next(iterator)
            if isinstance(result, TrainyardError):
                raise result
            yield result
    finally:
        del iterator  # which ends the processes; the traceback of an error would keep it


class _MapDataset(Dataset[Any]):
    """What a loader process makes of an item. Its errors are handed over whole, where torch would quote them."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._fn = make

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._fn(item)
        except TrainyardError as error:
            return error


@contextmanager
def _preserve_sigchld_handler() -> Iterator[None]:
    """Torch's handler would raise in whatever the worker is doing when a loader process dies; its queue tells too."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def _translate_worker_death() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:  # by where in a hand-over it died
        raise WorkError(
            f"a loader process ended: {error}",
            where="data.loader.processes",
            fix="set it to 0, or give the worker more memory",
        ) from error


def identity_collate(pair: Any) -> Any:
    return pair


def _init_loader_worker(_: int) -> None:
    """A signal to the worker's process group is the worker's to answer; its loader processes end when it does.

    At once, on Linux: what a loader process has inherited, such as the file lock of an attempt, must not outlive it.
    """
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_ignore_group_sigterm, name="trainyard-sigterm", daemon=True).start()


def _ignore_group_sigterm() -> None:
    """Whoever stops a job may send SIGTERM to every process of it, as Ray does; the worker still has a step to end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(128 + signal.SIGTERM)
