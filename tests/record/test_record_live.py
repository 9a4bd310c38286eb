"""Live rows: there before any cell, thrown away after the end, and nothing that happens to them matters to the run."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from pipeline.errors import StorageError
from pipeline.record import live
from pipeline.record.attempt import Attempt, claim
from pipeline.record.cells import CellLayout, Columns, Rows
from pipeline.record.recorder import Recorder
from pipeline.record.run import Run
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.faults.fault_evidence import wait_for
from tests.record.record_parts import block, born, evaluation, snapshot

CELLS = CellLayout(100, 100)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return born(str(tmp_path))


def begin(run: Run) -> tuple[Attempt, Recorder]:
    attempt = claim(run, driver="d", facts={})
    return attempt, Recorder(attempt, keep=2)


def stop(attempt: Attempt, recorder: Recorder) -> None:
    recorder.close()
    attempt.close()


def shown(run: Run) -> tuple[int, list[int], list[int]]:
    """Attempt, and steps of both tables."""
    rows = live.read(run, Columns())
    return (rows.attempt, rows.steps["step"].to_pylist(), rows.evaluations["step"].to_pylist()) if rows else (0, [], [])


def test_rows_are_there_before_the_first_commit_and_leave_as_cells_take_them(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.evaluation(evaluation(0))
    recorder.steps(block(1, 60))
    wait_for(lambda: shown(run) == (1, list(range(1, 61)), [0]), 60, "live rows")
    assert run.storage.list("metrics") == []
    recorder.steps(block(61, 130))
    recorder.evaluation(evaluation(130))
    recorder.commit(snapshot(130))
    wait_for(lambda: shown(run) == (1, list(range(101, 131)), [130]), 60, "fewer live rows")
    tables = [ds.dataset(Path(run.url) / folder).to_table() for folder in ("live/steps", "metrics/steps")]
    assert tables[0].schema == tables[1].schema
    recorder.steps(block(131, 150))
    recorder.commit(snapshot(150, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert ds.dataset(Path(run.url) / "metrics/steps").to_table()["step"].to_pylist() == list(range(1, 151))
    assert not (Path(run.url) / "live").exists()


def test_the_next_attempt_shows_what_it_goes_on_from_and_takes_the_rest_back(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 130))
    recorder.commit(snapshot(130))
    recorder.steps(block(131, 180))
    wait_for(lambda: shown(run)[1] == list(range(101, 181)), 60, "live rows")
    stop(attempt, recorder)  # as after SIGKILL: no word in the journal
    attempt, recorder = begin(run)
    wait_for(lambda: shown(run) == (2, list(range(101, 131)), []), 60, "those of the base")
    recorder.steps(block(131, 140))
    wait_for(lambda: shown(run) == (2, list(range(101, 141)), []), 60, "new ones")
    wait_for(lambda: run.storage.list("live/steps") == ["0002.parquet"], 60, "the first attempt's to go")
    stop(attempt, recorder)


def test_a_late_write_of_an_earlier_attempt_changes_nothing(run: Run) -> None:
    rows = Rows("run", 2, CELLS, Columns())
    rows.add([block(1, 10)], [])
    older, newer = live.LiveWriter(run, 1, CELLS, Columns()), live.LiveWriter(run, 2, CELLS, Columns())
    newer.begin(rows)
    newer.write()
    older.steps(block(1, 99))
    older.write()
    assert shown(run) == (2, list(range(1, 11)), []), "one that has not begun writes nothing"
    older.begin(Rows("run", 1, CELLS, Columns()))
    older.steps(block(1, 99))
    older.write()
    assert shown(run) == (2, list(range(1, 11)), [])


def test_the_last_rows_tell_how_it_came_to_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "3600")
    attempt, recorder = begin(run)
    bad = block(1, 20)
    bad["loss"][19] = math.nan
    recorder.steps(bad)
    recorder.leave("failed", RuntimeError("x"), 20)
    stop(attempt, recorder)
    rows = live.read(run, Columns())
    assert rows is not None
    assert math.isnan(rows.steps["loss"][19].as_py())
    attempt, recorder = begin(run)
    recorder.leave("failed", RuntimeError("said for the dead, who knew more"), 20)
    stop(attempt, recorder)
    assert shown(run)[:2] == (1, list(range(1, 21)))


class NoLiveRows(LocalBackend):
    """Files, but no room for live rows."""

    def __init__(self) -> None:
        self.refused = 0

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        if "/live/" in path:
            self.refused += 1
            raise StorageError("refused", where=path)
        super().replace(path, data, temporary, sync)


def test_a_write_that_fails_is_nothing_to_the_run(run: Run, tmp_path: Path) -> None:
    backend = NoLiveRows()
    attempt, recorder = begin(Run(Storage(backend, str(tmp_path), str(tmp_path)), "run"))
    recorder.steps(block(1, 50))
    wait_for(lambda: backend.refused > 0, 60, "a write")
    recorder.check()
    recorder.commit(snapshot(50, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert run.has_result()


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_what_cannot_be_read_is_passed_over(run: Run, content: bytes | None) -> None:
    writer = live.LiveWriter(run, 1, CELLS, Columns())
    writer.begin(Rows("run", 1, CELLS, Columns()))
    writer.write()
    assert live.read(run, Columns()) is not None
    path = Path(run.url) / "live/evals/0001.parquet"
    path.unlink() if content is None else path.write_bytes(content)
    assert live.read(run, Columns()) is None


def test_many_rows_are_thinned_and_what_is_left_out_stays_out(run: Run) -> None:
    writer = live.LiveWriter(run, 1, CellLayout(10**6, 10**6), Columns())
    writer.begin(Rows("run", 1, CELLS, Columns()))
    seen: list[set[int]] = []
    for last in (400, 20_000, 90_000):
        writer.steps(block(max(seen[-1], default=0) + 1 if seen else 1, last))
        for step in range(last - 300, last + 1):
            writer.evaluation(evaluation(step))
        writer.write()
        _, steps, evaluations = shown(run)
        assert steps[-1] == evaluations[-1] == last
        assert len(evaluations) <= live.MOST_ROWS
        assert live.MOST_ROWS / 3 < len(steps) <= live.MOST_ROWS + 1
        assert len({after - before for before, after in pairwise(steps[:-1])}) == 1, "at even distances"
        seen.append(set(steps))
    assert all(after - {max(after)} <= before | set(range(max(before) + 1, 10**6)) for before, after in pairwise(seen))
