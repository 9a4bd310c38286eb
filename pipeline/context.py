"""The interface between a worker and its environment, and its implementation for a run in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from pipeline.errors import HungError, Interrupted
from pipeline.events import Event, EventHandler, HangReported, ignore_event

if TYPE_CHECKING:  # a client of a cluster imports this module without torch
    from torch import Tensor

T = TypeVar("T")

WaitTarget = Literal["", "workers", "storage", "cache"]
"""The external event that a thread waits for; empty: none. workers: a collective. cache: another process that prepares
the same data."""


class PeerFailure(Exception):
    """Another worker has exited or is unreachable: the consequence of an error elsewhere, never its cause."""


class ProgressCounter:
    """Counts steps, evaluation batches and units of data preparation. An unchanged count means no progress."""

    def __init__(self) -> None:
        self.count = 0
        self.attempt = 0
        """The number of the attempt; 0 until it is set."""
        self.release_run: Callable[[], None] = lambda: None
        """Stops the heartbeat, so that another process may take over the run: for a thread that hangs in a process that
        must not be ended."""

    def track(self, items: Iterable[T]) -> Iterable[T]:
        """Return `items`, counting each when it arrives and when the next is requested. Can be iterated as often as
        `items`."""
        return _TrackedIterable(items, self)


class _TrackedIterable(Generic[T]):
    def __init__(self, items: Iterable[T], progress: ProgressCounter) -> None:
        self._items = items
        self._progress = progress

    def __iter__(self) -> Iterator[T]:
        progress = self._progress
        for item in self._items:
            progress.count += 1
            yield item
            progress.count += 1


@dataclass(frozen=True)
class WorkerHeartbeat:
    """A rank's report that its process is alive, with the state of its training thread."""

    idle_s: float
    """Seconds since its last progress, by the rank's clock."""
    blocked_on: WaitTarget
    last_seen_s: float = 0.0
    """Seconds since this report arrived, by the clock of the process that forwards it."""


class WorkerContext(Protocol):
    """A worker's environment: its rank, its collectives, and its connection to the driver and the cluster.

    Collectives raise PeerFailure when another rank has failed.
    """

    rank: int
    world_size: int
    local_rank: int
    is_local: bool
    """Training runs in the user's process: no driver restarts it, and the user reads its standard error."""
    owns_process: bool
    """The process serves this run alone, so it may be ended when the run hangs."""
    progress: ProgressCounter
    """The progress of the training thread, see `pipeline.watchdog`."""

    def all_reduce(self, vector: Tensor) -> None:
        """Sum `vector` over the ranks, in place. Any shape and floating dtype, the same on all ranks."""

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's `value`, any picklable object, on every rank. The other ranks pass None."""

    def stop_signal(self) -> int:
        """Return the number of the signal that asks this rank to stop, or 0."""

    def emit(self, event: Event) -> None:
        """Pass an event to the handlers of the run. Never blocks."""

    def report(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Report an evaluation, or the end, to the cluster. All ranks call it at the same step."""

    def heartbeat(self, heartbeat: WorkerHeartbeat) -> Mapping[int, WorkerHeartbeat] | None:
        """Send this rank's heartbeat and return the latest of each rank, or None if the channel is unavailable. Takes
        seconds at most."""

    def raise_in_main_thread(self, error: HungError) -> bool:
        """Raise an error in the training thread, even while it waits; return False where that is impossible."""

    def report_hang(self, error: HungError) -> None:
        """Report why this process is about to end. Takes seconds at most."""


_process = {"is_ours": False}


@contextmanager
def command_line_process() -> Iterator[None]:
    """While entered, this process serves a command of Trainyard alone. Any other process belongs to its caller, and the
    watchdog never ends it."""
    previous, _process["is_ours"] = _process["is_ours"], True
    try:
        yield
    finally:
        _process["is_ours"] = previous


def stop_signal_numbers() -> list[int]:
    """Return the signals that ask a run to save and exit. SIGHUP, sent when a terminal is closed, is among them unless
    it is ignored: under `nohup` the run continues."""
    handles_sighup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if handles_sighup else [])]


def to_exit_signal(number: int) -> int:
    """Return the signal to report and forward: SIGTERM for SIGHUP, because its exit code, 143, is the known one of a
    run that was interrupted and can be resumed."""
    return signal.SIGTERM if number == signal.SIGHUP else number


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP ask the run to save and exit; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received = 0
        self._previous_handlers: dict[int, Any] = {}
        self._error: Exception | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signal_numbers():
                self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise Interrupted("ended at once", fix="the same command resumes from the last checkpoint")

    def raise_in_main_thread(self, error: Exception) -> bool:
        """Raise an error in the main thread from another one, as Ctrl-C would; return False if no signal is handled."""
        main_thread = threading.main_thread().ident
        if not self._previous_handlers or main_thread is None:
            return False
        self._error = error
        signal.pthread_kill(main_thread, signal.SIGINT)
        return True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = to_exit_signal(number)


class SingleProcessContext:
    """The context of a run in this process: one rank, no cluster."""

    rank = 0
    world_size = 1
    local_rank = 0
    is_local = True

    def __init__(self, on_event: EventHandler = ignore_event, signals: StopSignals | None = None) -> None:
        self.owns_process = _process["is_ours"]
        self.progress = ProgressCounter()
        self._on_event = on_event
        self._signals = signals

    def all_reduce(self, vector: Tensor) -> None:
        """Do nothing: there is one rank."""

    def broadcast(self, value: T | None) -> T:
        assert value is not None
        return value

    def stop_signal(self) -> int:
        return self._signals.received if self._signals is not None else 0

    def emit(self, event: Event) -> None:
        self._on_event(event)

    def report(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Do nothing: there is no cluster."""

    def heartbeat(self, heartbeat: WorkerHeartbeat) -> Mapping[int, WorkerHeartbeat] | None:
        return {}

    def raise_in_main_thread(self, error: HungError) -> bool:
        return self._signals is not None and self._signals.raise_in_main_thread(error)

    def report_hang(self, error: HungError) -> None:
        self.emit(HangReported(str(error)))
