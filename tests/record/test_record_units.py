"""Each unit of the record by itself: journal, checkpoints, cells, claims, decisions, standing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest
import torch

from pipeline.errors import BusyError, NotFiniteError, StorageError, SupersededError
from pipeline.record import decisions
from pipeline.record.attempt import Attempt
from pipeline.record.cells import Columns
from pipeline.record.checkpoint import DamagedError, find_checkpoint
from pipeline.record.entries import Commit
from pipeline.record.recorder import Recorder, complete
from pipeline.record.run import Run, list_runs
from pipeline.record.standing import standing
from pipeline.record.writer import Writer
from pipeline.storage import Storage
from tests.record.record_values import CELL_STEPS, attempt_on, block, evaluation, new_run, snapshot


def writer_of(attempt: Attempt, keep: int = 2) -> Writer:
    writer = Writer(attempt, cell_steps=CELL_STEPS, keep=keep, columns=Columns())
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


def test_four_readers_agree_on_names_types_and_values(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    train(writer_of(attempt), 1, 8, 4, end=True)
    attempt.close()
    steps = f"{run.url}/metrics/steps"
    names = ["run", "attempt", "epoch", "step", "loss", "correct", "lr", "samples", "seconds", "time"]
    arrow = ds.dataset(steps).to_table()
    assert arrow.schema.names == names
    assert str(arrow.schema.field("time").type) == "timestamp[us, tz=UTC]"
    expected = [1.0 / step for step in range(1, 9)]
    assert arrow["loss"].to_pylist() == expected
    assert pd.read_parquet(steps)["loss"].tolist() == expected
    assert pl.read_parquet(f"{steps}/*.parquet")["loss"].to_list() == expected
    rows = duckdb.connect().execute(f"select loss from '{steps}/*.parquet' order by step").fetchall()
    assert [row[0] for row in rows] == expected


def test_a_number_that_a_task_does_not_have_is_null(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    writer = writer_of(attempt)
    rows = {**block(1, 4), "correct": np.full(4, np.nan)}
    row = {**evaluation(4), "accuracy": float("nan"), "correct": float("nan")}
    writer.commit(snapshot(4, end=True), [rows], [row])
    attempt.close()
    assert ds.dataset(f"{run.url}/metrics/steps").to_table()["correct"].null_count == 4
    evals = ds.dataset(f"{run.url}/metrics/evals").to_table()
    assert evals["accuracy"].null_count == evals["correct"].null_count == 1


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    train(writer_of(attempt), 1, 4, 4)
    attempt.close()
    found = find_checkpoint(run, "last")
    assert (found.step, found.end, found.position) == (4, False, {"step": 4})
    assert torch.equal(found.weights()["0.weight"], torch.full((2, 3), 4.0))
    assert torch.equal(found.state()["optimizer.momentum"], torch.full((6,), 4.0))
    folder = tmp_path / "run/checkpoints/step-000000004-a0001"
    assert torch.load(folder / "state.pt", weights_only=True).keys() == {"optimizer.momentum"}
    again = new_run(str(tmp_path), "again")
    second = attempt_on(again)
    train(writer_of(second), 1, 4, 4)
    second.close()
    for name in ("model.safetensors", "state.pt", "preprocess.json"):
        same = tmp_path / "again/checkpoints/step-000000004-a0001" / name
        assert same.read_bytes() == (folder / name).read_bytes(), "the same content gives the same bytes"


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "rows.parquet", "preprocess.json", "manifest.json"])
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


def test_a_run_that_is_being_written_is_busy(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    with pytest.raises(BusyError, match="is writing this run") as busy:
        attempt_on(Run(Storage.open(str(tmp_path)), "run"))
    assert busy.value.exit_code == 3
    assert standing(run).status == "running"
    attempt.close()


def test_an_entry_once_taken_stays_and_a_gap_ends_the_journal(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    train(writer_of(attempt), 1, 8, 4)
    attempt.close()
    journal = tmp_path / "run/journal"
    entries = run.journal.read()
    assert [entry.kind for entry in entries] == ["claim", "commit", "commit"]
    other = Run(Storage.open(str(tmp_path)), "run").journal
    assert not other.append(replace(entries[1], nonce="another's"))
    assert other.append(entries[1]), "an entry found with its own nonce was created after all"
    (journal / "00000002.json").unlink()
    (journal / "00000009.json").write_text(replace(entries[1], number=9).to_json())
    assert len(Run(Storage.open(str(tmp_path)), "run").journal.read()) == 1


@pytest.mark.parametrize(
    "garbage", ["", "{", "[]", '{"kind": "nosuch", "number": 1}', '{"kind": "claim", "number": 2}']
)
def test_an_entry_that_cannot_be_read_is_named(tmp_path: Path, garbage: str) -> None:
    run = new_run(str(tmp_path))
    (tmp_path / "run/journal").mkdir()
    (tmp_path / "run/journal/00000001.json").write_text(garbage)
    with pytest.raises(StorageError, match=r"00000001\.json"):
        run.journal.read()


def test_a_loss_that_is_not_finite_is_never_committed(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    writer = writer_of(attempt)
    train(writer, 1, 4, 4)
    bad = block(5, 8)
    bad["loss"][2] = np.inf
    with pytest.raises(NotFiniteError, match="at step 7") as raised:
        writer.commit(snapshot(8), [bad], [])
    assert "step-000000004-a0001" in str(raised.value)
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        Writer(attempt, cell_steps=CELL_STEPS, keep=1, columns=Columns()).commit(
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


def test_the_recorder_does_in_the_background_what_the_writer_does(tmp_path: Path) -> None:
    run = new_run(str(tmp_path))
    attempt = attempt_on(run)
    recorder = Recorder(attempt, cell_steps=CELL_STEPS, keep=2)
    for step in range(2, 11, 2):
        recorder.steps(block(step - 1, step))
        recorder.evaluation(evaluation(step))
        recorder.check()
        recorder.commit(snapshot(step, end=step == 10))
    recorder.finish()
    recorder.close()
    attempt.close()
    assert steps_logged(run) == list(range(1, 11))
    assert standing(run).status == "finished"
    assert list_runs(Storage.open(str(tmp_path))) == ["run"]


def test_decisions_need_no_disk() -> None:
    assert decisions.kept_after([("b", None), ("a", None)], ("c", "a"), 2) == (("c", "a"), ("b", None))
    assert decisions.remaining([("c", None), ("b", None), ("a", None)], "b") == (("b", None), ("a", None))
    names = [decisions.checkpoint_name(step, attempt) for step, attempt in ((4, 1), (8, 1), (4, 2), (9, 2), (2, 3))]
    doomed = decisions.doomed([*names, "other"], attempt=2, step=8, spare={names[0]})
    assert doomed == [names[1], names[2]], "lower attempts and its own up to the step, never a higher attempt's"
    assert decisions.parse_checkpoint_name(names[0]) == (4, 1)
    end = Commit(number=2, nonce="", time="", attempt=1, checkpoint="c", step=9, epoch=1, end=True, kept=(("c", "a"),))
    assert decisions.ended_at([end]) == 9
    assert decisions.spared([("d", None)], [end]) == {"c", "a", "d"}
