"""The actor between the driver and rank 0. It imports nothing: its process is ready a few seconds sooner for that."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.events import Event


class EventChannel:
    """Events one way, the signal to stop the other."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._signal = 0
        self._nodes: dict[int, str] = {}
        self._heartbeats: dict[int, tuple[float, str, float]] = {}

    def register_worker(self, rank: int, node_id: str) -> None:
        """A worker says on which node it is."""
        self._nodes[rank] = node_id

    def get_node_ids(self) -> list[str]:
        """For the driver: the ids of the workers' nodes."""
        return list(self._nodes.values())

    def exchange_heartbeats(self, rank: int, idle_s: float, blocked_on: str) -> dict[int, tuple[float, str, float]]:
        """A worker's sign of life; returns the latest of each, and how many seconds ago it came."""
        now = time.monotonic()
        self._heartbeats[rank] = idle_s, blocked_on, now
        return {one: (still, waits, now - came) for one, (still, waits, came) in self._heartbeats.items()}

    def put_events(self, events: list[Event]) -> int:
        """A worker's new events; returns the signal that the driver was asked to stop by, or 0."""
        self._events.extend(events)
        return self._signal

    def get_events(self) -> list[Event]:
        """For the driver: the events since it last asked."""
        events, self._events = self._events, []
        return events

    def request_stop(self, signal_number: int) -> None:
        """For the driver: pass a signal on."""
        self._signal = signal_number
