"""The actor between the driver and rank 0. It imports nothing: its process is ready a few seconds sooner for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Desk:
    """Events one way, the signal to stop the other."""

    def __init__(self) -> None:
        self._events: list[Mapping[str, Any]] = []
        self._signal = 0

    def deliver(self, events: list[Mapping[str, Any]]) -> int:
        """Rank 0's new events; returns the signal that the driver was asked to stop by, or 0."""
        self._events.extend(events)
        return self._signal

    def take(self) -> list[Mapping[str, Any]]:
        """For the driver: the events since it last asked."""
        events, self._events = self._events, []
        return events

    def stop(self, number: int) -> None:
        """For the driver: pass a signal on."""
        self._signal = number
