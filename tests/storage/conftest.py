"""How long storage is waited for, seen without a clock: a busy machine changes no pause."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from pipeline.storage import retry


@pytest.fixture
def backoff_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before another try, in seconds: none of them is made, and time does not pass for who waits."""
    made: list[float] = []
    patient = SimpleNamespace(monotonic=lambda: 0.0, sleep=made.append, time=time.time)
    monkeypatch.setattr(retry, "time", patient)
    return made
