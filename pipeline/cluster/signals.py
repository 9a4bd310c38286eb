"""SIGTERM to a worker's process: a notice that its machine or container is about to go, and no order to die at once.
SIGHUP likewise."""

from __future__ import annotations

import signal
from types import FrameType

from pipeline.context import stop_signal_numbers, to_exit_signal

_received_signal = 0


def install_notice_handlers() -> None:
    """Note the first SIGTERM or SIGHUP instead of dying of it; the next one ends the process as before. Main thread
    only."""
    before = {number: signal.getsignal(number) for number in stop_signal_numbers() if number != signal.SIGINT}

    def note(number: int, frame: FrameType | None) -> None:
        global _received_signal
        _received_signal = to_exit_signal(number)
        for other_number, handler in before.items():
            signal.signal(other_number, handler)

    for number in before:
        signal.signal(number, note)


def get_received_signal() -> int:
    """The signal that this process got, or 0."""
    return _received_signal
