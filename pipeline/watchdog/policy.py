"""Decide which worker hangs, from a rank's own state and the heartbeats of the others. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.context import WorkerHeartbeat


@dataclass(frozen=True)
class HangTimeouts:
    """How long a thread may make no progress, in seconds.

    Parameters
    ----------
    hang_s: for a thread that waits for no other process.
    storage_s: for a thread that waits for storage, without a response. Longer than the limit after which storage
        raises its own error.
    """

    hang_s: float
    storage_s: float

    @property
    def grace_s(self) -> float:
        """Extra time for a thread that waits for another process, so that the process at fault reports first."""
        return max(2.0, self.hang_s / 10)

    @property
    def poll_s(self) -> float:
        """Interval between two checks."""
        return min(5.0, self.hang_s / 20)

    @property
    def gil_timeout_s(self) -> float:
        """Time without a check after which the GIL counts as held by a hang."""
        return self.hang_s + self.grace_s / 2

    @property
    def exit_grace_s(self) -> float:
        """Time for a training thread in which the error was raised to record it and exit."""
        return min(30.0, 3 * self.hang_s)

    @property
    def unresponsive_s(self) -> float:
        """Time without a response after which a process counts as hung to an outside observer."""
        return self.hang_s + 2 * self.grace_s

    @property
    def collective_timeout_s(self) -> float:
        """Timeout of an all-reduce: later than any decision here."""
        return 2 * (self.hang_s + self.storage_s) + self.grace_s


def detect_hang(
    rank: int,
    heartbeat: WorkerHeartbeat,
    heartbeats: Mapping[int, WorkerHeartbeat] | None,
    world_size: int,
    timeouts: HangTimeouts,
) -> str | None:
    """Return what is wrong, as the predicate of a sentence about this rank; None if nothing is, or not yet.

    Parameters
    ----------
    rank, heartbeat: this rank and its own state.
    heartbeats: the latest heartbeat of each rank that ever sent one; None if the channel is unavailable.
    """
    if heartbeat.blocked_on == "":
        return f"made no progress for {heartbeat.idle_s:.0f} s" if heartbeat.idle_s > timeouts.hang_s else None
    if heartbeat.blocked_on == "storage":
        late = heartbeat.idle_s > timeouts.storage_s
        return f"waited {heartbeat.idle_s:.0f} s for storage that does not respond" if late else None
    if heartbeat.idle_s <= timeouts.hang_s + timeouts.grace_s:
        return None
    if heartbeat.blocked_on == "cache":
        return f"waited {heartbeat.idle_s:.0f} s for another process that prepares the same data and makes no progress"
    waited = f"waited {heartbeat.idle_s:.0f} s for"
    if heartbeats is None:
        return f"{waited} the other workers"
    others = {other: heartbeats.get(other) for other in range(world_size) if other != rank}
    silent_ranks = [
        other
        for other, other_heartbeat in others.items()
        if other_heartbeat is None or other_heartbeat.last_seen_s > timeouts.hang_s
    ]
    if silent_ranks:
        numbers = ", ".join(map(str, silent_ranks))
        sends = "which sends" if len(silent_ranks) == 1 else "which send"
        return (
            f"{waited} worker{'s' * (len(silent_ranks) != 1)} {numbers}, {sends} no heartbeat (stopped or disconnected)"
        )
    if any(
        other_heartbeat is not None and other_heartbeat.blocked_on != "workers" for other_heartbeat in others.values()
    ):
        return None  # that rank makes progress, or its own watchdog reports the hang
    return f"{waited} the other workers, which are waiting too"
