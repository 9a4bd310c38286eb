"""Who stands still? A decision from what a rank knows of itself and has heard of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.context import WorkerHeartbeat


@dataclass(frozen=True)
class HangTimeouts:
    """How long is too long, in seconds.

    hang_s: without progress, for a thread that waits for nobody.
    storage_s: without an answer of storage, for one that waits for it: longer than storage takes to be given up.
    """

    hang_s: float
    storage_s: float

    @property
    def grace_s(self) -> float:
        """Who waits for another process waits so much longer: the culprit's own word comes first."""
        return max(2.0, self.hang_s / 10)

    @property
    def poll_s(self) -> float:
        """Between two looks."""
        return min(5.0, self.hang_s / 20)

    @property
    def gil_timeout_s(self) -> float:
        """Without a single look: whatever holds Python's lock for so long hangs."""
        return self.hang_s + self.grace_s / 2

    @property
    def exit_grace_s(self) -> float:
        """A training thread that could be woken has so long to write down why it leaves."""
        return min(30.0, 3 * self.hang_s)

    @property
    def unresponsive_s(self) -> float:
        """Who watches from outside takes a process for hung that has not answered for so long."""
        return self.hang_s + 2 * self.grace_s

    @property
    def collective_timeout_s(self) -> float:
        """After which a sum over the ranks may fail by itself: later than any verdict here."""
        return 2 * (self.hang_s + self.storage_s) + self.grace_s


def detect_hang(
    rank: int,
    heartbeat: WorkerHeartbeat,
    heartbeats: Mapping[int, WorkerHeartbeat] | None,
    world_size: int,
    timeouts: HangTimeouts,
) -> str | None:
    """What is wrong, as a sentence about the worker at fault without the place; None: nothing, or not yet.

    Parameters
    ----------
    heard: the latest sign of each rank that ever gave one; None: they cannot be had.
    """
    if heartbeat.blocked_on == "":
        return f"stood still for {heartbeat.idle_s:.0f} s" if heartbeat.idle_s > timeouts.hang_s else None
    if heartbeat.blocked_on == "storage":
        late = heartbeat.idle_s > timeouts.storage_s
        return f"waited {heartbeat.idle_s:.0f} s for storage that does not answer" if late else None
    if heartbeat.idle_s <= timeouts.hang_s + timeouts.grace_s:
        return None
    if heartbeat.blocked_on == "cache":
        return f"waited {heartbeat.idle_s:.0f} s for another process that prepares the same data and makes no progress"
    waited = f"waited {heartbeat.idle_s:.0f} s for"
    if heartbeats is None:
        return f"{waited} the others"
    others = {other: heartbeats.get(other) for other in range(world_size) if other != rank}
    silent_ranks = [
        other
        for other, other_heartbeat in others.items()
        if other_heartbeat is None or other_heartbeat.last_seen_s > timeouts.hang_s
    ]
    if silent_ranks:
        numbers = ", ".join(map(str, silent_ranks))
        gives = "which gives" if len(silent_ranks) == 1 else "which give"
        return (
            f"{waited} worker{'s' * (len(silent_ranks) != 1)} {numbers}, {gives} no sign of life (stopped, or cut off)"
        )
    if any(
        other_heartbeat is not None and other_heartbeat.blocked_on != "workers" for other_heartbeat in others.values()
    ):
        return None  # it works, or has a watchdog of its own
    return f"{waited} the others, which wait as well"
