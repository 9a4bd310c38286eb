"""Loader processes: they prepare batches ahead of the worker, and end when it does."""

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
    """Yield `fn` of every item, in order, from forked processes that work ahead and run as long as this generator.

    `fn` returns arrays, tensors or plain values. A `TrainyardError` that it raises is raised here unchanged.

    Raises
    ------
    WorkError: a process was killed.
    """
    with warnings.catch_warnings(), _preserve_sigchld_handler():
        # Python warns of forks beside other threads. The children take none of this process's locks.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # covered by the job's warnings
        loader = DataLoader(
            _MapDataset(fn),
            batch_size=None,
            sampler=items,
            num_workers=num_processes,
            collate_fn=identity_collate,
            pin_memory=pin,
            worker_init_fn=_init_loader_worker,
            generator=torch.Generator(),  # otherwise numbers would be drawn from torch's global generator
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
        del iterator  # ends the processes; without this, the traceback of an error would keep it


class _MapDataset(Dataset[Any]):
    """Calls `fn` on items. A `TrainyardError` is returned as an object; torch would convert a raised one to text."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self._fn = fn

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._fn(item)
        except TrainyardError as error:
            return error


@contextmanager
def _preserve_sigchld_handler() -> Iterator[None]:
    """Undo torch's SIGCHLD handler, which would raise in whatever the worker is doing when a loader process ends. It is
    not needed: reading from the queue detects that too."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def _translate_worker_death() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:  # depends on where in a transfer the process ended
        raise WorkError(
            f"a loader process ended: {error}",
            where="data.loader.processes",
            fix="set it to 0, or give the worker more memory",
        ) from error


def identity_collate(pair: Any) -> Any:
    return pair


def _init_loader_worker(_: int) -> None:
    """Leave the worker's process group, so that only the worker handles a signal to the group.

    On Linux, the loader process is killed as soon as the worker ends: what it inherited, such as the file lock of an
    attempt, must not be held any longer.
    """
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_ignore_group_sigterm, name="trainyard-sigterm", daemon=True).start()


def _ignore_group_sigterm() -> None:
    """Exit on SIGTERM only if the worker sent it.

    A job may be stopped by a SIGTERM to each of its processes, as Ray does; the worker still has a step to finish.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(128 + signal.SIGTERM)
