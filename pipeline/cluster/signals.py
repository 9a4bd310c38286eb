"""SIGTERM to a worker's process: a notice that its machine or container is about to go, and no order to die at once."""

from __future__ import annotations

import signal
from types import FrameType

_received = 0


def catch_sigterm() -> None:
    """Note the first SIGTERM instead of dying of it; the next one ends the process as before. Main thread only."""
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        global _received
        _received = number
        signal.signal(number, before)

    signal.signal(signal.SIGTERM, note)


def received() -> int:
    """The signal that this process got, or 0."""
    return _received
