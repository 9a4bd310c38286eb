"""A store, the writers at work on it, and the promises that it must keep whatever becomes of them."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.record import decisions, live
from pipeline.record.attempt import peek
from pipeline.record.checkpoint import Checkpoint, DamagedError
from pipeline.record.columns import Columns
from pipeline.record.entries import Commit, Entry, JournalState, parse_entry
from pipeline.record.standing import standing
from pipeline.record.values import from_json
from tests.record.record_lives import (
    CELLS,
    EVERY,
    KEEP,
    TOTAL,
    Faithful,
    Life,
    Store,
    best_at,
    evaluation_at,
    loss_at,
    open_run,
    weight_at,
)

ALL = 10_000
"""More requests than any attempt makes."""


class World:
    """Writers at work on one store, and what may become of them.

    Several writers run the real code, each in a thread that stops before every request to storage. The test decides
    what becomes of each request: done, refused, done without a reply, or on its way and done much later. Writers are
    killed, or go on as zombies after the next one has claimed the run; checkpoints get damaged; readers list now and
    read later. After every move the store must keep the promises.

    Parameters
    ----------
    protocol: what the writers do.
    """

    def __init__(self, protocol: Faithful) -> None:
        self.protocol = protocol
        self.store = Store()
        self.run = open_run(self.store)
        self.run.birth("name: run\n", {"total_steps": TOTAL, "first_cell_steps": CELLS.first, "cell_steps": CELLS.most})
        self.lives: list[Life] = []
        self.journal: dict[int, bytes] = {}
        self.shown: dict[str, int] = {}
        self.tables: dict[bytes, dict[str, list[Any]]] = {}
        self.snapshots: list[list[str]] = []
        self.live_rows: live.LiveRows | None = None
        self.live_files: dict[str, Life] = {}
        self.checked = 0
        self.entries: tuple[int, tuple[Entry, ...]] = (0, ())
        self.told = 0

    # What may happen.

    def begin(self, saves: Collection[int], wish: int | None = None) -> Life:
        """An attempt by a driver that takes the last one for dead, rightly or wrongly."""
        number, dead = len(self.lives) + 1, self._last_attempt()
        self.lives.append(Life(self.store, self.protocol, number, saves=frozenset(saves), wish=wish, believes=dead))
        return self.lives[-1]

    def advance(self, life: Life, requests: int = ALL) -> None:
        """Let an attempt do so many requests. Every state that a reader could meet counts."""
        for _ in range(requests):
            if life.over:
                break
            asked = life.what if life.writes else ""
            if "/live/" in asked and asked.startswith("replace"):
                assert self.live_files.setdefault(asked, life) is life, "two attempts write one file of live rows"
            life.go_on()
            self._look_after(asked)

    def land(self, index: int) -> None:
        """Let a late request take effect."""
        with suppress(FileExistsError):  # a create that came too late
            self.store.late.pop(index)()

    def damage(self, name: str, file: str, way: str) -> None:
        """Cut, alter or lose a file of a checkpoint."""
        content = self.store.files[file]
        if way == "lose":
            self.store.remove(file)
        else:
            self.store.put(file, content[:-1] if way == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        self.store.damaged.add(name)

    def spoil_the_view(self, number: int) -> None:
        """Have `run.json` name another entry as the newest, which is where a search begins."""
        self.store.put("/runs/run/run.json", json.dumps({"journal": number}).encode())

    def list_as_a_reader(self) -> None:
        """Remember what is listed now."""
        self.snapshots.append(self._listed("steps") + self._listed("evals"))

    def read_what_was_listed(self, index: int) -> None:
        """Steps without a gap and once each, whatever happened since the listing."""
        names = self.snapshots.pop(index)
        steps = [step for name in names if "/steps/" in name for step in self._table(name)["step"]]
        assert steps == list(range(1, len(steps) + 1)), "a reader saw a gap, or a step twice"

    def end_all(self) -> None:
        """Kill every process, its last request not sent."""
        for life in self.lives:
            life.kill(done=False, late=False)

    def alive(self) -> list[Life]:
        """Attempts that go on, zombies included."""
        return [life for life in self.lives if not life.over]

    def conclude(self) -> None:
        """Land what is late, end every process, run once more undisturbed: all must be as if nothing had happened."""
        self.end_all()
        while self.store.late:
            self.land(-1)
        self.advance(self.begin({4, 7}))
        self.check()
        state = self.state()
        end = state.ended_at
        assert end is not None
        assert [step for name in self._listed("steps") for step in self._table(name)["step"]] == list(range(1, end + 1))
        run = open_run(self.store)  # as another process sees it
        assert peek(run) == "finished"
        assert run.has_result()
        assert standing(run).status == "finished"
        commit = self.ends()[-1]
        assert float(Checkpoint(run, commit.checkpoint).weights()["weight"]) == weight_at(end)
        spare = {name for entry in self.ends() for pair in entry.kept for name in pair if name is not None}
        there = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        assert there <= spare, "retention left what no entry keeps"
        assert not any("/live/" in path for path in self.store.files), "live rows of a run that is over"

    def check(self) -> None:
        if self.checked == self.store.changes:
            return
        self.nothing_in_the_journal_changes()
        self.the_newest_entry_tells_of_all()
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

    def the_newest_entry_tells_of_all(self) -> None:
        """Found by searching, and by what it carries: the same as reading every entry."""
        assert open_run(self.store).journal.state() == self.state(), "the newest entry tells something else"
        for entry in self.known():
            if entry.number > self.told:
                whole = decisions.fold(self.known()[: entry.number - 1])
                assert entry.before == whole, f"entry {entry.number} carries something else"
                self.told = entry.number

    def the_log_holds_each_step_once_as_it_was(self) -> None:
        state = self.state()
        names = self._listed("steps")
        steps: list[int] = []
        for index, name in enumerate(names):
            assert name.endswith(f"/{index:06d}.parquet"), "a gap between cells"
            table = self._table(name)
            steps += table["step"]
            assert [loss_at(step) for step in table["step"]] == table["loss"], "a row is not what training computed"
            segment_steps, whole = table["step"], list(range(CELLS.first_step(index), CELLS.last_step(index) + 1))
            assert segment_steps == whole[: len(segment_steps)], "a cell holds the wrong steps"
            if segment_steps != whole:
                assert segment_steps[-1:] == [state.ended_at], "an incomplete cell before the end"
                assert index == len(names) - 1
            assert len(segment_steps) >= self.shown.get(name, 0), "a cell lost rows"
            self.shown[name] = len(segment_steps)
            other = name.replace("/steps/", "/evals/")
            assert other in self.store.files, "the steps of a cell show before its evaluations"
            evaluations = self._table(other)
            first = segment_steps[0] if index else 0
            expected = [step for step in range(first, (segment_steps[-1]) + 1) if step % EVERY == 0]
            assert evaluations["step"] == expected, "an evaluation is missing, or stands twice"
            assert evaluations["loss"] == [evaluation_at(step) for step in expected]
        assert set(self.shown) <= set(names), "a listed file vanished"
        assert len(steps) <= state.highest_step, "a step shows that no commit covers"

    def live_rows_go_on_where_the_cells_end(self) -> None:
        """Whoever reads the live rows, then the cells, misses none: now, and with those read one request ago."""
        before, self.live_rows = self.live_rows, live.read(self.run, Columns())
        held = sum(len(self._table(name)["step"]) for name in self._listed("steps"))
        for rows in (before, self.live_rows):
            if rows is None:
                continue
            steps = rows.steps.filter(pc.field("step") > held).to_pydict()
            assert steps["step"] == list(range(held + 1, held + 1 + len(steps["step"]))), "a gap before the live rows"
            assert steps["loss"] == [loss_at(step) for step in steps["step"]]
            evaluations = rows.evaluations.filter(pc.field("step") > (held or -1)).to_pydict()
            first = held + 1 if held else 0
            expected = [step for step in range(first, max([held, *evaluations["step"]]) + 1) if step % EVERY == 0]
            assert evaluations["step"] == (expected if evaluations["step"] else []), "a gap before live evaluations"
            assert evaluations["loss"] == [evaluation_at(step) for step in evaluations["step"]]

    def what_is_kept_is_there(self) -> None:
        commits = [entry for entry in self.known() if isinstance(entry, Commit)]
        for entry in [*commits[-1:], *self.ends()]:
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
        steps = [entry.step for entry in self.known() if isinstance(entry, Commit)]
        for end in self.ends():
            assert max(steps) == end.step, "a commit beyond an end, or an end below a commit"

    def the_best_is_the_earliest_of_the_best(self) -> None:
        for entry in self.known():
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

    def _look_after(self, request: str) -> None:
        """Every state that a reader could meet counts, not only those between two rules."""
        if "/journal/" in request:
            self.nothing_in_the_journal_changes()
            self.the_newest_entry_tells_of_all()
            self.the_end_binds()
            self.what_is_kept_is_there()
        if "/metrics/" in request:
            self.the_log_holds_each_step_once_as_it_was()
        if "/metrics/steps/" in request or "/live/" in request:
            self.live_rows_go_on_where_the_cells_end()
        if request.startswith("delete"):
            self.what_is_kept_is_there()

    def known(self) -> tuple[Entry, ...]:
        """The journal as it is now, each entry read: the truth that no search and no summary stands between."""
        if self.entries[0] != self.store.changes:
            entries: list[Entry] = []
            while (path := f"/runs/run/journal/{len(entries) + 1:08d}.json") in self.store.files:
                entries.append(parse_entry(from_json(self.store.files[path]), len(entries) + 1))
            self.entries = (self.store.changes, tuple(entries))
        return self.entries[1]

    def state(self) -> JournalState:
        """What all entries amount to, one by one."""
        return decisions.fold(self.known())

    def ends(self) -> list[Commit]:
        """All commits that end the run."""
        return [entry for entry in self.known() if isinstance(entry, Commit) and entry.end]

    def _last_attempt(self) -> int | None:
        claim = self.state().claim
        return claim.attempt if claim is not None else None

    def checkpoints(self) -> list[str]:
        """Sound ones that a commit names, for only these are promised."""
        named = {name for entry in self.known() if isinstance(entry, Commit) for pair in entry.kept for name in pair}
        there = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        return sorted((there & named) - self.store.damaged)

    def _listed(self, folder: str) -> list[str]:
        return sorted(path for path in self.store.files if path.startswith(f"/runs/run/metrics/{folder}/"))

    def _table(self, name: str) -> dict[str, list[Any]]:
        data = self.store.files[name]
        if data not in self.tables:
            self.tables[data] = pq.read_table(io.BytesIO(data), use_threads=False).to_pydict()
        return self.tables[data]
