"""A store, the writers at work on it, and the promises that it must keep whatever becomes of them."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.runs.checkpoints.checkpoint import Checkpoint, DamagedError
from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import Commit, JournalEntry, JournalState, parse_entry
from pipeline.runs.lease.attempt import probe_lease
from pipeline.runs.metric_log import live
from pipeline.runs.metric_log.schema import MetricSchema
from pipeline.runs.serialization import from_json
from pipeline.runs.status import read_run_status
from tests.runs.simulated_writers import (
    EVALUATE_EVERY,
    KEEP_CHECKPOINTS,
    SEGMENT_LAYOUT,
    TOTAL_STEPS,
    InMemoryStore,
    ReferenceProtocol,
    SimulatedWriter,
    best_at,
    evaluation_at,
    loss_at,
    open_simulated_run,
    weight_at,
)

UNLIMITED = 10_000
"""More requests than any attempt makes."""


class ProtocolModel:
    """Writers at work on one store, and what may become of them.

    Several writers run the real code, each in a thread that stops before every request to storage. The test decides
    what becomes of each request: done, refused, done without a reply, or on its way and done much later. Writers are
    killed, or go on as zombies after the next one has claimed the run; checkpoints get damaged; readers list now and
    read later. After every move the store must keep the promises.

    Parameters
    ----------
    protocol: what the writers do.
    """

    def __init__(self, protocol: ReferenceProtocol) -> None:
        self.protocol = protocol
        self.store = InMemoryStore()
        self.run = open_simulated_run(self.store)
        self.run.create(
            "name: run\n",
            {
                "total_steps": TOTAL_STEPS,
                "first_cell_steps": SEGMENT_LAYOUT.first_segment_steps,
                "cell_steps": SEGMENT_LAYOUT.max_segment_steps,
            },
        )
        self.lives: list[SimulatedWriter] = []
        self.journal: dict[int, bytes] = {}
        self.shown: dict[str, int] = {}
        self.tables: dict[bytes, dict[str, list[Any]]] = {}
        self.snapshots: list[list[str]] = []
        self.live_rows: live.LiveTables | None = None
        self.live_files: dict[str, SimulatedWriter] = {}
        self.checked = 0
        self.entries: tuple[int, tuple[JournalEntry, ...]] = (0, ())
        self.told = 0

    # What may happen.

    def start_writer(self, commit_steps: Collection[int], early_stop_step: int | None = None) -> SimulatedWriter:
        """An attempt by a driver that takes the last one for dead, rightly or wrongly."""
        number, dead = len(self.lives) + 1, self._last_attempt()
        self.lives.append(
            SimulatedWriter(
                self.store,
                self.protocol,
                number,
                commit_steps=frozenset(commit_steps),
                early_stop_step=early_stop_step,
                known_dead_attempt=dead,
            )
        )
        return self.lives[-1]

    def advance(self, life: SimulatedWriter, requests: int = UNLIMITED) -> None:
        """Let an attempt do so many requests. Every state that a reader could meet counts."""
        for _ in range(requests):
            if life.is_finished:
                break
            asked = life.request if life.is_write else ""
            if "/live/" in asked and asked.startswith("replace"):
                assert self.live_files.setdefault(asked, life) is life, "two attempts write one file of live rows"
            life.resume()
            self._check_after(asked)

    def apply_late_request(self, index: int) -> None:
        """Let a late request take effect."""
        with suppress(FileExistsError):  # a create that came too late
            self.store.late.pop(index)()

    def damage_checkpoint(self, name: str, file: str, way: str) -> None:
        """Cut, alter or lose a file of a checkpoint."""
        content = self.store.files[file]
        if way == "lose":
            self.store.remove(file)
        else:
            self.store.put(file, content[:-1] if way == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        self.store.damaged.add(name)

    def corrupt_summary(self, number: int) -> None:
        """Have `run.json` name another entry as the newest, which is where a search begins."""
        self.store.put("/runs/run/run.json", json.dumps({"journal": number}).encode())

    def list_segments(self) -> None:
        """Remember what is listed now."""
        self.snapshots.append(self._listed("steps") + self._listed("evals"))

    def read_listed_segments(self, index: int) -> None:
        """Steps without a gap and once each, whatever happened since the listing."""
        names = self.snapshots.pop(index)
        steps = [step for name in names if "/steps/" in name for step in self._read_table(name)["step"]]
        assert steps == list(range(1, len(steps) + 1)), "a reader saw a gap, or a step twice"

    def kill_all(self) -> None:
        """Kill every process, its last request not sent."""
        for life in self.lives:
            life.kill(done=False, late=False)

    def live_writers(self) -> list[SimulatedWriter]:
        """Attempts that go on, zombies included."""
        return [life for life in self.lives if not life.is_finished]

    def finish_and_check(self) -> None:
        """Land what is late, end every process, run once more undisturbed: all must be as if nothing had happened."""
        self.kill_all()
        while self.store.late:
            self.apply_late_request(-1)
        self.advance(self.start_writer({4, 7}))
        self.check_invariants()
        state = self.fold_entries()
        end = state.ended_at
        assert end is not None
        assert [step for name in self._listed("steps") for step in self._read_table(name)["step"]] == list(
            range(1, end + 1)
        )
        run = open_simulated_run(self.store)  # as another process sees it
        assert probe_lease(run) == "finished"
        assert run.has_result()
        assert read_run_status(run).status == "finished"
        commit = self.end_commits()[-1]
        assert float(Checkpoint(run, commit.checkpoint).load_weights()["weight"]) == weight_at(end)
        spare = {name for entry in self.end_commits() for pair in entry.kept for name in pair if name is not None}
        there = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        assert there <= spare, "retention left what no entry keeps"
        assert not any("/live/" in path for path in self.store.files), "live rows of a run that is over"

    def check_invariants(self) -> None:
        if self.checked == self.store.changes:
            return
        self.check_journal_is_append_only()
        self.check_newest_entry_is_complete()
        self.check_log_steps()
        self.check_retained_checkpoints_exist()
        self.check_end_is_final()
        self.check_best_checkpoint()
        self.check_run_status()
        self.checked = self.store.changes

    def check_journal_is_append_only(self) -> None:
        numbers = sorted(int(path[-13:-5]) for path in self.store.files if "/journal/" in path)
        assert numbers == list(range(1, len(numbers) + 1)), "a gap in the journal"
        for number in numbers:
            data = self.store.files[f"/runs/run/journal/{number:08d}.json"]
            assert self.journal.setdefault(number, data) == data, "an entry changed"
        assert len(self.journal) == len(numbers), "an entry vanished"

    def check_newest_entry_is_complete(self) -> None:
        """Found by searching, and by what it carries: the same as reading every entry."""
        assert open_simulated_run(self.store).journal.read_state() == self.fold_entries(), (
            "the newest entry tells something else"
        )
        for entry in self.read_entries():
            if entry.number > self.told:
                whole = decisions.fold(self.read_entries()[: entry.number - 1])
                assert entry.before == whole, f"entry {entry.number} carries something else"
                self.told = entry.number

    def check_log_steps(self) -> None:
        state = self.fold_entries()
        names = self._listed("steps")
        steps: list[int] = []
        for index, name in enumerate(names):
            assert name.endswith(f"/{index:06d}.parquet"), "a gap between cells"
            table = self._read_table(name)
            steps += table["step"]
            assert [loss_at(step) for step in table["step"]] == table["loss"], "a row is not what training computed"
            segment_steps, whole = (
                table["step"],
                list(range(SEGMENT_LAYOUT.first_step(index), SEGMENT_LAYOUT.last_step(index) + 1)),
            )
            assert segment_steps == whole[: len(segment_steps)], "a cell holds the wrong steps"
            if segment_steps != whole:
                assert segment_steps[-1:] == [state.ended_at], "an incomplete cell before the end"
                assert index == len(names) - 1
            assert len(segment_steps) >= self.shown.get(name, 0), "a cell lost rows"
            self.shown[name] = len(segment_steps)
            other = name.replace("/steps/", "/evals/")
            assert other in self.store.files, "the steps of a cell show before its evaluations"
            evaluations = self._read_table(other)
            first = segment_steps[0] if index else 0
            expected = [step for step in range(first, (segment_steps[-1]) + 1) if step % EVALUATE_EVERY == 0]
            assert evaluations["step"] == expected, "an evaluation is missing, or stands twice"
            assert evaluations["loss"] == [evaluation_at(step) for step in expected]
        assert set(self.shown) <= set(names), "a listed file vanished"
        assert len(steps) <= state.highest_step, "a step shows that no commit covers"

    def check_live_rows_follow_segments(self) -> None:
        """Whoever reads the live rows, then the cells, misses none: now, and with those read one request ago."""
        before, self.live_rows = self.live_rows, live.read_live_tables(self.run, MetricSchema())
        held = sum(len(self._read_table(name)["step"]) for name in self._listed("steps"))
        for rows in (before, self.live_rows):
            if rows is None:
                continue
            steps = rows.steps.filter(pc.field("step") > held).to_pydict()
            assert steps["step"] == list(range(held + 1, held + 1 + len(steps["step"]))), "a gap before the live rows"
            assert steps["loss"] == [loss_at(step) for step in steps["step"]]
            evaluations = rows.evaluations.filter(pc.field("step") > (held or -1)).to_pydict()
            first = held + 1 if held else 0
            expected = [
                step for step in range(first, max([held, *evaluations["step"]]) + 1) if step % EVALUATE_EVERY == 0
            ]
            assert evaluations["step"] == (expected if evaluations["step"] else []), "a gap before live evaluations"
            assert evaluations["loss"] == [evaluation_at(step) for step in evaluations["step"]]

    def check_retained_checkpoints_exist(self) -> None:
        commits = [entry for entry in self.read_entries() if isinstance(entry, Commit)]
        for entry in [*commits[-1:], *self.end_commits()]:
            assert len(entry.kept) <= KEEP_CHECKPOINTS
            assert entry.kept[0][0] == entry.checkpoint
            for name in {name for pair in entry.kept for name in pair if name is not None} - self.store.damaged:
                try:
                    Checkpoint(self.run, name).verify()
                except DamagedError as error:
                    raise AssertionError(
                        f"entry {entry.number} keeps a checkpoint that is not whole: {error}"
                    ) from error

    def check_end_is_final(self) -> None:
        steps = [entry.step for entry in self.read_entries() if isinstance(entry, Commit)]
        for end in self.end_commits():
            assert max(steps) == end.step, "a commit beyond an end, or an end below a commit"

    def check_best_checkpoint(self) -> None:
        for entry in self.read_entries():
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
                    assert float(Checkpoint(self.run, name).load_weights()["weight"]) == weight_at(entry.best.step)

    def check_run_status(self) -> None:
        assert read_run_status(self.run).status in ("running", "stalled", "interrupted", "finished")

    def _check_after(self, request: str) -> None:
        """Every state that a reader could meet counts, not only those between two rules."""
        if "/journal/" in request:
            self.check_journal_is_append_only()
            self.check_newest_entry_is_complete()
            self.check_end_is_final()
            self.check_retained_checkpoints_exist()
        if "/metrics/" in request:
            self.check_log_steps()
        if "/metrics/steps/" in request or "/live/" in request:
            self.check_live_rows_follow_segments()
        if request.startswith("delete"):
            self.check_retained_checkpoints_exist()

    def read_entries(self) -> tuple[JournalEntry, ...]:
        """The journal as it is now, each entry read: the truth that no search and no summary stands between."""
        if self.entries[0] != self.store.changes:
            entries: list[JournalEntry] = []
            while (path := f"/runs/run/journal/{len(entries) + 1:08d}.json") in self.store.files:
                entries.append(parse_entry(from_json(self.store.files[path]), len(entries) + 1))
            self.entries = (self.store.changes, tuple(entries))
        return self.entries[1]

    def fold_entries(self) -> JournalState:
        """What all entries amount to, one by one."""
        return decisions.fold(self.read_entries())

    def end_commits(self) -> list[Commit]:
        """All commits that end the run."""
        return [entry for entry in self.read_entries() if isinstance(entry, Commit) and entry.end]

    def _last_attempt(self) -> int | None:
        claim = self.fold_entries().claim
        return claim.attempt if claim is not None else None

    def checkpoints(self) -> list[str]:
        """Sound ones that a commit names, for only these are promised."""
        named = {
            name for entry in self.read_entries() if isinstance(entry, Commit) for pair in entry.kept for name in pair
        }
        there = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        return sorted((there & named) - self.store.damaged)

    def _listed(self, folder: str) -> list[str]:
        return sorted(path for path in self.store.files if path.startswith(f"/runs/run/metrics/{folder}/"))

    def _read_table(self, name: str) -> dict[str, list[Any]]:
        data = self.store.files[name]
        if data not in self.tables:
            self.tables[data] = pq.read_table(io.BytesIO(data), use_threads=False).to_pydict()
        return self.tables[data]
