"""A search through what may happen to the writers of a record, see `record_world`."""

from __future__ import annotations

from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.record.record_lives import TOTAL, Faithful, Fate, Life
from tests.record.record_world import World

LIVES = 7
"""Attempts in one example, besides the undisturbed last one."""


class Machine(RuleBasedStateMachine):
    """Does what may happen, in any order."""

    protocol: ClassVar[Faithful] = Faithful()

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.protocol)

    @precondition(lambda self: len(self.world.lives) < LIVES and len(self.world.alive()) < 3)
    @rule(saves=st.frozensets(st.integers(1, TOTAL)), wish=st.none() | st.integers(1, TOTAL), ahead=st.integers(0, 12))
    def begin_an_attempt(self, saves: frozenset[int], wish: int | None, ahead: int) -> None:
        self.world.advance(self.world.begin(saves, wish), ahead)

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), requests=st.integers(1, 40))
    def go_on(self, data: st.DataObject, requests: int) -> None:
        self.world.advance(self._one(data), requests)

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), word=st.sampled_from(["journal", "evals", "steps", "manifest", "delete", "result", "run."]))
    def go_on_until(self, data: st.DataObject, word: str) -> None:
        """Up to the request of interest, which is where faults find most."""
        life = self._one(data)
        for _ in range(80):
            self.world.advance(life, 1)
            if life.over or (life.writes and word in life.what):
                break

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), fate=st.sampled_from(["refused", "unanswered", "late"]))
    def fail_a_request(self, data: st.DataObject, fate: Fate) -> None:
        life = self._one(data)
        note(f"{life.name}: {life.what}: {fate}")
        life.go_on(fate)

    @precondition(lambda self: bool(self.world.alive()))
    @rule(data=st.data(), done=st.booleans(), late=st.booleans())
    def kill(self, data: st.DataObject, done: bool, late: bool) -> None:
        life = self._one(data)
        note(f"{life.name}: killed at {life.what} {done=} {late=}")
        life.kill(done=done, late=late)

    @precondition(lambda self: bool(self.world.store.late))
    @rule(data=st.data())
    def land_a_late_request(self, data: st.DataObject) -> None:
        self.world.land(data.draw(st.integers(0, len(self.world.store.late) - 1)))

    @precondition(lambda self: len(self.world.store.damaged) < 3 and bool(self.world.checkpoints()))
    @rule(data=st.data(), way=st.sampled_from(["cut", "flip", "lose"]))
    def damage_a_checkpoint(self, data: st.DataObject, way: str) -> None:
        name = data.draw(st.sampled_from(self.world.checkpoints()))
        file = data.draw(st.sampled_from(sorted(path for path in self.world.store.files if f"/{name}/" in path)))
        self.world.damage(name, file, way)

    @rule(number=st.integers(0, 30))
    def spoil_the_view(self, number: int) -> None:
        self.world.spoil_the_view(number)

    @rule()
    def list_as_a_reader(self) -> None:
        self.world.list_as_a_reader()

    @precondition(lambda self: bool(self.world.snapshots))
    @rule(data=st.data())
    def read_what_was_listed(self, data: st.DataObject) -> None:
        self.world.read_what_was_listed(data.draw(st.integers(0, len(self.world.snapshots) - 1)))

    @invariant()
    def the_promises_hold(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        try:
            if not any(life.error for life in self.world.lives):
                self.world.conclude()
        finally:
            self.world.end_all()

    def _one(self, data: st.DataObject) -> Life:
        alive = self.world.alive()
        return alive[data.draw(st.integers(0, len(alive) - 1))]
