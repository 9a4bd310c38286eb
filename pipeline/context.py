"""What a worker knows of its surroundings, as one small object; here that of a run in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from pipeline.errors import Interrupted

Value = TypeVar("Value")

Tell = Callable[[Mapping[str, Any]], None]
"""Takes one event for the user: `kind` (phase, message, warning, run, start, steps, evaluation) and plain values."""


class Context(Protocol):
    """One worker's place among the others."""

    rank: int
    world_size: int
    local_rank: int

    def reduce(self, vector: Tensor) -> None:
        """Sum over the ranks, in place."""

    def broadcast(self, value: Value | None) -> Value:
        """What rank 0 gives, on every rank; any picklable value."""

    def stop_signal(self) -> int:
        """The signal that asks this rank to stop, or 0."""

    def tell(self, event: Mapping[str, Any]) -> None:
        """Hand an event to whoever watches the run. Never blocks."""

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell the cluster of an evaluation: called by all ranks at the same step."""


class StopSignals:
    """While entered, SIGINT and SIGTERM ask the run to save and leave; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

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

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Alone:
    """A world of one, in this process."""

    rank = 0
    world_size = 1
    local_rank = 0

    def __init__(self, tell: Tell, signals: StopSignals | None = None) -> None:
        self.tell = tell
        self._signals = signals

    def reduce(self, vector: Tensor) -> None:
        """Nothing to sum with."""

    def broadcast(self, value: Value | None) -> Value:
        assert value is not None
        return value

    def stop_signal(self) -> int:
        return self._signals.received if self._signals is not None else 0

    def report(self, metrics: Mapping[str, float]) -> None:
        """No cluster to tell."""
