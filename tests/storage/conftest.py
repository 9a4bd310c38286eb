"""A fixture that replaces the clock of retries, so that tests do not depend on the load of the machine."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from pipeline.storage import retry


@pytest.fixture
def backoff_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between retries, in seconds. They are recorded but not made, and the clock stands still."""
    pauses: list[float] = []
    fake_time = SimpleNamespace(monotonic=lambda: 0.0, sleep=pauses.append, time=time.time)
    monkeypatch.setattr(retry, "time", fake_time)
    return pauses
