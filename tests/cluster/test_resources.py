"""How many workers start on a cluster, decided without a cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import resources
from pipeline.cluster.resources import ClusterResources, WorkerPlacement, workers_that_fit
from pipeline.config import ScalingConfig
from pipeline.context import StopSignals
from pipeline.errors import InputError, Interrupted, WorkerLostError
from pipeline.events import Event, Message, WarningMessage


class FakeClock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(resources, "time", clock)
    return clock


def make_nodes(*cpus: float) -> tuple[Mapping[str, float], ...]:
    return tuple({"CPU": count} for count in cpus)


def make_placement(get_resources: Callable[[], ClusterResources], **scale: Any) -> WorkerPlacement:
    return WorkerPlacement(get_resources, ScalingConfig(**scale))


def text_of(event: Event) -> str:
    assert isinstance(event, Message | WarningMessage)
    return event.text


def wait_for_resources_with(
    placement: WorkerPlacement, *, after_failure: bool, signals: StopSignals | None = None
) -> tuple[int, list[str]]:
    messages: list[str] = []
    num_workers = placement.wait_for_resources(
        signals or StopSignals(), lambda event: messages.append(text_of(event)), after_failure=after_failure
    )
    return num_workers, messages


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_each_worker_fits_on_one_node(cpus: list[int], per_worker: int) -> None:
    num_workers = workers_that_fit(make_nodes(*cpus), {"CPU": per_worker})
    assert num_workers == sum(count // per_worker for count in cpus)
    assert num_workers * per_worker <= sum(cpus)


def test_one_gpu_per_worker_where_available_and_allowed() -> None:
    state = ClusterResources(total=({"CPU": 8, "GPU": 2}, {"CPU": 8}), free=())
    assert make_placement(lambda: state, workers=2).per_worker == {"CPU": 1, "GPU": 1}
    assert make_placement(lambda: state, workers=2, device="cpu").per_worker == {"CPU": 1}
    make_placement(lambda: state, workers=2).check_feasible()
    with pytest.raises(
        InputError, match=r"3 workers of 1 CPU, 1 GPU each .* has 16 CPU, 2 GPU on 2 nodes, enough for 2"
    ):
        make_placement(lambda: state, workers=3).check_feasible()


def test_infeasible_request_is_rejected_unless_autoscaling(clock: FakeClock) -> None:
    fixed = ClusterResources(total=make_nodes(2, 1), free=make_nodes(2, 1))
    with pytest.raises(InputError, match="has 3 CPU on 2 nodes, enough for 3") as raised:
        make_placement(lambda: fixed, workers=4).check_feasible()
    assert raised.value.exit_code == 2
    with pytest.raises(InputError, match="enough for 1"):
        make_placement(lambda: fixed, workers=2, cpus_per_worker=1.5).check_feasible()
    autoscaling = ClusterResources(total=make_nodes(2), free=make_nodes(2), autoscaler_max={"CPU": 16})
    make_placement(lambda: autoscaling, workers=8).check_feasible()
    num_workers, _ = wait_for_resources_with(make_placement(lambda: autoscaling, workers=8), after_failure=False)
    assert num_workers == 8, "the autoscaler adds nodes for pending workers"
    with pytest.raises(InputError):
        make_placement(lambda: autoscaling, workers=17).check_feasible()


def test_busy_cluster_is_waited_for_with_a_message(clock: FakeClock) -> None:
    def get_resources() -> ClusterResources:
        return ClusterResources(total=make_nodes(3), free=make_nodes(3 if clock.now >= 150 else 1))

    num_workers, messages = wait_for_resources_with(make_placement(get_resources, workers=2), after_failure=False)
    assert (num_workers, clock.now) == (2, 150)
    assert len(messages) == 3
    assert "waiting for resources for 2 workers of 1 CPU each: 1 CPU free of 3 CPU" in messages[0]


def test_worker_range_uses_free_resources_first_and_waits_after_a_failure(clock: FakeClock) -> None:
    state = ClusterResources(total=make_nodes(1), free=make_nodes(1))
    assert (
        wait_for_resources_with(make_placement(lambda: state, workers={"min": 1, "max": 2}), after_failure=False)[0]
        == 1
    )
    assert clock.now == 0
    num_workers, messages = wait_for_resources_with(
        make_placement(lambda: state, workers={"min": 1, "max": 2}), after_failure=True
    )
    assert (num_workers, clock.now) == (1, resources.WAIT_RANGE_S)
    assert "for up to 60 s" in messages[0]
    with_limit = make_placement(lambda: state, workers={"min": 1, "max": 2}, wait_s=5)
    assert wait_for_resources_with(with_limit, after_failure=True)[0] == 1
    assert clock.now == resources.WAIT_RANGE_S + 5


def test_node_that_returns_in_time_is_used(clock: FakeClock) -> None:
    def get_resources() -> ClusterResources:
        return ClusterResources(total=make_nodes(1, 1), free=make_nodes(1, 1) if clock.now >= 20 else make_nodes(1))

    assert (
        wait_for_resources_with(make_placement(get_resources, workers={"min": 1, "max": 2}), after_failure=True)[0] == 2
    )
    assert clock.now == 20


def test_fixed_worker_count_times_out_after_a_failure(clock: FakeClock) -> None:
    state = ClusterResources(total=make_nodes(1), free=make_nodes(1))
    with pytest.raises(WorkerLostError, match="after 900 s") as raised:
        wait_for_resources_with(make_placement(lambda: state, workers=2), after_failure=True)
    assert "scale.wait_s" in raised.value.fix
    assert clock.now == resources.WAIT_FIXED_S


def test_signal_ends_the_wait(clock: FakeClock) -> None:
    signals = StopSignals()
    signals.received = signal.SIGINT
    with pytest.raises(Interrupted):
        wait_for_resources_with(
            make_placement(lambda: ClusterResources(total=make_nodes(2), free=make_nodes(0)), workers=2),
            after_failure=False,
            signals=signals,
        )


def test_local_cluster_may_oversubscribe_cores_with_a_message() -> None:
    messages: list[str] = []
    resources.warn_if_oversubscribed(1, lambda event: messages.append(text_of(event)))
    assert messages == []
    resources.warn_if_oversubscribed(100_000, lambda event: messages.append(text_of(event)))
    assert "request 100000 CPUs" in messages[0]
