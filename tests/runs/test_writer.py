"""The synchronous writer: what follows from a commit, and resuming from intact and damaged checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from pipeline.errors import NotFiniteError, StorageError, SupersededError
from pipeline.runs.async_writer import finish_ended_run
from pipeline.runs.checkpoints.checkpoint import DamagedError, find_checkpoint
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.metric_log.segments import MetricSchema, SegmentLayout
from pipeline.runs.run import Run
from pipeline.runs.status import read_run_status
from pipeline.runs.writer import RunWriter
from pipeline.storage import Storage
from tests.runs.factories import create_run, make_block, make_evaluation, make_snapshot

SEGMENT_LAYOUT = SegmentLayout(4, 4)


def acquire_attempt(run: Run) -> Attempt:
    return acquire_lease(run, driver="driver", metadata={"host": "here", "pid": 1})


def make_writer(attempt: Attempt, keep: int = 2) -> RunWriter:
    writer = RunWriter(attempt, layout=SEGMENT_LAYOUT, keep=keep, metric_schema=MetricSchema())
    writer.resume()
    return writer


def train_and_commit(
    writer: RunWriter, first: int, last: int, every: int, *, is_final: bool = False, best: int | None = None
) -> None:
    """Commit every `every` steps from `first` to `last`."""
    for step in range(first + every - 1, last + 1, every):
        block = make_block(step - every + 1, step)
        evaluations = [make_evaluation(0)] if step == every else []
        snapshot = make_snapshot(step, best=best, is_final=is_final and step == last)
        writer.commit(snapshot, [block], [*evaluations, make_evaluation(step)])


def read_logged_steps(run: Run) -> list[int]:
    folder = Path(run.url) / "metrics/steps"
    return sorted(ds.dataset(folder).to_table()["step"].to_pylist()) if folder.is_dir() else []


def test_segments_are_complete_except_the_last(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    attempt = acquire_attempt(run)
    writer = make_writer(attempt)
    train_and_commit(writer, 1, 3, 3)
    assert read_logged_steps(run) == [], "no segment is complete"
    writer.commit(make_snapshot(6), [make_block(4, 6)], [make_evaluation(6)])
    assert read_logged_steps(run) == [1, 2, 3, 4]
    writer.commit(make_snapshot(10, is_final=True), [make_block(7, 10)], [make_evaluation(10)])
    assert read_logged_steps(run) == list(range(1, 11))
    segments = {path.name for path in (tmp_path / "run/metrics/evals").iterdir()}
    assert segments == {path.name for path in (tmp_path / "run/metrics/steps").iterdir()}
    attempt.close()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.safetensors", "rows.parquet", "preprocess.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_checkpoint_falls_back_to_the_next_retained(tmp_path: Path, name: str, damage: str) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    attempt = acquire_attempt(run)
    train_and_commit(make_writer(attempt), 1, 8, 4)
    attempt.close()
    path = tmp_path / "run/checkpoints/step-000000008-a0001" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "truncated" else data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    second = acquire_attempt(run)
    assert second.resume_checkpoint is not None
    assert second.resume_checkpoint.step == 4
    assert second.damaged_checkpoints == ["step-000000008-a0001"]
    assert second.highest_step == 8
    train_and_commit(make_writer(second), 5, 12, 4, is_final=True)
    second.close()
    assert read_logged_steps(run) == list(range(1, 13))


def test_run_restarts_if_no_checkpoint_is_valid(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    attempt = acquire_attempt(run)
    train_and_commit(make_writer(attempt), 1, 8, 4)
    attempt.close()
    for manifest in tmp_path.glob("run/checkpoints/*/manifest.json"):
        manifest.unlink()
    second = acquire_attempt(run)
    assert second.resume_checkpoint is None
    second.close()
    with pytest.raises(DamagedError):
        find_checkpoint(run, "last")


def test_retention_keeps_latest_pairs_and_the_best(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    attempt = acquire_attempt(run)
    train_and_commit(make_writer(attempt, keep=2), 1, 20, 4, best=4)
    attempt.close()
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step-{step:09d}-a0001" for step in (4, 16, 20)]
    best = find_checkpoint(run, "best")
    assert torch.equal(best.load_weights()["0.weight"], torch.full((3, 4), 4.0))
    assert find_checkpoint(run, "16").step == 16
    with pytest.raises(StorageError, match="'8'"):
        find_checkpoint(run, "8")


def test_best_between_two_commits_is_written_with_the_later(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    attempt = acquire_attempt(run)
    writer = make_writer(attempt)
    snapshot = make_snapshot(4, best=3, best_weights=make_snapshot(3).weights)
    writer.commit(snapshot, [make_block(1, 4)], [make_evaluation(3), make_evaluation(4)])
    attempt.close()
    best = find_checkpoint(run, "best")
    assert best.step == 3
    assert torch.equal(best.load_weights()["0.weight"], torch.full((3, 4), 3.0))


def test_superseded_attempt_writes_nothing(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    zombie = acquire_attempt(run)
    writer = make_writer(zombie)
    train_and_commit(writer, 1, 4, 4)
    assert zombie.lock is not None
    zombie.lock.release(remove=False)  # as if its process had ended
    successor = acquire_attempt(Run(Storage.open(str(tmp_path)), "run"))
    assert successor.number == 2
    with pytest.raises(SupersededError):
        writer.commit(make_snapshot(8), [make_block(5, 8)], [])
    assert successor.resume_checkpoint is not None
    assert successor.resume_checkpoint.step == 4
    train_and_commit(make_writer(successor), 5, 8, 4, is_final=True)
    zombie.close()
    successor.close()
    assert read_logged_steps(run) == list(range(1, 9))


def test_nonfinite_loss_is_never_committed(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    attempt = acquire_attempt(run)
    writer = make_writer(attempt)
    train_and_commit(writer, 1, 4, 4)
    block = make_block(5, 8)
    block["loss"][2] = np.inf
    with pytest.raises(NotFiniteError, match="at step 7") as raised:
        writer.commit(make_snapshot(8), [block], [])
    assert "init_from: run@last starts it from the last checkpoint, of step 4" in str(raised.value)
    weights = {"0.weight": torch.full((3, 4), float("nan"))}
    other_writer = RunWriter(attempt, layout=SEGMENT_LAYOUT, keep=1, metric_schema=MetricSchema())
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        other_writer.commit(make_snapshot(4, weights=weights), [make_block(1, 4)], [])
    writer.write_exit("failed", raised.value, 7)
    attempt.close()
    shown = read_run_status(run)
    assert (shown.status, shown.step) == ("failed", 4)
    assert json.loads((tmp_path / "run/journal/00000003.json").read_text())["row"]["step"] == 7


def test_missing_files_of_a_finished_run_are_written(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    attempt = acquire_attempt(run)
    train_and_commit(make_writer(attempt), 1, 6, 3, is_final=True)
    attempt.close()
    result = (tmp_path / "run/result.json").read_bytes()
    segment = (tmp_path / "run/metrics/steps/000001.parquet").read_bytes()
    for path in ("result.json", "run.json", "metrics/steps/000001.parquet"):
        (tmp_path / "run" / path).unlink()
    second = acquire_attempt(run)
    assert second.resume_checkpoint is not None
    assert second.resume_checkpoint.is_final
    assert second.end_step == 6
    finish_ended_run(second)
    assert (tmp_path / "run/result.json").read_bytes() == result
    assert (tmp_path / "run/metrics/steps/000001.parquet").read_bytes() == segment
    assert read_run_status(run).status == "finished"


def test_attempt_superseded_before_loading_is_not_reported_as_damage(tmp_path: Path) -> None:
    run = create_run(str(tmp_path), cell_steps=SEGMENT_LAYOUT.max_segment_steps)
    first = acquire_attempt(run)
    train_and_commit(make_writer(first), 1, 4, 4)
    slow = acquire_lease(run, driver="driver", metadata={}, known_dead_attempt=1)
    newest = acquire_lease(run, driver="driver", metadata={}, known_dead_attempt=2)
    train_and_commit(make_writer(newest, keep=1), 5, 12, 4)
    assert slow.resume_checkpoint is not None
    assert "step-000000004-a0001" not in run.storage.list("checkpoints")
    with pytest.raises(SupersededError, match="attempt 2 was presumed dead"), slow.reading_resume_checkpoint():
        slow.resume_checkpoint.load_weights()
    with pytest.raises(SupersededError):
        make_writer(slow)
    for attempt in (first, slow, newest):
        attempt.close()
