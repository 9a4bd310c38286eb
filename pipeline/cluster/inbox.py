"""What workers tell, as it reaches the driver."""

from __future__ import annotations

from typing import Any

from pipeline.events import EventHandler


class Inbox:
    """The events that wait on the desk. One question at a time, kept until it is answered: none is lost to a driver or
    a desk that is slow."""

    def __init__(self, ray: Any, desk: Any, on_event: EventHandler) -> None:
        self._ray = ray
        self._desk = desk
        self._on_event = on_event
        self._asked: Any = None

    def pass_on(self, wait_s: float = 0.0) -> None:
        """Handle the events that there are; where the answer takes longer, next time."""
        self._asked = self._asked or self._desk.take.remote()
        try:
            if not self._ray.wait([self._asked], timeout=wait_s)[0]:
                return
            events, self._asked = self._ray.get(self._asked), None
        except self._ray.exceptions.RayError:
            self._asked = None  # progress is for the eye: fit() itself says what is wrong
            return
        for event in events:
            self._on_event(event)
