"""Randomized search through schedules and faults of the writers of a run; see `protocol_model`."""

from __future__ import annotations

from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.runs.protocol_model import ProtocolModel
from tests.runs.simulated_writers import TOTAL_STEPS, ReferenceProtocol, RequestOutcome, SimulatedWriter

MAX_ATTEMPTS = 7
"""Maximum number of attempts per example, without the undisturbed last one."""


class ProtocolStateMachine(RuleBasedStateMachine):
    """Do all possible operations of the model, in any order."""

    protocol: ClassVar[ReferenceProtocol] = ReferenceProtocol()

    def __init__(self) -> None:
        super().__init__()
        self.model = ProtocolModel(self.protocol)

    @precondition(lambda self: len(self.model.writers) < MAX_ATTEMPTS and len(self.model.live_writers()) < 3)
    @rule(
        commit_steps=st.frozensets(st.integers(1, TOTAL_STEPS)),
        early_stop_step=st.none() | st.integers(1, TOTAL_STEPS),
        requests=st.integers(0, 12),
    )
    def begin_attempt(self, commit_steps: frozenset[int], early_stop_step: int | None, requests: int) -> None:
        self.model.advance(self.model.start_writer(commit_steps, early_stop_step), requests)

    @precondition(lambda self: bool(self.model.live_writers()))
    @rule(data=st.data(), requests=st.integers(1, 40))
    def resume_writer(self, data: st.DataObject, requests: int) -> None:
        self.model.advance(self._draw_writer(data), requests)

    @precondition(lambda self: bool(self.model.live_writers()))
    @rule(data=st.data(), text=st.sampled_from(["journal", "evals", "steps", "manifest", "delete", "result", "run."]))
    def resume_until(self, data: st.DataObject, text: str) -> None:
        """Continue up to a request of interest, where faults find most violations."""
        writer = self._draw_writer(data)
        for _ in range(80):
            self.model.advance(writer, 1)
            if writer.is_finished or (writer.is_write and text in writer.request):
                break

    @precondition(lambda self: bool(self.model.live_writers()))
    @rule(data=st.data(), outcome=st.sampled_from(["refused", "unanswered", "late"]))
    def fail_request(self, data: st.DataObject, outcome: RequestOutcome) -> None:
        writer = self._draw_writer(data)
        note(f"{writer.name}: {writer.request}: {outcome}")
        writer.resume(outcome)

    @precondition(lambda self: bool(self.model.live_writers()))
    @rule(data=st.data(), done=st.booleans(), late=st.booleans())
    def kill_writer(self, data: st.DataObject, done: bool, late: bool) -> None:
        writer = self._draw_writer(data)
        note(f"{writer.name}: killed at {writer.request} {done=} {late=}")
        writer.kill(done=done, late=late)

    @precondition(lambda self: bool(self.model.store.late))
    @rule(data=st.data())
    def apply_late_request(self, data: st.DataObject) -> None:
        self.model.apply_late_request(data.draw(st.integers(0, len(self.model.store.late) - 1)))

    @precondition(lambda self: len(self.model.store.damaged) < 3 and bool(self.model.checkpoints()))
    @rule(data=st.data(), damage=st.sampled_from(["truncated", "altered", "missing"]))
    def damage_checkpoint(self, data: st.DataObject, damage: str) -> None:
        name = data.draw(st.sampled_from(self.model.checkpoints()))
        file = data.draw(st.sampled_from(sorted(path for path in self.model.store.files if f"/{name}/" in path)))
        self.model.damage_checkpoint(name, file, damage)

    @rule(number=st.integers(0, 30))
    def corrupt_summary(self, number: int) -> None:
        self.model.corrupt_summary(number)

    @rule()
    def list_segments(self) -> None:
        self.model.list_segments()

    @precondition(lambda self: bool(self.model.snapshots))
    @rule(data=st.data())
    def read_listed_segments(self, data: st.DataObject) -> None:
        self.model.read_listed_segments(data.draw(st.integers(0, len(self.model.snapshots) - 1)))

    @invariant()
    def invariants_hold(self) -> None:
        self.model.check_invariants()

    def teardown(self) -> None:
        try:
            if not any(writer.error for writer in self.model.writers):
                self.model.finish_and_check()
        finally:
            self.model.kill_all()

    def _draw_writer(self, data: st.DataObject) -> SimulatedWriter:
        writers = self.model.live_writers()
        return writers[data.draw(st.integers(0, len(writers) - 1))]
