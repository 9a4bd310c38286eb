"""The actor between the driver and the workers, and the driver's receiver of events.

The module imports nothing of Ray or torch, so that the actor's process starts some seconds sooner.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.events import Event, EventHandler


class EventChannel:
    """An actor that passes events from the workers to the driver, and a signal to stop from the driver to rank 0.

    It also holds the latest heartbeat of each worker.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._signal = 0
        self._nodes: dict[int, str] = {}
        self._heartbeats: dict[int, tuple[float, str, float]] = {}

    def register_worker(self, rank: int, node_id: str) -> None:
        """For a worker: register the node that it runs on."""
        self._nodes[rank] = node_id

    def get_node_ids(self) -> list[str]:
        """For the driver: return the ids of the workers' nodes."""
        return list(self._nodes.values())

    def exchange_heartbeats(self, rank: int, idle_s: float, blocked_on: str) -> dict[int, tuple[float, str, float]]:
        """For a worker: store its heartbeat, and return `(idle_s, blocked_on, seconds since it came)` by rank."""
        now = time.monotonic()
        self._heartbeats[rank] = idle_s, blocked_on, now
        return {rank: (idle, blocked, now - received) for rank, (idle, blocked, received) in self._heartbeats.items()}

    def put_events(self, events: list[Event]) -> int:
        """For a worker: add its new events, and return the signal that asks the run to stop, or 0."""
        self._events.extend(events)
        return self._signal

    def get_events(self) -> list[Event]:
        """For the driver: return the events since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self, signal_number: int) -> None:
        """For the driver: have the workers stop because of a signal."""
        self._signal = signal_number


class EventReceiver:
    """Receives the channel's events on the driver.

    One request is pending at a time and kept until it is answered, so that no event is lost if the driver or the
    channel is slow.
    """

    def __init__(self, ray: Any, channel: Any, on_event: EventHandler) -> None:
        self._ray = ray
        self._channel = channel
        self._on_event = on_event
        self._pending_request: Any = None

    def drain(self, timeout_s: float = 0.0) -> None:
        """Handle the new events. If the channel does not answer within `timeout_s`, the next call handles them."""
        self._pending_request = self._pending_request or self._channel.get_events.remote()
        try:
            if not self._ray.wait([self._pending_request], timeout=timeout_s)[0]:
                return
            events, self._pending_request = self._ray.get(self._pending_request), None
        except self._ray.exceptions.RayError:
            self._pending_request = None  # events are only for display: trainer.fit() raises what went wrong
            return
        for event in events:
            self._on_event(event)
