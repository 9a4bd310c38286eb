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
from pipeline.record.attempt import Attempt, claim, peek
from pipeline.record.cells import Columns
from pipeline.record.entries import Commit, Leave
from pipeline.record.journal import Journal
from pipeline.record.recorder import MOST_ROWS, REST, Recorder, complete
from pipeline.record.run import Run
from pipeline.record.standing import standing
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.record.record_parts import block, born, evaluation, read_entries, snapshot


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return born(str(tmp_path))


def begin(run: Run, *, keep: int = 2, dead: int | None = None) -> tuple[Attempt, Recorder]:
    attempt = claim(run, driver="d", facts={}, dead=dead)
    return attempt, Recorder(attempt, keep=keep)


def stop(attempt: Attempt, recorder: Recorder) -> None:
    recorder.close()
    attempt.close()


def steps_in(run: Run) -> list[int]:
    folder = run.storage.local_path
    assert folder is not None
    steps: list[int] = ds.dataset(folder / "metrics" / "steps").to_table()["step"].to_pylist()
    return steps


class Gate(LocalBackend):
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
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated_run(gate: Gate, tmp_path: Path) -> Run:
    born(str(tmp_path))
    return Run(Storage(gate, str(tmp_path), str(tmp_path)), "run")


def test_a_run_from_birth_to_end(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.evaluation(evaluation(0, epoch=0))
    recorder.steps(block(1, 60))
    recorder.steps(block(61, 150))
    recorder.evaluation(evaluation(150))
    recorder.commit(snapshot(150, best=150))
    recorder.steps(block(151, 250))
    recorder.evaluation(evaluation(250))
    recorder.commit(snapshot(250, best=250, end=True, epoch=2, patience=0))
    recorder.finish()
    recorder.check()
    stop(attempt, recorder)
    assert steps_in(run) == list(range(1, 251))
    assert run.storage.list("metrics/steps") == run.storage.list("metrics/evals")
    result = json.loads(run.storage.read("result.json"))
    assert result["step"] == 250
    assert result["chosen"] == result["last"] == "step-000000250-a0001"
    assert result["metrics"] == {"val/loss": 0.5}
    assert run.view()["status"] == "finished"
    assert peek(run) == "finished"
    end = read_entries(run.journal)[-1]
    assert isinstance(end, Commit)
    assert end.kept == (("step-000000250-a0001",) * 2, ("step-000000150-a0001",) * 2)
    assert end.patience == 0


def test_training_does_not_wait_for_a_commit(gate: Gate, gated_run: Run) -> None:
    attempt, recorder = begin(gated_run)
    recorder.finish()
    gate.open.clear()
    recorder.steps(block(1, 10))
    assert recorder.may_commit()
    recorder.commit(snapshot(10))  # who waited for it would wait for ever: nothing opens the gate yet
    recorder.steps(block(11, 20))
    recorder.check()
    assert not recorder.may_commit()
    opened = threading.Timer(0.2, gate.open.set)
    opened.start()
    recorder.commit(snapshot(20))  # waits for the one that is under way
    assert gate.open.is_set()
    recorder.finish()
    assert not recorder.may_commit(), "a commit of a tenth of a second rests for ten"
    stop(attempt, recorder)
    opened.join()
    assert standing(gated_run).step == 20


def test_a_commit_rests_in_proportion_to_its_cost(gate: Gate, gated_run: Run) -> None:
    attempt, recorder = begin(gated_run)
    recorder.finish()
    recorder.steps(block(1, 10))
    gate.open.clear()
    threading.Timer(0.3, gate.open.set).start()  # so that the rest is long, whatever else this machine does
    began = time.monotonic()
    recorder.commit(snapshot(10))
    recorder.finish()
    cost = time.monotonic() - began
    assert not recorder.may_commit()
    assert 0 < recorder._rest_until - time.monotonic() <= REST * cost
    stop(attempt, recorder)


def test_many_rows_make_a_commit_necessary(tmp_path: Path) -> None:
    attempt, recorder = begin(born(str(tmp_path), cell_steps=100_000))
    recorder.finish()  # what it begins with
    recorder.steps(block(1, MOST_ROWS - 1))
    assert not recorder.must_commit()
    recorder.steps(block(MOST_ROWS, MOST_ROWS))
    assert recorder.must_commit()
    recorder.commit(snapshot(MOST_ROWS))
    assert not recorder.must_commit()
    recorder.finish()
    stop(attempt, recorder)


def test_a_resume_goes_on_where_the_commit_was(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 150))
    recorder.evaluation(evaluation(120))
    recorder.commit(snapshot(150, best=120, best_weights={"w": torch.full((1,), 120.0)}))
    recorder.steps(block(151, 180))
    recorder.finish()
    stop(attempt, recorder)
    attempt, recorder = begin(run)
    assert attempt.base is not None
    assert (attempt.base.step, attempt.base.position, attempt.highest_step) == (150, {"step": 150}, 150)
    assert attempt.base.best is not None
    assert attempt.base.best.checkpoint == "step-000000120-a0001"
    recorder.steps(block(151, 220))
    recorder.commit(snapshot(220, best=120, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert steps_in(run) == list(range(1, 221))
    assert json.loads(run.storage.read("result.json"))["chosen"] == "step-000000120-a0001"
    assert run.storage.list("checkpoints") == [f"step-000000{name}" for name in ("120-a0001", "150-a0001", "220-a0002")]


def test_a_best_that_is_nowhere_is_refused(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 10))
    recorder.commit(snapshot(10, best=5))
    with pytest.raises(ValueError, match="best step 5"):
        recorder.finish()
    stop(attempt, recorder)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_committed(run: Run, loss: float) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 10))
    recorder.commit(snapshot(10))
    bad = block(11, 20)
    bad["loss"][4:] = loss
    recorder.steps(bad)
    recorder.commit(snapshot(20))
    with pytest.raises(NotFiniteError, match=rf"loss is {loss} at step 15 \(learning rate 0.1\)") as caught:
        recorder.finish()
    assert "model.init_from: run@last begins it at the last checkpoint, of step 10" in caught.value.fix
    recorder.leave("failed", caught.value, 20)
    stop(attempt, recorder)
    last = read_entries(Journal(run.storage))[-1]  # as another process reads it
    assert isinstance(last, Leave)
    assert last.row is not None
    assert (last.row["step"], last.row["loss"]) == (15, str(loss))
    assert last.error == {"type": "NotFiniteError", "message": caught.value.what}
    status = standing(run)
    assert (status.status, status.step) == ("failed", 10)


def test_the_bad_row_stands_in_the_leave_though_the_loop_found_it(run: Run) -> None:
    attempt, recorder = begin(run)
    bad = block(1, 5)
    bad["loss"][2] = math.nan
    recorder.steps(bad)
    recorder.leave("failed", NotFiniteError("the loss is nan"), 5)
    stop(attempt, recorder)
    last = read_entries(run.journal)[-1]
    assert isinstance(last, Leave)
    assert last.row is not None
    assert last.row["step"] == 3


def test_an_evaluation_that_is_not_finite_is_told_with_its_split(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 5))
    recorder.evaluation(evaluation(5, loss=math.nan))
    recorder.commit(snapshot(5))
    with pytest.raises(NotFiniteError, match="the val loss is nan at step 5"):
        recorder.finish()
    stop(attempt, recorder)


@pytest.mark.parametrize("where", ["weights", "best_weights"])
def test_weights_that_are_not_finite_are_never_committed(run: Run, where: str) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 10))
    bad = {"0.weight": torch.tensor([1.0, math.nan]), "0.count": torch.tensor(3)}
    recorder.commit(snapshot(10, best=5 if where == "best_weights" else None, **{where: bad}))
    with pytest.raises(NotFiniteError, match=r"weights 0\.weight are not finite at step 10"):
        recorder.finish()
    stop(attempt, recorder)
    assert run.storage.list("checkpoints") == []


def test_a_passing_fault_loses_nothing(gate: Gate, gated_run: Run) -> None:
    attempt, recorder = begin(gated_run)
    recorder.finish()
    gate.away = True
    recorder.steps(block(1, 120))
    recorder.commit(snapshot(120))
    time.sleep(0.3)
    recorder.check()
    gate.away = False
    recorder.finish()
    stop(attempt, recorder)
    assert standing(gated_run).step == 120


def test_lost_storage_is_told_and_the_leave_given_up(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "0.5")
    born(str(tmp_path))
    run = Run(Storage(gate, str(tmp_path), str(tmp_path)), "run")
    attempt, recorder = begin(run)
    recorder.finish()
    gate.away = True
    recorder.steps(block(1, 10))
    recorder.commit(snapshot(10))
    with pytest.raises(StorageLostError) as caught:
        recorder.finish()
    with pytest.raises(StorageLostError):
        recorder.commit(snapshot(10))
    recorder.leave("failed", caught.value, 10)
    gate.away = False
    recorder.leave("failed", caught.value, 10)
    stop(attempt, recorder)
    assert standing(run).status == "failed"


def test_who_was_overtaken_commits_nothing_more(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 10))
    recorder.commit(snapshot(10))
    recorder.finish()
    after, their_recorder = begin(run, dead=1)
    recorder.steps(block(11, 20))
    recorder.commit(snapshot(20))
    with pytest.raises(SupersededError, match="taken for dead"):
        recorder.finish()
    recorder.leave("failed", RuntimeError("x"), 20)
    stop(attempt, recorder)
    assert [entry.kind for entry in read_entries(run.journal)] == ["claim", "commit", "claim"]
    their_recorder.steps(block(11, 20))
    their_recorder.commit(snapshot(20, end=True))
    their_recorder.finish()
    stop(after, their_recorder)
    assert steps_in(run) == list(range(1, 21))


def test_interrupted_after_a_commit(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 10))
    recorder.commit(snapshot(10))
    recorder.leave("interrupted", None, 10)
    stop(attempt, recorder)
    assert standing(run).status == "interrupted"
    assert peek(run) == "free"
    assert run.view()["status"] == "interrupted"


def test_completing_an_end_does_only_what_is_missing(run: Run) -> None:
    attempt, recorder = begin(run)
    recorder.steps(block(1, 150))
    recorder.commit(snapshot(150, end=True))
    recorder.finish()
    stop(attempt, recorder)
    before = run.storage.read("result.json")
    for path in ("result.json", "run.json", "metrics/steps/000001.parquet"):
        run.storage.delete(path)
    assert not run.has_result()
    again = claim(run, driver="e", facts={})
    assert again.base is not None
    assert again.base.end
    complete(again)
    assert run.storage.read("result.json") == before
    assert steps_in(run) == list(range(1, 151))
    assert run.has_result()
    assert standing(run).status == "finished"
    assert len(read_entries(run.journal)) == 3, "a claim, and no second end"


def test_columns_of_the_run_come_from_its_birth(tmp_path: Path) -> None:
    columns = Columns(steps={"grad_norm": "float64"})
    run = born(str(tmp_path), columns=columns.to_json())
    attempt, recorder = begin(run)
    recorder.steps(block(1, 5, grad_norm=2.0))
    recorder.commit(snapshot(5, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert ds.dataset(tmp_path / "run" / "metrics" / "steps").to_table()["grad_norm"].to_pylist() == [2.0] * 5


def test_on_s3_with_memory_of_what_a_reader_sees(s3_url: str) -> None:
    import fsspec

    run = born(s3_url)
    attempt, recorder = begin(run)
    recorder.steps(block(1, 150))
    recorder.evaluation(evaluation(150))
    recorder.commit(snapshot(150, best=150))
    recorder.finish()
    stop(attempt, recorder)
    attempt, recorder = begin(run)
    assert attempt.base is not None
    assert torch.equal(attempt.base.weights()["0.weight"], torch.full((3, 4), 150.0))
    recorder.steps(block(151, 220))
    recorder.commit(snapshot(220, best=150, end=True))
    recorder.finish()
    stop(attempt, recorder)
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    table = ds.dataset(run.url.removeprefix("s3://") + "/metrics/steps", filesystem=fs).to_table()
    assert table["step"].to_pylist() == list(range(1, 221))
    assert run.has_result()


def test_the_training_thread_hands_over_in_microseconds(run: Run) -> None:
    attempt, recorder = begin(run)
    rows = [block(first, first + 99) for first in range(1, 20_000, 100)]
    took_s = []
    for one in rows:
        began = time.perf_counter()
        recorder.steps(one)
        recorder.may_commit()
        recorder.check()
        took_s.append(time.perf_counter() - began)
    assert np.median(took_s) < 1e-4, "most of them, for other processes may interrupt some"
    recorder.commit(snapshot(20_000, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert np.array_equal(steps_in(run), np.arange(1, 20_001))
