"""The journal: each number is taken once, in order, also by concurrent processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pipeline.errors import StorageError
from pipeline.runs.journal import decisions
from pipeline.runs.journal.decisions import format_checkpoint_name
from pipeline.runs.journal.entries import BestCheckpoint, Claim, Commit, Exit, JournalEntry, parse_entry
from pipeline.runs.journal.journal import Journal
from pipeline.runs.lease.attempt import append_claim
from pipeline.runs.run import Run
from pipeline.runs.serialization import from_json, to_json, verify_digest, with_digest
from pipeline.storage import Storage
from tests.runs.factories import create_run, read_entries
from tests.runs.simulated_writers import ControlledBackend, InMemoryStore

WRITER_SCRIPT = """
import sys
from pipeline.runs.journal.entries import Exit
from pipeline.runs.journal.journal import Journal
from pipeline.storage import Storage
storage, nonce, count = Storage.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
journal, created = Journal(storage), []
print("ready", flush=True)
sys.stdin.readline()
while (number := journal.read_state().number + 1) <= count:
    if journal.append(Exit(number=number, nonce=nonce, time="2026-11-21T08:00Z", attempt=1, status="failed", step=0)):
        created.append(number)
print(*created)
"""


def make_claim(number: int, nonce: str = "a") -> Claim:
    time = "2026-11-21T08:00:00+00:00"
    return Claim(number=number, nonce=nonce, time=time, attempt=1, driver="d", facts={"host": "h", "pid": 1})


def test_entries_are_read_up_to_the_first_gap(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    journal = Journal(storage)
    assert read_entries(journal) == ()
    assert journal.append(make_claim(1))
    assert journal.append(make_claim(2))
    assert read_entries(Journal(storage)) == read_entries(journal) == (make_claim(1), make_claim(2))
    (tmp_path / "journal" / "note.txt").write_text("")
    assert read_entries(Journal(storage)) == (make_claim(1), make_claim(2))
    assert journal.append(make_claim(3))
    assert len(read_entries(journal)) == 3


@pytest.mark.parametrize("deleted", [1, 2])
def test_deleted_entry_is_detected(tmp_path: Path, deleted: int) -> None:
    journal = Journal(Storage.open(str(tmp_path)))
    for number in (1, 2, 3):
        journal.append(make_claim(number))
    (tmp_path / "journal" / f"{deleted:08d}.json").unlink()
    with pytest.raises(StorageError, match="is missing, but") as caught:
        read_entries(Journal(Storage.open(str(tmp_path))))
    assert caught.value.where.endswith(f"{deleted:08d}.json")


class CountingBackend(ControlledBackend):
    """A store in memory that records its requests."""

    def __init__(self, store: InMemoryStore) -> None:
        super().__init__(store)
        self.requests: list[str] = []

    def _request(self, effect: Callable[[], Any], *, writes: bool, what: str) -> Any:
        self.requests.append(what)
        return super()._request(effect, writes=writes, what=what)


def make_numbered_journal(count: int) -> tuple[Storage, CountingBackend]:
    """Create a journal with `count` entries, of which only the last is readable."""
    store, state = InMemoryStore(), replace(decisions.fold([make_claim(1)]), number=count - 1)
    for number in range(1, count + 1):
        last = make_claim(number) if count == 1 else replace(make_claim(number), before=state)
        store.put(f"/runs/run/journal/{number:08d}.json", last.to_json().encode() if number == count else b"")
    backend = CountingBackend(store)
    return Storage(backend, "/runs/run", "test://runs/run"), backend


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 1000, 20_000])
def test_newest_entry_is_found_in_few_requests_for_any_hint(count: int) -> None:
    storage, backend = make_numbered_journal(count)
    for hint in {0, 1, count // 2, count - 1, count, count + 1, 2 * count, 10 * count + 7}:
        backend.requests.clear()
        assert Journal(storage, lambda hint=hint: hint).read_state().number == count  # type: ignore[misc]
        assert len(backend.requests) <= 2 * math.log2(max(count, hint) + 1) + 4, hint
        if hint == count:
            assert len(backend.requests) == 2


def test_search_starts_from_the_last_known_entry() -> None:
    storage, backend = make_numbered_journal(1000)
    journal = Journal(storage)
    state = journal.read_state()
    backend.requests.clear()
    assert journal.read_state() == state
    assert backend.requests == ["read /runs/run/journal/00001001.json"]
    assert Journal(storage).append(replace(make_claim(1001, "b"), before=state))
    assert journal.read_state().number == 1001


def test_summary_without_a_number_gives_no_hint(tmp_path: Path) -> None:
    run = create_run(str(tmp_path))
    for number in (1, 2, 3):
        run.journal.append(replace(make_claim(number), before=run.journal.read_state()))
    for hint in ("1", True, None, -1, 2.0, 10**30, [3]):
        run.storage.replace("run.json", json.dumps({"journal": hint}).encode())
        assert Run(Storage.open(str(tmp_path)), "run").journal.read_state().number == 3
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "run.json").symlink_to(tmp_path / "elsewhere")
    assert Run(Storage.open(str(tmp_path)), "run").journal.read_state().number == 3


def test_entries_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They carry no state; entries added to them do."""
    storage = Storage.open(str(tmp_path))
    first = Journal(storage)
    for entry in (make_claim(1), make_commit(2, 10), make_commit(3, 20)):
        assert first.append(entry)
    state = Journal(storage).read_state()
    assert state == first.read_state() == decisions.fold([make_claim(1), make_commit(2, 10), make_commit(3, 20)])
    second = Journal(storage)
    assert second.read_state() == state
    assert first.append(replace(make_claim(4), attempt=2, before=state))
    assert first.append(make_commit(5, 30)), "as an earlier version would continue it"
    assert second.read_state() == decisions.fold(read_entries(second))
    assert second.read_state().highest_step == 30


def test_journal_with_a_deleted_entry_is_rejected_before_resuming(tmp_path: Path) -> None:
    run = create_run(str(tmp_path))
    for number in range(1, 6):
        run.journal.append(replace(make_claim(number), before=run.journal.read_state()))
    (tmp_path / "run" / "journal" / "00000003.json").unlink()
    with pytest.raises(StorageError, match="is missing, but"):
        append_claim(Run(Storage.open(str(tmp_path)), "run"), make_claim(0), known_dead_attempt=1)
    assert not (tmp_path / "run" / "journal" / "00000003.json").exists()


def test_entry_number_is_taken_once(tmp_path: Path) -> None:
    first, second = Journal(Storage.open(str(tmp_path))), Journal(Storage.open(str(tmp_path)))
    assert first.append(make_claim(1, "a"))
    assert not second.append(make_claim(1, "b"))
    assert second.append(make_claim(1, "a")), "a repeated request succeeds"
    assert read_entries(second) == (make_claim(1, "a"),)


def test_concurrent_writers_leave_a_gapless_journal(tmp_path: Path) -> None:
    count = 300
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER_SCRIPT, str(tmp_path), writer_name, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for writer_name in ("a", "b")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    created = [[int(word) for word in process.communicate(timeout=60)[0].split()] for process in processes]
    entries = read_entries(Journal(Storage.open(str(tmp_path))))
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    assert sorted(created[0] + created[1]) == [entry.number for entry in entries]
    for writer_name, numbers in zip("ab", created, strict=True):
        assert {entry.number for entry in entries if entry.nonce == writer_name} == set(numbers)


def test_journal_on_s3(s3_url: str) -> None:
    storage = Storage.open(s3_url)
    journal = Journal(storage)
    for number in range(1, 25):
        assert journal.append(make_claim(number))
    assert [entry.number for entry in read_entries(Journal(storage))] == list(range(1, 25))
    assert not Journal(storage).append(make_claim(24, "b"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "claim"}', '{"kind": "party", "number": 1}', '{"number": 2}']
)
def test_invalid_entry_is_reported(tmp_path: Path, text: str) -> None:
    run = create_run(str(tmp_path))
    run.storage.replace("journal/00000001.json", text.encode())
    with pytest.raises(StorageError, match="not a journal entry") as caught:
        read_entries(run.journal)
    assert caught.value.where.endswith("journal/00000001.json")


def test_driver_finds_its_attempt(tmp_path: Path) -> None:
    journal = Journal(Storage.open(str(tmp_path)))
    assert journal.find_latest_attempt("d") is None
    journal.append(make_claim(1))
    assert journal.find_latest_attempt("d") == 1
    assert journal.find_latest_attempt("other") is None
    assert journal.read_highest_step() == 0


def make_commit(number: int, step: int) -> Commit:
    name = format_checkpoint_name(step, 1)
    common = {"number": number, "nonce": "a", "time": "2026-11-21T08:00:00+00:00", "attempt": 1}
    return Commit(**common, checkpoint=name, step=step, epoch=1, end=False, kept=((name, None),))  # type: ignore[arg-type]


short_texts = st.text(max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | short_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(short_texts, inner, max_size=3),
    max_leaves=6,
)
metadata_objects = st.dictionaries(short_texts, json_values, max_size=3)
times = st.datetimes(timezones=st.just(UTC)).map(lambda at: at.isoformat(timespec="microseconds"))
common = {"number": st.integers(1, 99), "nonce": short_texts, "time": times, "attempt": st.integers(1, 99)}
finite = st.floats(allow_nan=False, allow_infinity=False)
checkpoint_names = st.builds(format_checkpoint_name, st.integers(0, 10**10), st.integers(1, 10**5))
bests = st.none() | st.builds(
    BestCheckpoint, metric=short_texts, step=st.integers(0), value=finite, checkpoint=checkpoint_names
)
errors = st.fixed_dictionaries({"type": short_texts, "message": short_texts})
entries_of_any_kind = (
    st.builds(
        Claim,
        **common,
        driver=short_texts,
        boot=short_texts,
        lock=short_texts,
        interval_s=st.floats(0.1, 86400),
        facts=metadata_objects,
    )
    | st.builds(
        Commit,
        **common,
        checkpoint=checkpoint_names,
        step=st.integers(0),
        epoch=st.integers(0),
        end=st.booleans(),
        kept=st.lists(st.tuples(checkpoint_names, st.none() | checkpoint_names), max_size=3).map(tuple),
        best=bests,
        metrics=st.dictionaries(short_texts, finite, max_size=2),
        patience=st.none() | st.integers(0),
    )
    | st.builds(
        Exit,
        **common,
        status=st.sampled_from(["interrupted", "failed"]),
        step=st.integers(0),
        error=st.none() | errors,
        row=st.none() | metadata_objects,
    )
)


@settings(deadline=None)
@given(st.lists(entries_of_any_kind, max_size=5), entries_of_any_kind)
def test_entries_round_trip(others: list[JournalEntry], entry: JournalEntry) -> None:
    assert parse_entry(from_json(entry.to_json()), entry.number) == entry
    first = Claim(number=1, nonce="a", time=entry.time, attempt=1, facts={"host": "h"})
    before = decisions.fold([first, *(replace(other, number=number) for number, other in enumerate(others, 2))])
    with_state = replace(entry, number=before.number + 1, before=before)
    assert parse_entry(from_json(with_state.to_json()), with_state.number) == with_state


INVALID_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another number": lambda tree: tree.update(number=7),
    "no claim": lambda tree: tree.update(claim=None),
    "another claim": lambda tree: tree["attempts"][-1].update(claim=2),
    "a future claim": lambda tree: (tree["attempts"][-1].update(claim=9), tree["claim"].update(number=9)),
    "no attempts": lambda tree: tree.update(attempts=[]),
    "attempts of text": lambda tree: tree.update(attempts=["1"]),
    "a negative step": lambda tree: tree.update(highest_step=-1),
    "an invalid time": lambda tree: tree.update(started="yesterday"),
    "a path": lambda tree: tree.update(kept_by_ends=["../../x"]),
    "a path in a commit": lambda tree: tree["commit"].update(kept=[["/etc", None]]),
    "no commit": lambda tree: tree.pop("commit"),
    "a commit of text": lambda tree: tree.update(commit="x"),
    "a heartbeat interval": lambda tree: tree["claim"].update(interval_s=1e300),
    "text": lambda tree: tree.update(highest_step="1"),
}


@pytest.mark.parametrize("kind", INVALID_STATES)
def test_embedded_state_is_validated(tmp_path: Path, kind: str) -> None:
    run = create_run(str(tmp_path))
    for entry in (make_claim(1), make_commit(2, 10), make_commit(3, 20)):
        run.journal.append(replace(entry, before=run.journal.read_state()))
    path = tmp_path / "run" / "journal" / "00000003.json"
    tree = verify_digest(from_json(path.read_text()))
    INVALID_STATES[kind](tree["before"])
    path.write_text(to_json(with_digest(tree)))
    with pytest.raises(StorageError, match="not a journal entry") as caught:
        Run(Storage.open(str(tmp_path)), "run").journal.read_state()
    assert caught.value.where.endswith("00000003.json")


def test_altered_entry_is_detected() -> None:
    tree = from_json(make_claim(1).to_json())
    with pytest.raises(ValueError, match="altered"):
        parse_entry({**tree, "driver": "e"}, 1)


def test_unknown_fields_of_later_versions_are_ignored() -> None:
    tree = with_digest({**verify_digest(from_json(make_claim(1).to_json())), "mood": "good"})
    assert parse_entry(tree, 1) == make_claim(1)


def test_nonfinite_values_round_trip() -> None:
    import numpy as np

    assert to_json({"a": float("nan"), "b": [np.float64(1.5), np.int64(2), float("-inf")]}) == (
        '{"a": "nan", "b": [1.5, 2, "-inf"]}'
    )
    with pytest.raises(TypeError, match="cannot be stored as JSON"):
        to_json({"a": object()})
