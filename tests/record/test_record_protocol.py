"""Whatever happens, the record keeps its promises: faults at every request, then a search through combinations."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from pipeline.storage import faults
from tests.record.record_lives import Faithful
from tests.record.record_machine import Machine
from tests.record.record_sweeps import sweep

COMMON = settings(
    deadline=None,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.0)


def test_a_fault_at_any_request() -> None:
    for case in sweep(Faithful(), thin=True):
        case()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_fault_at_any_request_and_every_overtaking() -> None:
    for case in sweep(Faithful(), thin=False):
        case()


def test_whatever_happens_the_record_keeps_its_promises() -> None:
    run_state_machine_as_test(Machine, settings=settings(COMMON, max_examples=40, derandomize=True))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_happens_the_record_keeps_its_promises_at_length() -> None:
    run_state_machine_as_test(Machine, settings=settings(COMMON, max_examples=2000, stateful_step_count=60))
