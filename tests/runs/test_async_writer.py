"""The asynchronous writer: training does not wait for it, and errors of its thread are reported."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from pipeline.errors import NotFiniteError, StorageLostError, SupersededError
from pipeline.runs.async_writer import COMMIT_INTERVAL_FACTOR, MAX_BUFFERED_ROWS, finish_ended_run
from pipeline.runs.journal.entries import Commit, Exit
from pipeline.runs.journal.journal import Journal
from pipeline.runs.lease.attempt import acquire_lease, probe_lease
from pipeline.runs.metric_log.segments import MetricSchema
from pipeline.runs.run import Run
from pipeline.runs.status import read_run_status
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.runs.factories import (
    create_run,
    make_block,
    make_evaluation,
    make_snapshot,
    read_entries,
    start_attempt,
    stop_attempt,
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(str(tmp_path))


def read_steps(run: Run) -> list[int]:
    folder = run.storage.local_path
    assert folder is not None
    steps: list[int] = ds.dataset(folder / "metrics" / "steps").to_table()["step"].to_pylist()
    return steps


class GatedBackend(LocalBackend):
    """Local storage whose writes wait while the gate is closed, or fail as if storage were unavailable."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.away = False

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        if "heartbeats" not in path:
            self.open.wait(20)
        if self.away:
            raise TimeoutError("away")
        super().replace(path, data, temporary, sync)

    def create(self, path: str, data: bytes, temporary: str) -> None:
        if self.away:
            raise TimeoutError("away")
        super().create(path, data, temporary)


@pytest.fixture
def gate() -> GatedBackend:
    return GatedBackend()


@pytest.fixture
def gated_run(gate: GatedBackend, tmp_path: Path) -> Run:
    create_run(str(tmp_path))
    return Run(Storage(gate, str(tmp_path), str(tmp_path)), "run")


def test_run_from_creation_to_end(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_evaluation(make_evaluation(0, epoch=0))
    writer.log_steps(make_block(1, 60))
    writer.log_steps(make_block(61, 150))
    writer.log_evaluation(make_evaluation(150))
    writer.commit(make_snapshot(150, best=150))
    writer.log_steps(make_block(151, 250))
    writer.log_evaluation(make_evaluation(250))
    writer.commit(make_snapshot(250, best=250, is_final=True, epoch=2, evaluations_since_best=0))
    writer.finish()
    writer.raise_if_failed()
    stop_attempt(attempt, writer)
    assert read_steps(run) == list(range(1, 251))
    assert run.storage.list("metrics/steps") == run.storage.list("metrics/evals")
    result = json.loads(run.storage.read("result.json"))
    assert result["step"] == 250
    assert result["chosen"] == result["last"] == "step-000000250-a0001"
    assert result["metrics"] == {"val/loss": 0.5}
    assert run.read_summary()["status"] == "finished"
    assert probe_lease(run) == "finished"
    end = read_entries(run.journal)[-1]
    assert isinstance(end, Commit)
    assert end.kept == (("step-000000250-a0001",) * 2, ("step-000000150-a0001",) * 2)
    assert end.patience == 0


def test_training_does_not_wait_for_commits(gate: GatedBackend, gated_run: Run) -> None:
    attempt, writer = start_attempt(gated_run)
    writer.finish()
    gate.open.clear()
    writer.log_steps(make_block(1, 10))
    assert writer.can_save_now()
    writer.commit(make_snapshot(10))  # waiting for it would never end: the gate is closed
    writer.log_steps(make_block(11, 20))
    writer.raise_if_failed()
    assert not writer.can_save_now()
    opened = threading.Timer(0.2, gate.open.set)
    opened.start()
    writer.commit(make_snapshot(20))  # waits for the commit in progress
    assert gate.open.is_set()
    writer.finish()
    assert not writer.can_save_now(), "after a commit of 0.1 s the next one waits 10 s"
    stop_attempt(attempt, writer)
    opened.join()
    assert read_run_status(gated_run).step == 20


def test_commit_interval_is_proportional_to_its_cost(gate: GatedBackend, gated_run: Run) -> None:
    attempt, writer = start_attempt(gated_run)
    writer.finish()
    writer.log_steps(make_block(1, 10))
    gate.open.clear()
    threading.Timer(0.3, gate.open.set).start()  # a long commit, whatever the load of this machine
    began = time.monotonic()
    writer.commit(make_snapshot(10))
    writer.finish()
    elapsed_s = time.monotonic() - began
    assert not writer.can_save_now()
    assert 0 < writer._next_commit_time - time.monotonic() <= COMMIT_INTERVAL_FACTOR * elapsed_s
    stop_attempt(attempt, writer)


def test_many_buffered_rows_force_a_commit(tmp_path: Path) -> None:
    attempt, writer = start_attempt(create_run(str(tmp_path), cell_steps=100_000))
    writer.finish()  # the first task of the writer
    writer.log_steps(make_block(1, MAX_BUFFERED_ROWS - 1))
    assert not writer.must_save_now()
    writer.log_steps(make_block(MAX_BUFFERED_ROWS, MAX_BUFFERED_ROWS))
    assert writer.must_save_now()
    writer.commit(make_snapshot(MAX_BUFFERED_ROWS))
    assert not writer.must_save_now()
    writer.finish()
    stop_attempt(attempt, writer)


def test_resume_continues_from_the_commit(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 150))
    writer.log_evaluation(make_evaluation(120))
    writer.commit(make_snapshot(150, best=120, best_weights={"w": torch.full((1,), 120.0)}))
    writer.log_steps(make_block(151, 180))
    writer.finish()
    stop_attempt(attempt, writer)
    attempt, writer = start_attempt(run)
    assert attempt.resume_checkpoint is not None
    assert (attempt.resume_checkpoint.step, attempt.resume_checkpoint.position, attempt.highest_step) == (
        150,
        {"step": 150},
        150,
    )
    assert attempt.resume_checkpoint.best is not None
    assert attempt.resume_checkpoint.best.checkpoint == "step-000000120-a0001"
    writer.log_steps(make_block(151, 220))
    writer.commit(make_snapshot(220, best=120, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert read_steps(run) == list(range(1, 221))
    assert json.loads(run.storage.read("result.json"))["chosen"] == "step-000000120-a0001"
    assert run.storage.list("checkpoints") == [f"step-000000{name}" for name in ("120-a0001", "150-a0001", "220-a0002")]


def test_missing_best_checkpoint_is_an_error(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 10))
    writer.commit(make_snapshot(10, best=5))
    with pytest.raises(ValueError, match="best step 5"):
        writer.finish()
    stop_attempt(attempt, writer)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nonfinite_loss_is_never_committed(run: Run, loss: float) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 10))
    writer.commit(make_snapshot(10))
    block = make_block(11, 20)
    block["loss"][4:] = loss
    writer.log_steps(block)
    writer.commit(make_snapshot(20))
    with pytest.raises(NotFiniteError, match=rf"loss is {loss} at step 15 \(learning rate 0.1\)") as caught:
        writer.finish()
    assert "model.init_from: run@last starts it from the last checkpoint, of step 10" in caught.value.fix
    writer.write_exit("failed", caught.value, 20)
    stop_attempt(attempt, writer)
    last = read_entries(Journal(run.storage))[-1]  # as another process would read it
    assert isinstance(last, Exit)
    assert last.row is not None
    assert (last.row["step"], last.row["loss"]) == (15, str(loss))
    assert last.error == {"type": "NotFiniteError", "message": caught.value.what}
    status = read_run_status(run)
    assert (status.status, status.step) == ("failed", 10)


def test_exit_entry_names_the_nonfinite_row(run: Run) -> None:
    attempt, writer = start_attempt(run)
    block = make_block(1, 5)
    block["loss"][2] = math.nan
    writer.log_steps(block)
    writer.write_exit("failed", NotFiniteError("the loss is nan"), 5)
    stop_attempt(attempt, writer)
    last = read_entries(run.journal)[-1]
    assert isinstance(last, Exit)
    assert last.row is not None
    assert last.row["step"] == 3


def test_nonfinite_evaluation_is_reported_with_its_split(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 5))
    writer.log_evaluation(make_evaluation(5, loss=math.nan))
    writer.commit(make_snapshot(5))
    with pytest.raises(NotFiniteError, match="the val loss is nan at step 5"):
        writer.finish()
    stop_attempt(attempt, writer)


@pytest.mark.parametrize("where", ["weights", "best_weights"])
def test_nonfinite_weights_are_never_committed(run: Run, where: str) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 10))
    nonfinite = {"0.weight": torch.tensor([1.0, math.nan]), "0.count": torch.tensor(3)}
    writer.commit(make_snapshot(10, best=5 if where == "best_weights" else None, **{where: nonfinite}))
    with pytest.raises(NotFiniteError, match=r"weights 0\.weight are not finite at step 10"):
        writer.finish()
    stop_attempt(attempt, writer)
    assert run.storage.list("checkpoints") == []


def test_transient_fault_loses_nothing(gate: GatedBackend, gated_run: Run) -> None:
    attempt, writer = start_attempt(gated_run)
    writer.finish()
    gate.away = True
    writer.log_steps(make_block(1, 120))
    writer.commit(make_snapshot(120))
    time.sleep(0.3)
    writer.raise_if_failed()
    gate.away = False
    writer.finish()
    stop_attempt(attempt, writer)
    assert read_run_status(gated_run).step == 120


def test_storage_failure_is_reported_and_the_exit_entry_is_written_once_storage_is_back(
    gate: GatedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "0.5")
    create_run(str(tmp_path))
    run = Run(Storage(gate, str(tmp_path), str(tmp_path)), "run")
    attempt, writer = start_attempt(run)
    writer.finish()
    gate.away = True
    writer.log_steps(make_block(1, 10))
    writer.commit(make_snapshot(10))
    with pytest.raises(StorageLostError) as caught:
        writer.finish()
    with pytest.raises(StorageLostError):
        writer.commit(make_snapshot(10))
    writer.write_exit("failed", caught.value, 10)
    gate.away = False
    writer.write_exit("failed", caught.value, 10)
    stop_attempt(attempt, writer)
    assert read_run_status(run).status == "failed"


def test_superseded_attempt_commits_nothing(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 10))
    writer.commit(make_snapshot(10))
    writer.finish()
    next_attempt, next_writer = start_attempt(run, known_dead_attempt=1)
    writer.log_steps(make_block(11, 20))
    writer.commit(make_snapshot(20))
    with pytest.raises(SupersededError, match="presumed dead"):
        writer.finish()
    writer.write_exit("failed", RuntimeError("x"), 20)
    stop_attempt(attempt, writer)
    assert [entry.kind for entry in read_entries(run.journal)] == ["claim", "commit", "claim"]
    next_writer.log_steps(make_block(11, 20))
    next_writer.commit(make_snapshot(20, is_final=True))
    next_writer.finish()
    stop_attempt(next_attempt, next_writer)
    assert read_steps(run) == list(range(1, 21))


def test_interrupt_after_a_commit(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 10))
    writer.commit(make_snapshot(10))
    writer.write_exit("interrupted", None, 10)
    stop_attempt(attempt, writer)
    assert read_run_status(run).status == "interrupted"
    assert probe_lease(run) == "free"
    assert run.read_summary()["status"] == "interrupted"


def test_completing_an_end_writes_only_what_is_missing(run: Run) -> None:
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 150))
    writer.commit(make_snapshot(150, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    before = run.storage.read("result.json")
    for path in ("result.json", "run.json", "metrics/steps/000001.parquet"):
        run.storage.delete(path)
    assert not run.has_result()
    second = acquire_lease(run, driver="e", metadata={})
    assert second.resume_checkpoint is not None
    assert second.resume_checkpoint.is_final
    finish_ended_run(second)
    assert run.storage.read("result.json") == before
    assert read_steps(run) == list(range(1, 151))
    assert run.has_result()
    assert read_run_status(run).status == "finished"
    assert len(read_entries(run.journal)) == 3, "a claim, but no second final commit"


def test_columns_are_fixed_at_creation(tmp_path: Path) -> None:
    columns = MetricSchema(steps={"grad_norm": "float64"})
    run = create_run(str(tmp_path), columns=columns.to_json())
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 5, grad_norm=2.0))
    writer.commit(make_snapshot(5, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert ds.dataset(tmp_path / "run" / "metrics" / "steps").to_table()["grad_norm"].to_pylist() == [2.0] * 5


def test_readers_of_s3_see_a_consistent_log(s3_url: str) -> None:
    import fsspec

    run = create_run(s3_url)
    attempt, writer = start_attempt(run)
    writer.log_steps(make_block(1, 150))
    writer.log_evaluation(make_evaluation(150))
    writer.commit(make_snapshot(150, best=150))
    writer.finish()
    stop_attempt(attempt, writer)
    attempt, writer = start_attempt(run)
    assert attempt.resume_checkpoint is not None
    assert torch.equal(attempt.resume_checkpoint.load_weights()["0.weight"], torch.full((3, 4), 150.0))
    writer.log_steps(make_block(151, 220))
    writer.commit(make_snapshot(220, best=150, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    table = ds.dataset(run.url.removeprefix("s3://") + "/metrics/steps", filesystem=fs).to_table()
    assert table["step"].to_pylist() == list(range(1, 221))
    assert run.has_result()


def test_training_thread_hands_over_in_microseconds(run: Run) -> None:
    attempt, writer = start_attempt(run)
    blocks = [make_block(first, first + 99) for first in range(1, 20_000, 100)]
    durations_s = []
    for block in blocks:
        began = time.perf_counter()
        writer.log_steps(block)
        writer.can_save_now()
        writer.raise_if_failed()
        durations_s.append(time.perf_counter() - began)
    assert np.median(durations_s) < 1e-4, "the median, because other processes may interrupt some"
    writer.commit(make_snapshot(20_000, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert np.array_equal(read_steps(run), np.arange(1, 20_001))
