"""A process that stands still: noticed in a stated time, its stacks saved, and ended.

Nothing else ends a deadlock, a call that never returns or storage that never answers: a process that hangs is alive to
Ray and to the operating system.
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
