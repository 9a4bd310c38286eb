"""What follows from a commit, and what a resume makes of what it finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from pipeline.errors import NotFiniteError, StorageError, SupersededError
from pipeline.record.attempt import Attempt, claim
from pipeline.record.cells import CellLayout, Columns
from pipeline.record.checkpoint import DamagedError, find_checkpoint
from pipeline.record.recorder import complete
from pipeline.record.run import Run
from pipeline.record.standing import standing
from pipeline.record.writer import Writer
from pipeline.storage import Storage
from tests.record.record_values import CELL_STEPS, attempt_on, block, evaluation, new_run, snapshot


def writer_of(attempt: Attempt, keep: int = 2) -> Writer:
    writer = Writer(attempt, layout=CellLayout(CELL_STEPS, CELL_STEPS), keep=keep, columns=Columns())
    writer.begin()
    return writer


def train(writer: Writer, first: int, last: int, every: int, *, end: bool = False, best: int | None = None) -> None:
    """Commit at `every` steps from `first` to `last`."""
    for step in range(first + every - 1, last + 1, every):
        rows = block(step - every + 1, step)
        evaluations = [evaluation(0)] if step == every else []
        writer.commit(
            snapshot(step, best=best, end=end and step == last), [rows], [*evaluations, evaluation(step)]
        )  # fmt: skip


def steps_logged(run: Run) -> list[int]:
    folder = Path(run.url) / "metrics/steps"
    return sorted(ds.dataset(folder).to_table()["step"].to_pylist()) if folder.is_dir() else []


def test_cells_hold_complete_stretches_and_the_end_the_rest(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    writer = writer_of(attempt)
    train(writer, 1, 3, 3)
    assert steps_logged(run) == [], "no cell is complete"
    writer.commit(snapshot(6), [block(4, 6)], [evaluation(6)])
    assert steps_logged(run) == [1, 2, 3, 4]
    writer.commit(snapshot(10, end=True), [block(7, 10)], [evaluation(10)])
    assert steps_logged(run) == list(range(1, 11))
    cells = {path.name for path in (tmp_path / "run/metrics/evals").iterdir()}
    assert cells == {path.name for path in (tmp_path / "run/metrics/steps").iterdir()}
    attempt.close()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.safetensors", "rows.parquet", "preprocess.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_next_kept(tmp_path: Path, name: str, damage: str) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    train(writer_of(attempt), 1, 8, 4)
    attempt.close()
    path = tmp_path / "run/checkpoints/step-000000008-a0001" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "truncated" else data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    second = attempt_on(run)
    assert second.base is not None
    assert second.base.step == 4
    assert second.damaged == ["step-000000008-a0001"]
    assert second.highest_step == 8
    train(writer_of(second), 5, 12, 4, end=True)
    second.close()
    assert steps_logged(run) == list(range(1, 13))


def test_when_nothing_kept_is_sound_the_run_begins_again(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    train(writer_of(attempt), 1, 8, 4)
    attempt.close()
    for manifest in tmp_path.glob("run/checkpoints/*/manifest.json"):
        manifest.unlink()
    second = attempt_on(run)
    assert second.base is None
    second.close()
    with pytest.raises(DamagedError):
        find_checkpoint(run, "last")


def test_retention_keeps_the_last_pairs_and_any_best(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    train(writer_of(attempt, keep=2), 1, 20, 4, best=4)
    attempt.close()
    there = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert there == [f"step-{step:09d}-a0001" for step in (4, 16, 20)]
    best = find_checkpoint(run, "best")
    assert torch.equal(best.weights()["0.weight"], torch.full((2, 3), 4.0))
    assert find_checkpoint(run, "16").step == 16
    with pytest.raises(StorageError, match="'8'"):
        find_checkpoint(run, "8")


def test_a_best_between_two_commits_is_written_with_the_later_one(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    writer = writer_of(attempt)
    writer.commit(snapshot(4, best=3), [block(1, 4)], [evaluation(3), evaluation(4)])
    attempt.close()
    best = find_checkpoint(run, "best")
    assert best.step == 3
    assert torch.equal(best.weights()["0.weight"], torch.full((2, 3), 3.0))


def test_a_superseded_attempt_writes_nothing_more(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    zombie = attempt_on(run)
    writer = writer_of(zombie)
    train(writer, 1, 4, 4)
    assert zombie.lock is not None
    zombie.lock.release(remove=False)  # as if its process had died
    successor = attempt_on(Run(Storage.open(str(tmp_path)), "run"))
    assert successor.number == 2
    with pytest.raises(SupersededError):
        writer.commit(snapshot(8), [block(5, 8)], [])
    assert successor.base is not None
    assert successor.base.step == 4
    train(writer_of(successor), 5, 8, 4, end=True)
    zombie.close()
    successor.close()
    assert steps_logged(run) == list(range(1, 9))


def test_a_loss_that_is_not_finite_is_never_committed(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    writer = writer_of(attempt)
    train(writer, 1, 4, 4)
    bad = block(5, 8)
    bad["loss"][2] = np.inf
    with pytest.raises(NotFiniteError, match="at step 7") as raised:
        writer.commit(snapshot(8), [bad], [])
    assert "init_from: run@last begins it at the last checkpoint, of step 4" in str(raised.value)
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        Writer(attempt, layout=CellLayout(CELL_STEPS, CELL_STEPS), keep=1, columns=Columns()).commit(
            snapshot(4, weight=float("nan")), [block(1, 4)], []
        )
    writer.leave("failed", raised.value, 7)
    attempt.close()
    shown = standing(run)
    assert (shown.status, shown.step) == ("failed", 4)
    assert json.loads((tmp_path / "run/journal/00000003.json").read_text())["row"]["step"] == 7


def test_what_follows_from_an_end_is_made_good(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    train(writer_of(attempt), 1, 6, 3, end=True)
    attempt.close()
    result = (tmp_path / "run/result.json").read_bytes()
    cell = (tmp_path / "run/metrics/steps/000001.parquet").read_bytes()
    for path in ("result.json", "run.json", "metrics/steps/000001.parquet"):
        (tmp_path / "run" / path).unlink()
    second = attempt_on(run)
    assert second.base is not None
    assert second.base.end
    assert second.ended_at == 6
    complete(second)
    assert (tmp_path / "run/result.json").read_bytes() == result
    assert (tmp_path / "run/metrics/steps/000001.parquet").read_bytes() == cell
    assert standing(run).status == "finished"


def test_who_was_overtaken_before_it_read_its_base_is_told_that_and_not_of_damage(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    first = attempt_on(run)
    train(writer_of(first), 1, 4, 4)
    slow = claim(run, driver="driver", facts={}, dead=1)
    newest = claim(run, driver="driver", facts={}, dead=2)
    train(writer_of(newest, keep=1), 5, 12, 4)
    assert slow.base is not None
    assert "step-000000004-a0001" not in run.storage.list("checkpoints")
    with pytest.raises(SupersededError, match="attempt 2 was taken for dead"), slow.reading_base():
        slow.base.weights()
    with pytest.raises(SupersededError):
        writer_of(slow)
    for attempt in (first, slow, newest):
        attempt.close()
