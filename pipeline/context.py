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

if TYPE_CHECKING:  # a client of a cluster needs this module, and not torch
    from torch import Tensor

T = TypeVar("T")

WaitTarget = Literal["", "workers", "storage", "cache"]
"""What a thread waits for that is no fault of its own; empty: nothing such. cache: another process that prepares the
same data."""


class PeerFailure(Exception):
    """Another worker is gone: on this one the consequence of an error, never its cause."""


class ProgressCounter:
    """Counts steps, blocks of an evaluation and phases of preparing: where the count stays, nothing moves."""

    def __init__(self) -> None:
        self.count = 0
        self.attempt = 0
        """The number of the attempt; 0 until it is set."""
        self.release_run: Callable[[], None] = lambda: None
        """Lets others take the run over, where this thread hangs in a process that goes on."""

    def track(self, items: Iterable[T]) -> Iterable[T]:
        """`items`, counted when one is asked for and when it is there. Can be iterated as often as `items`."""
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
    """One rank's report that its process is alive, and how its training thread is doing."""

    idle_s: float
    """Seconds since its last progress, by its own clock."""
    blocked_on: WaitTarget
    last_seen_s: float = 0.0
    """Seconds since this report arrived, by the clock of whoever passes it on."""


class WorkerContext(Protocol):
    """What a worker needs of its environment: its rank, collectives, and the way to the driver and the cluster.

    Collectives raise PeerFailure where another rank is gone.
    """

    rank: int
    world_size: int
    local_rank: int
    is_local: bool
    """This is the user's own process: nobody restarts it, and its standard error is theirs."""
    owns_process: bool
    """The process does nothing else, so that it may be ended where the run hangs."""
    progress: ProgressCounter
    """What the training thread has done: see `pipeline.watchdog`."""

    def all_reduce(self, vector: Tensor) -> None:
        """Sum over the ranks, in place. Any shape and floating dtype, the same on all ranks."""

    def broadcast(self, value: T | None) -> T:
        """The value that rank 0 gives, on every rank; any picklable value."""

    def stop_signal(self) -> int:
        """The signal that asks this rank to stop, or 0."""

    def emit(self, event: Event) -> None:
        """Hand an event to whoever watches the run. Never blocks."""

    def report(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Report an evaluation, or the end, to the cluster: called by all ranks at the same step."""

    def heartbeat(self, own: WorkerHeartbeat) -> Mapping[int, WorkerHeartbeat] | None:
        """Send this rank's heartbeat and return the latest of each rank; None where they cannot be had. Takes seconds
        at most."""

    def raise_in_main_thread(self, error: HungError) -> bool:
        """Raise an error in the training thread, whatever it waits for; False where that is impossible."""

    def report_hang(self, error: HungError) -> None:
        """Report why this process is about to be ended. Takes seconds at most."""


_process = {"is_ours": False}


@contextmanager
def command_line_process() -> Iterator[None]:
    """While entered, this process does nothing but what Trainyard's command line was asked for. Any other is its
    caller's, and is never ended from here."""
    before, _process["is_ours"] = _process["is_ours"], True
    try:
        yield
    finally:
        _process["is_ours"] = before


def stop_signal_numbers() -> list[int]:
    """The signals that ask a run to save and leave. SIGHUP, that of a terminal which is closed, is one of them unless
    it is ignored: `nohup` means that the run goes on."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


def to_exit_signal(number: int) -> int:
    """A signal as it is passed on and told: SIGHUP as SIGTERM, whose exit code, 143, everybody knows for a run that was
    interrupted and can be resumed."""
    return signal.SIGTERM if number == signal.SIGHUP else number


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP ask the run to save and leave; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._error: Exception | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signal_numbers():
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise Interrupted("ended at once", fix="the same command goes on from the last checkpoint")

    def raise_in_main_thread(self, error: Exception) -> bool:
        """For another thread: raise an error in the main thread, as Ctrl-C would; False where no signal is caught."""
        main = threading.main_thread().ident
        if not self._before or main is None:
            return False
        self._error = error
        signal.pthread_kill(main, signal.SIGINT)
        return True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = to_exit_signal(number)


class SingleProcessContext:
    """A world of one rank, in this process."""

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
        """Nothing to sum with."""

    def broadcast(self, value: T | None) -> T:
        assert value is not None
        return value

    def stop_signal(self) -> int:
        return self._signals.received if self._signals is not None else 0

    def emit(self, event: Event) -> None:
        self._on_event(event)

    def report(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """No cluster to report to."""

    def heartbeat(self, own: WorkerHeartbeat) -> Mapping[int, WorkerHeartbeat] | None:
        return {}

    def raise_in_main_thread(self, error: HungError) -> bool:
        return self._signals is not None and self._signals.raise_in_main_thread(error)

    def report_hang(self, error: HungError) -> None:
        self.emit(HangReported(str(error)))
