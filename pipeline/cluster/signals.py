"""SIGTERM to a worker's process: a notice that its machine or container is about to go, and no order to die at once.
SIGHUP likewise."""

from __future__ import annotations

import signal
from types import FrameType

from pipeline.context import as_sigterm, caught_signals

_received = 0


def catch_notices() -> None:
    """Note the first SIGTERM or SIGHUP instead of dying of it; the next one ends the process as before. Main thread
    only."""
    before = {number: signal.getsignal(number) for number in caught_signals() if number != signal.SIGINT}

    def note(number: int, frame: FrameType | None) -> None:
        global _received
        _received = as_sigterm(number)
        for other_number, handler in before.items():
            signal.signal(other_number, handler)

    for number in before:
        signal.signal(number, note)


def received() -> int:
    """The signal that this process got, or 0."""
    return _received
