"""How many workers a cluster has room for, decided without a cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import room as rooms
from pipeline.cluster.room import Room, Seen, fitting
from pipeline.context import StopSignals
from pipeline.errors import InputError, Interrupted, WorkerLostError
from pipeline.events import Event, Message, WarningMessage
from pipeline.job import Scale


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rooms, "time", clock)
    return clock


def cpus(*nodes: float) -> tuple[Mapping[str, float], ...]:
    return tuple({"CPU": node} for node in nodes)


def room(look: Callable[[], Seen], **scale: Any) -> Room:
    return Room(look, Scale(**scale))


def text_of(event: Event) -> str:
    assert isinstance(event, Message | WarningMessage)
    return event.text


def wait(room: Room, *, after_loss: bool, signals: StopSignals | None = None) -> tuple[int, list[str]]:
    messages: list[str] = []
    num_workers = room.wait(signals or StopSignals(), lambda event: messages.append(text_of(event)), after_loss=after_loss)
    return num_workers, messages


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_a_worker_lies_on_one_node(nodes: list[int], each: int) -> None:
    num_workers = fitting(cpus(*nodes), {"CPU": each})
    assert num_workers == sum(node // each for node in nodes)
    assert num_workers * each <= sum(nodes)


def test_a_gpu_each_where_there_are_any_and_the_job_lets_it() -> None:
    seen = Seen(total=({"CPU": 8, "GPU": 2}, {"CPU": 8}), free=())
    assert room(lambda: seen, workers=2).per_worker == {"CPU": 1, "GPU": 1}
    assert room(lambda: seen, workers=2, device="cpu").per_worker == {"CPU": 1}
    room(lambda: seen, workers=2).check()
    with pytest.raises(InputError, match=r"3 workers of 1 CPU, 1 GPU each .* has 16 CPU, 2 GPU on 2 nodes, room for 2"):
        room(lambda: seen, workers=3).check()


def test_what_never_fits_is_refused_unless_an_autoscaler_could_make_room(clock: Clock) -> None:
    none = Seen(total=cpus(2, 1), free=cpus(2, 1))
    with pytest.raises(InputError, match="has 3 CPU on 2 nodes, room for 3") as raised:
        room(lambda: none, workers=4).check()
    assert raised.value.exit_code == 2
    with pytest.raises(InputError, match="room for 1"):
        room(lambda: none, workers=2, cpus_per_worker=1.5).check()
    grows = Seen(total=cpus(2), free=cpus(2), possible={"CPU": 16})
    room(lambda: grows, workers=8).check()
    assert wait(room(lambda: grows, workers=8), after_loss=False)[0] == 8, "nodes come for workers that wait"
    with pytest.raises(InputError):
        room(lambda: grows, workers=17).check()


def test_a_busy_cluster_is_waited_for_and_said(clock: Clock) -> None:
    def look() -> Seen:
        return Seen(total=cpus(3), free=cpus(3 if clock.now >= 150 else 1))

    num_workers, messages = wait(room(look, workers=2), after_loss=False)
    assert (num_workers, clock.now) == (2, 150)
    assert len(messages) == 3
    assert "waiting for room for 2 workers of 1 CPU each: 1 CPU free of 3 CPU" in messages[0]


def test_a_range_takes_what_is_free_at_first_and_waits_for_all_after_a_loss(clock: Clock) -> None:
    seen = Seen(total=cpus(1), free=cpus(1))
    assert wait(room(lambda: seen, workers={"min": 1, "max": 2}), after_loss=False)[0] == 1
    assert clock.now == 0
    num_workers, messages = wait(room(lambda: seen, workers={"min": 1, "max": 2}), after_loss=True)
    assert (num_workers, clock.now) == (1, rooms.WAIT_RANGE_S)
    assert "for up to 60 s" in messages[0]
    assert wait(room(lambda: seen, workers={"min": 1, "max": 2}, wait_s=5), after_loss=True)[0] == 1
    assert clock.now == rooms.WAIT_RANGE_S + 5


def test_who_returns_in_time_is_taken(clock: Clock) -> None:
    def look() -> Seen:
        return Seen(total=cpus(1, 1), free=cpus(1, 1) if clock.now >= 20 else cpus(1))

    assert wait(room(look, workers={"min": 1, "max": 2}), after_loss=True)[0] == 2
    assert clock.now == 20


def test_a_fixed_number_that_finds_no_room_after_a_loss_gives_up_at_its_limit(clock: Clock) -> None:
    seen = Seen(total=cpus(1), free=cpus(1))
    with pytest.raises(WorkerLostError, match="after 900 s") as raised:
        wait(room(lambda: seen, workers=2), after_loss=True)
    assert "scale.wait_s" in raised.value.fix
    assert clock.now == rooms.WAIT_FIXED_S


def test_a_signal_ends_the_wait(clock: Clock) -> None:
    signals = StopSignals()
    signals.received = signal.SIGINT
    with pytest.raises(Interrupted):
        wait(room(lambda: Seen(total=cpus(2), free=cpus(0)), workers=2), after_loss=False, signals=signals)


def test_a_cluster_of_its_own_may_share_its_cores_and_says_so() -> None:
    messages: list[str] = []
    rooms.warn_of_few_cores(1, lambda event: messages.append(text_of(event)))
    assert messages == []
    rooms.warn_of_few_cores(100_000, lambda event: messages.append(text_of(event)))
    assert "ask for 100000 CPUs" in messages[0]
