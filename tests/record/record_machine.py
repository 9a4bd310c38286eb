"""The protocols of the record against everything that may happen to their writers.

Several writers run the real code, each in a thread that stops before every request to storage. The test decides what
becomes of each request: done, refused, done without a reply, or on its way and done much later. Writers are killed,
or go on as zombies after the next one has claimed the run; checkpoints get damaged; readers list now and read later.
After every move the store must keep the promises.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any, ClassVar

import hypothesis.strategies as st
import pyarrow.parquet as pq
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from record_lives import (
    CELL,
    EVERY,
    KEEP,
    TOTAL,
    Faithful,
    Fate,
    Life,
    Store,
    best_at,
    evaluation_at,
    loss_at,
    open_run,
    weight_at,
)

from pipeline.record import decisions
from pipeline.record.attempt import peek
from pipeline.record.checkpoint import Checkpoint, DamagedError
from pipeline.record.entries import Commit, Entry
from pipeline.record.journal import Journal
from pipeline.record.standing import standing

LIVES = 7
"""Attempts in one example, besides the undisturbed last one."""


class Machine(RuleBasedStateMachine):
    protocol: ClassVar[Faithful] = Faithful()

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.run = open_run(self.store)
        self.run.birth("name: run\n", {"total_steps": TOTAL, "cell_steps": CELL})
        self.lives: list[Life] = []
        self.journal: dict[int, bytes] = {}
        self.shown: dict[str, int] = {}
        self.tables: dict[bytes, dict[str, list[Any]]] = {}
        self.snapshots: list[list[str]] = []
        self.checked = 0
        self.entries: tuple[int, tuple[Entry, ...]] = (0, ())

    def alive(self) -> list[Life]:
        return [life for life in self.lives if not life.over]

    @precondition(lambda self: len(self.lives) < LIVES and len(self.alive()) < 3)
    @rule(saves=st.frozensets(st.integers(1, TOTAL)), wish=st.none() | st.integers(1, TOTAL), ahead=st.integers(0, 12))
    def begin_an_attempt(self, saves: frozenset[int], wish: int | None, ahead: int) -> None:
        """By a driver that takes the last one for dead, rightly or wrongly."""
        life = Life(
            self.store, self.protocol, len(self.lives) + 1, saves=saves, wish=wish, believes=self._last_attempt()
        )
        self.lives.append(life)
        self._advance(life, ahead)

    @precondition(lambda self: bool(self.alive()))
    @rule(data=st.data(), requests=st.integers(1, 40))
    def go_on(self, data: st.DataObject, requests: int) -> None:
        self._advance(self._one(data), requests)

    @precondition(lambda self: bool(self.alive()))
    @rule(
        data=st.data(), word=st.sampled_from(["journal", "evals", "steps", "manifest", "delete", "result", "run.json"])
    )
    def go_on_until(self, data: st.DataObject, word: str) -> None:
        """Up to the request of interest, which is where faults find most."""
        life = self._one(data)
        for _ in range(80):
            self._advance(life, 1)
            if life.over or (life.writes and word in life.what):
                break

    @precondition(lambda self: bool(self.alive()))
    @rule(data=st.data(), fate=st.sampled_from(["refused", "unanswered", "late"]))
    def fail_a_request(self, data: st.DataObject, fate: Fate) -> None:
        life = self._one(data)
        note(f"{life.name}: {life.what}: {fate}")
        life.go_on(fate)

    @precondition(lambda self: bool(self.alive()))
    @rule(data=st.data(), done=st.booleans(), late=st.booleans())
    def kill(self, data: st.DataObject, done: bool, late: bool) -> None:
        life = self._one(data)
        note(f"{life.name}: killed at {life.what} {done=} {late=}")
        life.kill(done=done, late=late)

    @precondition(lambda self: bool(self.store.late))
    @rule(data=st.data())
    def land_a_late_request(self, data: st.DataObject) -> None:
        self._land(data.draw(st.integers(0, len(self.store.late) - 1)))

    @precondition(lambda self: len(self.store.damaged) < 3 and self._checkpoints())
    @rule(data=st.data(), way=st.sampled_from(["cut", "flip", "lose"]))
    def damage_a_checkpoint(self, data: st.DataObject, way: str) -> None:
        name = data.draw(st.sampled_from(self._checkpoints()))
        file = data.draw(st.sampled_from(sorted(path for path in self.store.files if f"/{name}/" in path)))
        note(f"{way} {file}")
        content = self.store.files[file]
        if way == "lose":
            self.store.remove(file)
        else:
            self.store.put(file, content[:-1] if way == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        self.store.damaged.add(name)

    @rule()
    def list_as_a_reader(self) -> None:
        self.snapshots.append(self._listed("steps") + self._listed("evals"))

    @precondition(lambda self: bool(self.snapshots))
    @rule(data=st.data())
    def read_what_was_listed(self, data: st.DataObject) -> None:
        """Steps without a gap and once each, whatever happened since the listing."""
        names = self.snapshots.pop(data.draw(st.integers(0, len(self.snapshots) - 1)))
        steps = [step for name in names if "/steps/" in name for step in self._table(name)["step"]]
        assert steps == list(range(1, len(steps) + 1)), "a reader saw a gap, or a step twice"

    # What must hold at any moment.

    @invariant()
    def the_promises_hold(self) -> None:
        if self.checked == self.store.changes:
            return
        self.nothing_in_the_journal_changes()
        self.the_log_holds_each_step_once_as_it_was()
        self.what_is_kept_is_there()
        self.the_end_binds()
        self.the_best_is_the_earliest_of_the_best()
        self.its_standing_can_be_told()
        self.checked = self.store.changes

    def nothing_in_the_journal_changes(self) -> None:
        numbers = sorted(int(path[-13:-5]) for path in self.store.files if "/journal/" in path)
        assert numbers == list(range(1, len(numbers) + 1)), "a gap in the journal"
        for number in numbers:
            data = self.store.files[f"/runs/run/journal/{number:08d}.json"]
            assert self.journal.setdefault(number, data) == data, "an entry changed"
        assert len(self.journal) == len(numbers), "an entry vanished"

    def the_log_holds_each_step_once_as_it_was(self) -> None:
        entries = self._entries()
        names = self._listed("steps")
        steps: list[int] = []
        for index, name in enumerate(names):
            assert name.endswith(f"/{index:06d}.parquet"), "a gap between cells"
            table = self._table(name)
            steps += table["step"]
            assert [loss_at(step) for step in table["step"]] == table["loss"], "a row is not what training computed"
            own, whole = table["step"], list(range(index * CELL + 1, index * CELL + CELL + 1))
            assert own == whole[: len(own)], "a cell holds the wrong steps"
            if own != whole:
                assert own[-1:] == [decisions.ended_at(entries)], "an incomplete cell before the end"
                assert index == len(names) - 1
            assert len(own) >= self.shown.get(name, 0), "a cell lost rows"
            self.shown[name] = len(own)
            other = name.replace("/steps/", "/evals/")
            assert other in self.store.files, "the steps of a cell show before its evaluations"
            evaluations = self._table(other)
            first = own[0] if index else 0
            expected = [step for step in range(first, (own[-1]) + 1) if step % EVERY == 0]
            assert evaluations["step"] == expected, "an evaluation is missing, or stands twice"
            assert evaluations["loss"] == [evaluation_at(step) for step in expected]
        assert set(self.shown) <= set(names), "a listed file vanished"
        assert len(steps) <= decisions.highest_step(entries), "a step shows that no commit covers"

    def what_is_kept_is_there(self) -> None:
        entries = self._entries()
        commit = decisions.newest_commit(entries)
        for entry in [*([commit] if commit is not None else []), *decisions.ends(entries)]:
            assert len(entry.kept) <= KEEP
            assert entry.kept[0][0] == entry.checkpoint
            for name in {name for pair in entry.kept for name in pair if name is not None} - self.store.damaged:
                try:
                    Checkpoint(self.run, name).verify()
                except DamagedError as error:
                    raise AssertionError(
                        f"entry {entry.number} keeps a checkpoint that is not whole: {error}"
                    ) from error

    def the_end_binds(self) -> None:
        entries = self._entries()
        steps = [entry.step for entry in entries if isinstance(entry, Commit)]
        for end in decisions.ends(entries):
            assert max(steps) == end.step, "a commit beyond an end, or an end below a commit"

    def the_best_is_the_earliest_of_the_best(self) -> None:
        for entry in self._entries():
            if isinstance(entry, Commit):
                assert (entry.best.step if entry.best is not None else None) == best_at(entry.step)
                name = entry.best.checkpoint if entry.best is not None else None
                assert entry.kept[0] == (entry.checkpoint, name)
                if (
                    name is not None
                    and name not in self.store.damaged
                    and f"/runs/run/checkpoints/{name}/manifest.json" in self.store.files
                ):
                    assert entry.best is not None
                    assert float(Checkpoint(self.run, name).weights()["weight"]) == weight_at(entry.best.step)

    def its_standing_can_be_told(self) -> None:
        assert standing(self.run).status in ("running", "stalled", "interrupted", "finished")

    def teardown(self) -> None:
        """Land what is late, end every process, run once more undisturbed: all must be as if nothing had happened."""
        try:
            if not any(life.error for life in self.lives):
                self._conclude()
        finally:
            for life in self.lives:
                life.kill(done=False, late=False)

    def _conclude(self) -> None:
        for life in self.alive():
            life.kill(done=False, late=False)
        while self.store.late:
            self._land(-1)
        last = Life(self.store, self.protocol, 99, saves=frozenset({4, 7}), wish=None, believes=self._last_attempt())
        self.lives.append(last)
        while not last.over:
            last.go_on()
        if last.error is not None:
            raise last.error
        self.the_promises_hold()
        entries = self._entries()
        end = decisions.ended_at(entries)
        assert end is not None
        assert [step for name in self._listed("steps") for step in self._table(name)["step"]] == list(range(1, end + 1))
        run = open_run(self.store)  # as another process sees it
        assert peek(run) == "finished"
        assert run.has_result()
        assert standing(run).status == "finished"
        commit = decisions.ends(entries)[-1]
        assert float(Checkpoint(run, commit.checkpoint).weights()["weight"]) == weight_at(end)
        spare = decisions.spared(commit.kept, entries)
        there = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        assert there <= spare, "retention left what no entry keeps"

    # Helpers.

    def _land(self, index: int) -> None:
        with suppress(FileExistsError):  # a create that came too late
            self.store.late.pop(index)()

    def _advance(self, life: Life, requests: int) -> None:
        for _ in range(requests):
            if life.over:
                break
            asked = life.what if life.writes else ""
            life.go_on()
            self._look_after(asked)

    def _look_after(self, request: str) -> None:
        """Every state that a reader could meet counts, not only those between two rules."""
        if "/journal/" in request:
            self.nothing_in_the_journal_changes()
            self.the_end_binds()
            self.what_is_kept_is_there()
        if "/metrics/" in request:
            self.the_log_holds_each_step_once_as_it_was()
        if request.startswith("delete"):
            self.what_is_kept_is_there()

    def _one(self, data: st.DataObject) -> Life:
        alive = self.alive()
        return alive[data.draw(st.integers(0, len(alive) - 1))]

    def _entries(self) -> tuple[Entry, ...]:
        if self.entries[0] != self.store.changes:
            self.entries = (self.store.changes, Journal(self.run.storage).read())
        return self.entries[1]

    def _last_attempt(self) -> int | None:
        claim = decisions.last_claim(self._entries())
        return claim.attempt if claim is not None else None

    def _checkpoints(self) -> list[str]:
        """Sound ones that a commit names, for only these are promised."""
        named = {name for entry in self._entries() if isinstance(entry, Commit) for pair in entry.kept for name in pair}
        there = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        return sorted((there & named) - self.store.damaged)

    def _listed(self, folder: str) -> list[str]:
        return sorted(path for path in self.store.files if path.startswith(f"/runs/run/metrics/{folder}/"))

    def _table(self, name: str) -> dict[str, list[Any]]:
        data = self.store.files[name]
        if data not in self.tables:
            self.tables[data] = pq.read_table(io.BytesIO(data), use_threads=False).to_pydict()
        return self.tables[data]
