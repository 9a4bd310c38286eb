"""The actor between the driver and rank 0. It imports nothing: its process is ready a few seconds sooner for that.

What workers tell, as it reaches the driver.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pipeline.events import EventHandler

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


class EventReceiver:
    """The events that wait on the desk. One question at a time, kept until it is answered: none is lost to a driver or
    a desk that is slow."""

    def __init__(self, ray: Any, channel: Any, on_event: EventHandler) -> None:
        self._ray = ray
        self._channel = channel
        self._on_event = on_event
        self._pending_request: Any = None

    def drain(self, timeout_s: float = 0.0) -> None:
        """Handle the events that there are; where the answer takes longer, next time."""
        self._pending_request = self._pending_request or self._channel.get_events.remote()
        try:
            if not self._ray.wait([self._pending_request], timeout=timeout_s)[0]:
                return
            events, self._pending_request = self._ray.get(self._pending_request), None
        except self._ray.exceptions.RayError:
            self._pending_request = None  # progress is for the eye: fit() itself says what is wrong
            return
        for event in events:
            self._on_event(event)
