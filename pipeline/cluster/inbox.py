"""What workers tell, as it reaches the driver."""

from __future__ import annotations

from typing import Any

from pipeline.events import EventHandler


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
