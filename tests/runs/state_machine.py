"""A search through what may happen to the writers of a record, see `record_world`."""

from __future__ import annotations

from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.runs.protocol_model import ProtocolModel
from tests.runs.simulated_writers import TOTAL_STEPS, ReferenceProtocol, RequestOutcome, SimulatedWriter

MAX_ATTEMPTS = 7
"""Attempts in one example, besides the undisturbed last one."""


class ProtocolStateMachine(RuleBasedStateMachine):
    """Does what may happen, in any order."""

    protocol: ClassVar[ReferenceProtocol] = ReferenceProtocol()

    def __init__(self) -> None:
        super().__init__()
        self.world = ProtocolModel(self.protocol)

    @precondition(lambda self: len(self.world.lives) < MAX_ATTEMPTS and len(self.world.alive()) < 3)
    @rule(
        saves=st.frozensets(st.integers(1, TOTAL_STEPS)),
        wish=st.none() | st.integers(1, TOTAL_STEPS),
        ahead=st.integers(0, 12),
    )
    def begin_attempt(self, saves: frozenset[int], wish: int | None, ahead: int) -> None:
        self.world.advance(self.world.start_writer(saves, wish), ahead)

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), requests=st.integers(1, 40))
    def resume_writer(self, data: st.DataObject, requests: int) -> None:
        self.world.advance(self._draw_writer(data), requests)

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), word=st.sampled_from(["journal", "evals", "steps", "manifest", "delete", "result", "run."]))
    def resume_until(self, data: st.DataObject, word: str) -> None:
        """Up to the request of interest, which is where faults find most."""
        life = self._draw_writer(data)
        for _ in range(80):
            self.world.advance(life, 1)
            if life.is_finished or (life.is_write and word in life.request):
                break

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), fate=st.sampled_from(["refused", "unanswered", "late"]))
    def fail_request(self, data: st.DataObject, fate: RequestOutcome) -> None:
        life = self._draw_writer(data)
        note(f"{life.name}: {life.request}: {fate}")
        life.resume(fate)

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), done=st.booleans(), late=st.booleans())
    def kill_writer(self, data: st.DataObject, done: bool, late: bool) -> None:
        life = self._draw_writer(data)
        note(f"{life.name}: killed at {life.request} {done=} {late=}")
        life.kill(done=done, late=late)

    @precondition(lambda self: bool(self.world.store.late))
    @rule(data=st.data())
    def apply_late_request(self, data: st.DataObject) -> None:
        self.world.apply_late_request(data.draw(st.integers(0, len(self.world.store.late) - 1)))

    @precondition(lambda self: len(self.world.store.damaged) < 3 and bool(self.world.checkpoints()))
    @rule(data=st.data(), way=st.sampled_from(["cut", "flip", "lose"]))
    def damage_checkpoint(self, data: st.DataObject, way: str) -> None:
        name = data.draw(st.sampled_from(self.world.checkpoints()))
        file = data.draw(st.sampled_from(sorted(path for path in self.world.store.files if f"/{name}/" in path)))
        self.world.damage_checkpoint(name, file, way)

    @rule(number=st.integers(0, 30))
    def corrupt_summary(self, number: int) -> None:
        self.world.corrupt_summary(number)

    @rule()
    def list_segments(self) -> None:
        self.world.list_segments()

    @precondition(lambda self: bool(self.world.snapshots))
    @rule(data=st.data())
    def read_listed_segments(self, data: st.DataObject) -> None:
        self.world.read_listed_segments(data.draw(st.integers(0, len(self.world.snapshots) - 1)))

    @invariant()
    def invariants_hold(self) -> None:
        self.world.check_invariants()

    def teardown(self) -> None:
        try:
            if not any(life.error for life in self.world.lives):
                self.world.finish_and_check()
        finally:
            self.world.kill_all()

    def _draw_writer(self, data: st.DataObject) -> SimulatedWriter:
        alive = self.world.live_writers()
        return alive[data.draw(st.integers(0, len(alive) - 1))]
