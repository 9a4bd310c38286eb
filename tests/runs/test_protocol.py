"""The invariants of a run hold under faults: at every single request, and in randomized combinations."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from pipeline.storage import retry
from tests.runs.fault_sweep import fault_cases
from tests.runs.simulated_writers import ReferenceProtocol
from tests.runs.state_machine import ProtocolStateMachine

COMMON_SETTINGS = settings(
    deadline=None,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "INITIAL_BACKOFF_S", 0.0)


def test_single_fault_at_any_request() -> None:
    for case in fault_cases(ReferenceProtocol(), thin=True):
        case()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fault_at_any_request_and_every_overlap() -> None:
    for case in fault_cases(ReferenceProtocol(), thin=False):
        case()


def test_random_schedules_keep_invariants() -> None:
    run_state_machine_as_test(
        ProtocolStateMachine, settings=settings(COMMON_SETTINGS, max_examples=40, derandomize=True)
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_long_random_schedules_keep_invariants() -> None:
    run_state_machine_as_test(
        ProtocolStateMachine, settings=settings(COMMON_SETTINGS, max_examples=2000, stateful_step_count=60)
    )
