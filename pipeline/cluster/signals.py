"""SIGTERM and SIGHUP in a worker's process: a notice that its machine or container will be stopped. The run saves
first."""

from __future__ import annotations

import signal
from types import FrameType

from pipeline.context import stop_signal_numbers, to_exit_signal

_received_signal = 0


def install_notice_handlers() -> None:
    """Record the first SIGTERM or SIGHUP, and let the next one end the process. Main thread only."""
    before = {number: signal.getsignal(number) for number in stop_signal_numbers() if number != signal.SIGINT}

    def handle_notice(number: int, frame: FrameType | None) -> None:
        global _received_signal
        _received_signal = to_exit_signal(number)
        for other_number, handler in before.items():
            signal.signal(other_number, handler)

    for number in before:
        signal.signal(number, handle_notice)


def get_received_signal() -> int:
    """Return the signal that this process received, or 0."""
    return _received_signal
