"""The recorder: training never waits, and what the background meets is told."""

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
from pipeline.runs.async_writer import COMMIT_INTERVAL_FACTOR, MAX_BUFFERED_ROWS, AsyncRunWriter, finish_ended_run
from pipeline.runs.journal.entries import Commit, Exit
from pipeline.runs.journal.journal import Journal
from pipeline.runs.lease.attempt import Attempt, acquire_lease, probe_lease
from pipeline.runs.metric_log.segments import MetricSchema
from pipeline.runs.run import Run
from pipeline.runs.status import read_run_status
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.runs.parts import create_run, make_block, make_evaluation, make_snapshot, read_entries


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(str(tmp_path))


def start_attempt(run: Run, *, keep: int = 2, dead: int | None = None) -> tuple[Attempt, AsyncRunWriter]:
    attempt = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=dead)
    return attempt, AsyncRunWriter(attempt, keep=keep)


def stop_attempt(attempt: Attempt, recorder: AsyncRunWriter) -> None:
    recorder.close()
    attempt.close()


def read_steps(run: Run) -> list[int]:
    folder = run.storage.local_path
    assert folder is not None
    steps: list[int] = ds.dataset(folder / "metrics" / "steps").to_table()["step"].to_pylist()
    return steps


class GatedBackend(LocalBackend):
    """Files whose writes wait while the gate is shut, or fail as if storage were away."""

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
    attempt, recorder = start_attempt(run)
    recorder.log_evaluation(make_evaluation(0, epoch=0))
    recorder.log_steps(make_block(1, 60))
    recorder.log_steps(make_block(61, 150))
    recorder.log_evaluation(make_evaluation(150))
    recorder.commit(make_snapshot(150, best=150))
    recorder.log_steps(make_block(151, 250))
    recorder.log_evaluation(make_evaluation(250))
    recorder.commit(make_snapshot(250, best=250, end=True, epoch=2, patience=0))
    recorder.finish()
    recorder.raise_if_failed()
    stop_attempt(attempt, recorder)
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
    attempt, recorder = start_attempt(gated_run)
    recorder.finish()
    gate.open.clear()
    recorder.log_steps(make_block(1, 10))
    assert recorder.can_save_now()
    recorder.commit(make_snapshot(10))  # who waited for it would wait for ever: nothing opens the gate yet
    recorder.log_steps(make_block(11, 20))
    recorder.raise_if_failed()
    assert not recorder.can_save_now()
    opened = threading.Timer(0.2, gate.open.set)
    opened.start()
    recorder.commit(make_snapshot(20))  # waits for the one that is under way
    assert gate.open.is_set()
    recorder.finish()
    assert not recorder.can_save_now(), "a commit of a tenth of a second rests for ten"
    stop_attempt(attempt, recorder)
    opened.join()
    assert read_run_status(gated_run).step == 20


def test_commit_interval_is_proportional_to_its_cost(gate: GatedBackend, gated_run: Run) -> None:
    attempt, recorder = start_attempt(gated_run)
    recorder.finish()
    recorder.log_steps(make_block(1, 10))
    gate.open.clear()
    threading.Timer(0.3, gate.open.set).start()  # so that the rest is long, whatever else this machine does
    began = time.monotonic()
    recorder.commit(make_snapshot(10))
    recorder.finish()
    cost = time.monotonic() - began
    assert not recorder.can_save_now()
    assert 0 < recorder._next_commit_time - time.monotonic() <= COMMIT_INTERVAL_FACTOR * cost
    stop_attempt(attempt, recorder)


def test_many_buffered_rows_force_a_commit(tmp_path: Path) -> None:
    attempt, recorder = start_attempt(create_run(str(tmp_path), cell_steps=100_000))
    recorder.finish()  # what it begins with
    recorder.log_steps(make_block(1, MAX_BUFFERED_ROWS - 1))
    assert not recorder.must_save_now()
    recorder.log_steps(make_block(MAX_BUFFERED_ROWS, MAX_BUFFERED_ROWS))
    assert recorder.must_save_now()
    recorder.commit(make_snapshot(MAX_BUFFERED_ROWS))
    assert not recorder.must_save_now()
    recorder.finish()
    stop_attempt(attempt, recorder)


def test_resume_continues_from_the_commit(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 150))
    recorder.log_evaluation(make_evaluation(120))
    recorder.commit(make_snapshot(150, best=120, best_weights={"w": torch.full((1,), 120.0)}))
    recorder.log_steps(make_block(151, 180))
    recorder.finish()
    stop_attempt(attempt, recorder)
    attempt, recorder = start_attempt(run)
    assert attempt.resume_checkpoint is not None
    assert (attempt.resume_checkpoint.step, attempt.resume_checkpoint.position, attempt.highest_step) == (
        150,
        {"step": 150},
        150,
    )
    assert attempt.resume_checkpoint.best is not None
    assert attempt.resume_checkpoint.best.checkpoint == "step-000000120-a0001"
    recorder.log_steps(make_block(151, 220))
    recorder.commit(make_snapshot(220, best=120, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    assert read_steps(run) == list(range(1, 221))
    assert json.loads(run.storage.read("result.json"))["chosen"] == "step-000000120-a0001"
    assert run.storage.list("checkpoints") == [f"step-000000{name}" for name in ("120-a0001", "150-a0001", "220-a0002")]


def test_missing_best_checkpoint_is_an_error(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 10))
    recorder.commit(make_snapshot(10, best=5))
    with pytest.raises(ValueError, match="best step 5"):
        recorder.finish()
    stop_attempt(attempt, recorder)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nonfinite_loss_is_never_committed(run: Run, loss: float) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 10))
    recorder.commit(make_snapshot(10))
    bad = make_block(11, 20)
    bad["loss"][4:] = loss
    recorder.log_steps(bad)
    recorder.commit(make_snapshot(20))
    with pytest.raises(NotFiniteError, match=rf"loss is {loss} at step 15 \(learning rate 0.1\)") as caught:
        recorder.finish()
    assert "model.init_from: run@last starts it from the last checkpoint, of step 10" in caught.value.fix
    recorder.write_exit("failed", caught.value, 20)
    stop_attempt(attempt, recorder)
    last = read_entries(Journal(run.storage))[-1]  # as another process reads it
    assert isinstance(last, Exit)
    assert last.row is not None
    assert (last.row["step"], last.row["loss"]) == (15, str(loss))
    assert last.error == {"type": "NotFiniteError", "message": caught.value.what}
    status = read_run_status(run)
    assert (status.status, status.step) == ("failed", 10)


def test_exit_entry_names_the_nonfinite_row(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    bad = make_block(1, 5)
    bad["loss"][2] = math.nan
    recorder.log_steps(bad)
    recorder.write_exit("failed", NotFiniteError("the loss is nan"), 5)
    stop_attempt(attempt, recorder)
    last = read_entries(run.journal)[-1]
    assert isinstance(last, Exit)
    assert last.row is not None
    assert last.row["step"] == 3


def test_nonfinite_evaluation_is_reported_with_its_split(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 5))
    recorder.log_evaluation(make_evaluation(5, loss=math.nan))
    recorder.commit(make_snapshot(5))
    with pytest.raises(NotFiniteError, match="the val loss is nan at step 5"):
        recorder.finish()
    stop_attempt(attempt, recorder)


@pytest.mark.parametrize("where", ["weights", "best_weights"])
def test_nonfinite_weights_are_never_committed(run: Run, where: str) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 10))
    bad = {"0.weight": torch.tensor([1.0, math.nan]), "0.count": torch.tensor(3)}
    recorder.commit(make_snapshot(10, best=5 if where == "best_weights" else None, **{where: bad}))
    with pytest.raises(NotFiniteError, match=r"weights 0\.weight are not finite at step 10"):
        recorder.finish()
    stop_attempt(attempt, recorder)
    assert run.storage.list("checkpoints") == []


def test_transient_fault_loses_nothing(gate: GatedBackend, gated_run: Run) -> None:
    attempt, recorder = start_attempt(gated_run)
    recorder.finish()
    gate.away = True
    recorder.log_steps(make_block(1, 120))
    recorder.commit(make_snapshot(120))
    time.sleep(0.3)
    recorder.raise_if_failed()
    gate.away = False
    recorder.finish()
    stop_attempt(attempt, recorder)
    assert read_run_status(gated_run).step == 120


def test_storage_failure_is_reported_and_the_exit_entry_is_skipped(
    gate: GatedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "0.5")
    create_run(str(tmp_path))
    run = Run(Storage(gate, str(tmp_path), str(tmp_path)), "run")
    attempt, recorder = start_attempt(run)
    recorder.finish()
    gate.away = True
    recorder.log_steps(make_block(1, 10))
    recorder.commit(make_snapshot(10))
    with pytest.raises(StorageLostError) as caught:
        recorder.finish()
    with pytest.raises(StorageLostError):
        recorder.commit(make_snapshot(10))
    recorder.write_exit("failed", caught.value, 10)
    gate.away = False
    recorder.write_exit("failed", caught.value, 10)
    stop_attempt(attempt, recorder)
    assert read_run_status(run).status == "failed"


def test_superseded_attempt_commits_nothing(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 10))
    recorder.commit(make_snapshot(10))
    recorder.finish()
    after, their_recorder = start_attempt(run, dead=1)
    recorder.log_steps(make_block(11, 20))
    recorder.commit(make_snapshot(20))
    with pytest.raises(SupersededError, match="taken for dead"):
        recorder.finish()
    recorder.write_exit("failed", RuntimeError("x"), 20)
    stop_attempt(attempt, recorder)
    assert [entry.kind for entry in read_entries(run.journal)] == ["claim", "commit", "claim"]
    their_recorder.log_steps(make_block(11, 20))
    their_recorder.commit(make_snapshot(20, end=True))
    their_recorder.finish()
    stop_attempt(after, their_recorder)
    assert read_steps(run) == list(range(1, 21))


def test_interrupt_after_a_commit(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 10))
    recorder.commit(make_snapshot(10))
    recorder.write_exit("interrupted", None, 10)
    stop_attempt(attempt, recorder)
    assert read_run_status(run).status == "interrupted"
    assert probe_lease(run) == "free"
    assert run.read_summary()["status"] == "interrupted"


def test_completing_an_end_writes_only_what_is_missing(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 150))
    recorder.commit(make_snapshot(150, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    before = run.storage.read("result.json")
    for path in ("result.json", "run.json", "metrics/steps/000001.parquet"):
        run.storage.delete(path)
    assert not run.has_result()
    again = acquire_lease(run, driver="e", metadata={})
    assert again.resume_checkpoint is not None
    assert again.resume_checkpoint.is_final
    finish_ended_run(again)
    assert run.storage.read("result.json") == before
    assert read_steps(run) == list(range(1, 151))
    assert run.has_result()
    assert read_run_status(run).status == "finished"
    assert len(read_entries(run.journal)) == 3, "a claim, and no second end"


def test_columns_are_fixed_at_creation(tmp_path: Path) -> None:
    columns = MetricSchema(steps={"grad_norm": "float64"})
    run = create_run(str(tmp_path), columns=columns.to_json())
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 5, grad_norm=2.0))
    recorder.commit(make_snapshot(5, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    assert ds.dataset(tmp_path / "run" / "metrics" / "steps").to_table()["grad_norm"].to_pylist() == [2.0] * 5


def test_readers_of_s3_see_a_consistent_log(s3_url: str) -> None:
    import fsspec

    run = create_run(s3_url)
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 150))
    recorder.log_evaluation(make_evaluation(150))
    recorder.commit(make_snapshot(150, best=150))
    recorder.finish()
    stop_attempt(attempt, recorder)
    attempt, recorder = start_attempt(run)
    assert attempt.resume_checkpoint is not None
    assert torch.equal(attempt.resume_checkpoint.load_weights()["0.weight"], torch.full((3, 4), 150.0))
    recorder.log_steps(make_block(151, 220))
    recorder.commit(make_snapshot(220, best=150, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    table = ds.dataset(run.url.removeprefix("s3://") + "/metrics/steps", filesystem=fs).to_table()
    assert table["step"].to_pylist() == list(range(1, 221))
    assert run.has_result()


def test_training_thread_hands_over_in_microseconds(run: Run) -> None:
    attempt, recorder = start_attempt(run)
    rows = [make_block(first, first + 99) for first in range(1, 20_000, 100)]
    took_s = []
    for one in rows:
        began = time.perf_counter()
        recorder.log_steps(one)
        recorder.can_save_now()
        recorder.raise_if_failed()
        took_s.append(time.perf_counter() - began)
    assert np.median(took_s) < 1e-4, "most of them, for other processes may interrupt some"
    recorder.commit(make_snapshot(20_000, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    assert np.array_equal(read_steps(run), np.arange(1, 20_001))
