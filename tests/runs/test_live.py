"""Live rows: they exist before any segment, are removed at the end, and their failures do not affect the run."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from pipeline.errors import StorageError
from pipeline.runs.metric_log import live
from pipeline.runs.metric_log.segments import MetricSchema, PendingRows, SegmentLayout
from pipeline.runs.run import Run
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.process_kill.run_assertions import wait_for
from tests.runs.factories import (
    SEGMENT_STEPS,
    create_run,
    make_block,
    make_evaluation,
    make_snapshot,
    start_attempt,
    stop_attempt,
)

SEGMENT_LAYOUT = SegmentLayout(SEGMENT_STEPS, SEGMENT_STEPS)


@pytest.fixture(autouse=True)
def _frequent_live_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(str(tmp_path))


def read_live_steps(run: Run) -> tuple[int, list[int], list[int]]:
    """Return the attempt of the live rows, and the steps of both tables."""
    rows = live.read_live_tables(run, MetricSchema())
    return (rows.attempt, rows.steps["step"].to_pylist(), rows.evaluations["step"].to_pylist()) if rows else (0, [], [])


def test_live_rows_precede_the_first_commit_and_are_dropped_with_segments(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_evaluation(make_evaluation(0))
    writer.log_steps(make_block(1, 60))
    wait_for(lambda: read_live_steps(run) == (1, list(range(1, 61)), [0]), 60, "live rows")
    assert run.storage.list("metrics") == []
    writer.log_steps(make_block(61, 130))
    writer.log_evaluation(make_evaluation(130))
    writer.commit(make_snapshot(130))
    wait_for(lambda: read_live_steps(run) == (1, list(range(101, 131)), [130]), 60, "fewer live rows")
    tables = [ds.dataset(Path(run.url) / folder).to_table() for folder in ("live/steps", "metrics/steps")]
    assert tables[0].schema == tables[1].schema
    writer.log_steps(make_block(131, 150))
    writer.commit(make_snapshot(150, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert ds.dataset(Path(run.url) / "metrics/steps").to_table()["step"].to_pylist() == list(range(1, 151))
    assert not (Path(run.url) / "live").exists()


def test_next_attempt_restores_rows_up_to_its_checkpoint(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 130))
    writer.commit(make_snapshot(130))
    writer.log_steps(make_block(131, 180))
    wait_for(lambda: read_live_steps(run)[1] == list(range(101, 181)), 60, "live rows")
    stop_attempt(attempt, writer)  # as after SIGKILL: no entry in the journal
    attempt, writer = start_attempt(run)
    wait_for(lambda: read_live_steps(run) == (2, list(range(101, 131)), []), 60, "the rows of the checkpoint")
    writer.log_steps(make_block(131, 140))
    wait_for(lambda: read_live_steps(run) == (2, list(range(101, 141)), []), 60, "new rows")
    wait_for(lambda: run.storage.list("live/steps") == ["0002.parquet"], 60, "removal of the first attempt's rows")
    stop_attempt(attempt, writer)


def test_late_write_of_an_earlier_attempt_changes_nothing(run: Run) -> None:
    rows = PendingRows("run", 2, SEGMENT_LAYOUT, MetricSchema())
    rows.add([make_block(1, 10)], [])
    older, newer = (
        live.LiveWriter(run, 1, SEGMENT_LAYOUT, MetricSchema()),
        live.LiveWriter(run, 2, SEGMENT_LAYOUT, MetricSchema()),
    )
    newer.resume(rows)
    newer.write()
    older.log_steps(make_block(1, 99))
    older.write()
    assert read_live_steps(run) == (2, list(range(1, 11)), []), "a writer writes nothing before `resume`"
    older.resume(PendingRows("run", 1, SEGMENT_LAYOUT, MetricSchema()))
    older.log_steps(make_block(1, 99))
    older.write()
    assert read_live_steps(run) == (2, list(range(1, 11)), [])


def test_last_rows_before_a_failure_are_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "3600")
    attempt, writer = start_attempt(run)
    block = make_block(1, 20)
    block["loss"][19] = math.nan
    writer.log_steps(block)
    writer.write_exit("failed", RuntimeError("x"), 20)
    stop_attempt(attempt, writer)
    rows = live.read_live_tables(run, MetricSchema())
    assert rows is not None
    assert math.isnan(rows.steps["loss"][19].as_py())
    attempt, writer = start_attempt(run)
    writer.write_exit("failed", RuntimeError("written for the previous attempt"), 20)
    stop_attempt(attempt, writer)
    assert read_live_steps(run)[:2] == (1, list(range(1, 21)))


class LiveWriteFailingBackend(LocalBackend):
    """Local storage that refuses live rows."""

    def __init__(self) -> None:
        self.refused = 0

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        if "/live/" in path:
            self.refused += 1
            raise StorageError("refused", where=path)
        super().replace(path, data, temporary, sync)


def test_failed_live_write_does_not_affect_the_run(run: Run, tmp_path: Path) -> None:
    backend = LiveWriteFailingBackend()
    attempt, writer = start_attempt(Run(Storage(backend, str(tmp_path), str(tmp_path)), "run"))
    writer.log_steps(make_block(1, 50))
    wait_for(lambda: backend.refused > 0, 60, "a write")
    writer.raise_if_failed()
    writer.commit(make_snapshot(50, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert run.has_result()


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_unreadable_live_files_are_ignored(run: Run, content: bytes | None) -> None:
    writer = live.LiveWriter(run, 1, SEGMENT_LAYOUT, MetricSchema())
    writer.resume(PendingRows("run", 1, SEGMENT_LAYOUT, MetricSchema()))
    writer.write()
    assert live.read_live_tables(run, MetricSchema()) is not None
    path = Path(run.url) / "live/evals/0001.parquet"
    path.unlink() if content is None else path.write_bytes(content)
    assert live.read_live_tables(run, MetricSchema()) is None


def test_many_rows_are_downsampled_consistently(run: Run) -> None:
    writer = live.LiveWriter(run, 1, SegmentLayout(10**6, 10**6), MetricSchema())
    writer.resume(PendingRows("run", 1, SEGMENT_LAYOUT, MetricSchema()))
    written: list[set[int]] = []
    for last in (400, 20_000, 90_000):
        writer.log_steps(make_block(max(written[-1], default=0) + 1 if written else 1, last))
        for step in range(last - 300, last + 1):
            writer.log_evaluation(make_evaluation(step))
        writer.write()
        _, steps, evaluations = read_live_steps(run)
        assert steps[-1] == evaluations[-1] == last
        assert len(evaluations) <= live.MAX_LIVE_ROWS
        assert live.MAX_LIVE_ROWS / 3 < len(steps) <= live.MAX_LIVE_ROWS + 1
        assert len({after - before for before, after in pairwise(steps[:-1])}) == 1, "equally spaced"
        written.append(set(steps))
    assert all(
        after - {max(after)} <= before | set(range(max(before) + 1, 10**6)) for before, after in pairwise(written)
    )
