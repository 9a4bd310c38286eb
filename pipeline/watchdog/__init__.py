"""Hang detection: a process without progress is detected within a stated time, its stacks are saved, and it is ended.

Nothing else ends a deadlock, a call that never returns or storage that never responds: to Ray and to the operating
system, a process that hangs is alive.
"""

from pipeline.watchdog.policy import HangTimeouts
from pipeline.watchdog.progress import blocking_on, listening_to_progress, note_progress, watchdog_suspended
from pipeline.watchdog.stack_dump import StackDump
from pipeline.watchdog.watchdog import HEARTBEAT_TIMEOUT_S, Watchdog

__all__ = [
    "HEARTBEAT_TIMEOUT_S",
    "HangTimeouts",
    "StackDump",
    "Watchdog",
    "note_progress",
    "listening_to_progress",
    "watchdog_suspended",
    "blocking_on",
]
