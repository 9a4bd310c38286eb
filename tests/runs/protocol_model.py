"""A model of concurrent writers on one store, with the invariants that must hold under all faults."""

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
"""More requests than any attempt does."""


class ProtocolModel:
    """Concurrent writers on one store, and the faults that may happen to them.

    Several writers run the real code, each in a thread that stops before every request to storage. The test decides
    the outcome of each request: done, refused, done without a reply, or delayed and done much later. Writers are
    killed, or continue as zombies after the next one has claimed the run; checkpoints are damaged; readers list first
    and read later. After every operation the invariants must hold.

    Parameters
    ----------
    protocol: the behavior of the writers.
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
        self.writers: list[SimulatedWriter] = []
        self.known_entries: dict[int, bytes] = {}
        self.known_lengths: dict[str, int] = {}
        self.tables: dict[bytes, dict[str, list[Any]]] = {}
        self.snapshots: list[list[str]] = []
        self.live_rows: live.LiveTables | None = None
        self.live_files: dict[str, SimulatedWriter] = {}
        self.checked = 0
        self.entries: tuple[int, tuple[JournalEntry, ...]] = (0, ())
        self.num_checked_entries = 0

    # Operations.

    def start_writer(self, commit_steps: Collection[int], early_stop_step: int | None = None) -> SimulatedWriter:
        """Start an attempt of a driver that presumes the last one dead, rightly or wrongly."""
        number, last_attempt = len(self.writers) + 1, self._last_attempt()
        self.writers.append(
            SimulatedWriter(
                self.store,
                self.protocol,
                number,
                commit_steps=frozenset(commit_steps),
                early_stop_step=early_stop_step,
                known_dead_attempt=last_attempt,
            )
        )
        return self.writers[-1]

    def advance(self, writer: SimulatedWriter, requests: int = UNLIMITED) -> None:
        """Let an attempt do `requests` requests, and check every state that a reader could observe."""
        for _ in range(requests):
            if writer.is_finished:
                break
            request = writer.request if writer.is_write else ""
            if "/live/" in request and request.startswith("replace"):
                assert self.live_files.setdefault(request, writer) is writer, "two attempts write one file of live rows"
            writer.resume()
            self._check_after(request)

    def apply_late_request(self, index: int) -> None:
        """Apply a delayed request."""
        with suppress(FileExistsError):  # a create that arrived too late
            self.store.late.pop(index)()

    def damage_checkpoint(self, name: str, file: str, damage: str) -> None:
        """Truncate, alter or remove a file of a checkpoint."""
        content = self.store.files[file]
        if damage == "missing":
            self.store.remove(file)
        else:
            self.store.put(file, content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
        self.store.damaged.add(name)

    def corrupt_summary(self, number: int) -> None:
        """Let `run.json` contain a wrong number of the newest entry, from which a search starts."""
        self.store.put("/runs/run/run.json", json.dumps({"journal": number}).encode())

    def list_segments(self) -> None:
        """Store a listing of the segments for a later read."""
        self.snapshots.append(self._listed("steps") + self._listed("evals"))

    def read_listed_segments(self, index: int) -> None:
        """Check that the segments of an earlier listing contain all steps once, without a gap."""
        names = self.snapshots.pop(index)
        steps = [step for name in names if "/steps/" in name for step in self._read_table(name)["step"]]
        assert steps == list(range(1, len(steps) + 1)), "a reader gets a gap, or a step twice"

    def kill_all(self) -> None:
        """Kill every process before it sends its last request."""
        for writer in self.writers:
            writer.kill(done=False, late=False)

    def live_writers(self) -> list[SimulatedWriter]:
        """Return the running attempts, including zombies."""
        return [writer for writer in self.writers if not writer.is_finished]

    def finish_and_check(self) -> None:
        """Kill all, apply delayed requests, run an undisturbed attempt: the result must be that without faults."""
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
        run = open_simulated_run(self.store)  # as another process would open it
        assert probe_lease(run) == "finished"
        assert run.has_result()
        assert read_run_status(run).status == "finished"
        commit = self.end_commits()[-1]
        assert float(Checkpoint(run, commit.checkpoint).load_weights()["weight"]) == weight_at(end)
        protected = {name for entry in self.end_commits() for pair in entry.kept for name in pair if name is not None}
        names = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        assert names <= protected, "a checkpoint remains that no entry retains"
        assert not any("/live/" in path for path in self.store.files), "live rows of a finished run"

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
            assert self.known_entries.setdefault(number, data) == data, "an entry changed"
        assert len(self.known_entries) == len(numbers), "an entry vanished"

    def check_newest_entry_is_complete(self) -> None:
        """The state carried by the newest entry, found by search, equals that of reading every entry."""
        assert open_simulated_run(self.store).journal.read_state() == self.fold_entries(), (
            "the newest entry carries another state"
        )
        for entry in self.read_entries():
            if entry.number > self.num_checked_entries:
                expected = decisions.fold(self.read_entries()[: entry.number - 1])
                assert entry.before == expected, f"entry {entry.number} carries another state"
                self.num_checked_entries = entry.number

    def check_log_steps(self) -> None:
        state = self.fold_entries()
        names = self._listed("steps")
        steps: list[int] = []
        for index, name in enumerate(names):
            assert name.endswith(f"/{index:06d}.parquet"), "a gap between segments"
            table = self._read_table(name)
            steps += table["step"]
            assert [loss_at(step) for step in table["step"]] == table["loss"], "a row is not what training computed"
            segment_steps = table["step"]
            all_steps = list(range(SEGMENT_LAYOUT.first_step(index), SEGMENT_LAYOUT.last_step(index) + 1))
            assert segment_steps == all_steps[: len(segment_steps)], "a segment contains the wrong steps"
            if segment_steps != all_steps:
                assert segment_steps[-1:] == [state.ended_at], "an incomplete segment before the end"
                assert index == len(names) - 1
            assert len(segment_steps) >= self.known_lengths.get(name, 0), "a segment lost rows"
            self.known_lengths[name] = len(segment_steps)
            evaluations_name = name.replace("/steps/", "/evals/")
            assert evaluations_name in self.store.files, "the steps of a segment are visible before its evaluations"
            evaluations = self._read_table(evaluations_name)
            first = segment_steps[0] if index else 0
            expected = [step for step in range(first, (segment_steps[-1]) + 1) if step % EVALUATE_EVERY == 0]
            assert evaluations["step"] == expected, "an evaluation is missing, or is there twice"
            assert evaluations["loss"] == [evaluation_at(step) for step in expected]
        assert set(self.known_lengths) <= set(names), "a listed file vanished"
        assert len(steps) <= state.highest_step, "a step is visible that no commit covers"

    def check_live_rows_follow_segments(self) -> None:
        """A reader of first the live rows, also of one request ago, and then the segments misses no row."""
        before, self.live_rows = self.live_rows, live.read_live_tables(self.run, MetricSchema())
        published = sum(len(self._read_table(name)["step"]) for name in self._listed("steps"))
        for rows in (before, self.live_rows):
            if rows is None:
                continue
            steps = rows.steps.filter(pc.field("step") > published).to_pydict()
            assert steps["step"] == list(range(published + 1, published + 1 + len(steps["step"]))), (
                "a gap before the live rows"
            )
            assert steps["loss"] == [loss_at(step) for step in steps["step"]]
            evaluations = rows.evaluations.filter(pc.field("step") > (published or -1)).to_pydict()
            first = published + 1 if published else 0
            expected = [
                step for step in range(first, max([published, *evaluations["step"]]) + 1) if step % EVALUATE_EVERY == 0
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
                        f"entry {entry.number} retains a checkpoint that is not complete: {error}"
                    ) from error

    def check_end_is_final(self) -> None:
        steps = [entry.step for entry in self.read_entries() if isinstance(entry, Commit)]
        for end in self.end_commits():
            assert max(steps) == end.step, "a commit beyond the end, or an end below a commit"

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
        """Check every state that a reader could observe, not only those between two operations."""
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
        """Read every entry of the current journal, without a search or a hint."""
        if self.entries[0] != self.store.changes:
            entries: list[JournalEntry] = []
            while (path := f"/runs/run/journal/{len(entries) + 1:08d}.json") in self.store.files:
                entries.append(parse_entry(from_json(self.store.files[path]), len(entries) + 1))
            self.entries = (self.store.changes, tuple(entries))
        return self.entries[1]

    def fold_entries(self) -> JournalState:
        """Return the state after all entries, applied one by one."""
        return decisions.fold(self.read_entries())

    def end_commits(self) -> list[Commit]:
        """Return the final commits."""
        return [entry for entry in self.read_entries() if isinstance(entry, Commit) and entry.end]

    def _last_attempt(self) -> int | None:
        claim = self.fold_entries().claim
        return claim.attempt if claim is not None else None

    def checkpoints(self) -> list[str]:
        """Return the undamaged checkpoints that are named by a commit."""
        committed = {
            name for entry in self.read_entries() if isinstance(entry, Commit) for pair in entry.kept for name in pair
        }
        names = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        return sorted((names & committed) - self.store.damaged)

    def _listed(self, folder: str) -> list[str]:
        return sorted(path for path in self.store.files if path.startswith(f"/runs/run/metrics/{folder}/"))

    def _read_table(self, name: str) -> dict[str, list[Any]]:
        data = self.store.files[name]
        if data not in self.tables:
            self.tables[data] = pq.read_table(io.BytesIO(data), use_threads=False).to_pydict()
        return self.tables[data]
