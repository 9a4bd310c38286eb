"""A process that stands still: noticed in a stated time, its stacks saved, and ended.

Nothing else ends a deadlock, a call that never returns or storage that never answers: a process that hangs is alive to
Ray and to the operating system.
"""

from pipeline.watchdog.progress import note_progress, on_progress, unlimited, waits_for
from pipeline.watchdog.stacks import Stacks
from pipeline.watchdog.verdict import Limits
from pipeline.watchdog.watching import PULSE_S, Watchdog

__all__ = [
    "PULSE_S",
    "Limits",
    "Stacks",
    "Watchdog",
    "note_progress",
    "on_progress",
    "unlimited",
    "waits_for",
]
