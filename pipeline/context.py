"""What a worker knows of its surroundings, as one small object; here that of a run in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.errors import HungError, Interrupted
from pipeline.watchdog import Progress, Pulse

if TYPE_CHECKING:  # a client of a cluster needs this module, and not torch
    from torch import Tensor

Value = TypeVar("Value")

Tell = Callable[[Mapping[str, Any]], None]
"""Takes one event for the user: `kind` (phase, message, warning, run, start, steps, evaluation, commit) and plain
values. Threads of the run's own may call it too."""


class PeerLost(Exception):
    """Another worker is gone: on this one the consequence of an error, never its cause."""


class Context(Protocol):
    """One worker's place among the others.

    What needs the other ranks raises PeerLost where one of them is gone.
    """

    rank: int
    world_size: int
    local_rank: int
    alone: bool
    """This is the user's own process: nobody starts it again, and its standard error is theirs."""
    owns_process: bool
    """The process does nothing else, so that it may be ended where the run hangs."""
    progress: Progress
    """What the training thread has done: see `pipeline.watchdog`."""

    def reduce(self, vector: Tensor) -> None:
        """Sum over the ranks, in place."""

    def broadcast(self, value: Value | None) -> Value:
        """What rank 0 gives, on every rank; any picklable value."""

    def stop_signal(self) -> int:
        """The signal that asks this rank to stop, or 0."""

    def tell(self, event: Mapping[str, Any]) -> None:
        """Hand an event to whoever watches the run. Never blocks."""

    def report(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Tell the cluster of an evaluation, or of the end: called by all ranks at the same step."""

    def pulse(self, own: Pulse) -> Mapping[int, Pulse] | None:
        """Leave a sign of life, and see the latest of each rank; None where they cannot be had. Takes seconds at the
        most."""

    def interrupt(self, error: HungError) -> bool:
        """Raise an error in the training thread, whatever it waits for; False where that is impossible."""

    def last_word(self, error: HungError) -> None:
        """Say why this process is about to be ended. Takes seconds at the most."""


_process = {"is_ours": False}


@contextmanager
def own_process() -> Iterator[None]:
    """While entered, this process does nothing but what Trainyard's command line was asked for. Any other is its
    caller's, and is never ended from here."""
    before, _process["is_ours"] = _process["is_ours"], True
    try:
        yield
    finally:
        _process["is_ours"] = before


class StopSignals:
    """While entered, SIGINT and SIGTERM ask the run to save and leave; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._error: Exception | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise Interrupted("ended at once", fix="the same command goes on from the last checkpoint")

    def interrupt(self, error: Exception) -> bool:
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
        self.received = number


class Alone:
    """A world of one, in this process."""

    rank = 0
    world_size = 1
    local_rank = 0
    alone = True

    def __init__(self, tell: Tell, signals: StopSignals | None = None) -> None:
        self.tell = tell
        self.owns_process = _process["is_ours"]
        self.progress = Progress()
        self._signals = signals

    def reduce(self, vector: Tensor) -> None:
        """Nothing to sum with."""

    def broadcast(self, value: Value | None) -> Value:
        assert value is not None
        return value

    def stop_signal(self) -> int:
        return self._signals.received if self._signals is not None else 0

    def report(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """No cluster to tell."""

    def pulse(self, own: Pulse) -> Mapping[int, Pulse] | None:
        return {}

    def interrupt(self, error: HungError) -> bool:
        return self._signals is not None and self._signals.interrupt(error)

    def last_word(self, error: HungError) -> None:
        self.tell({"kind": "hang", "text": str(error)})
