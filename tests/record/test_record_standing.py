"""How a run stands, told from storage alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.errors import WorkerLostError
from pipeline.record.attempt import claim
from pipeline.record.recorder import Recorder
from pipeline.record.run import Run
from pipeline.record.standing import STARTING_S, standing
from tests.record.record_parts import block, born, snapshot

SHAPE = {"run", "url", "status", "step", "epoch", "attempts", "best", "metrics", "error"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return born(str(tmp_path))


def test_born_and_never_claimed(run: Run) -> None:
    assert standing(run).status == "running", "somebody is about to claim it"
    status = standing(run, time.time() + STARTING_S + 5)
    assert (status.status, status.step, status.attempts, status.started) == ("interrupted", 0, 0, None)


def test_a_heart_that_beats_is_running_and_one_that_does_not_is_stalled(run: Run) -> None:
    attempt = claim(run, driver="d", facts={})
    assert standing(run).status == "running"
    attempt.close()
    assert standing(run, time.time() + 25).status == "running"
    assert standing(run, time.time() + 35).status == "stalled"


def test_a_claim_without_a_heartbeat_yet(run: Run) -> None:
    claim(run, driver="d", facts={}).close()
    run.storage.delete("heartbeats/0001.json")
    assert standing(run).status == "running"
    assert standing(run).heartbeat is None
    assert standing(run, time.time() + 35).status == "stalled"


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_leave_says_why(run: Run, status: str) -> None:
    attempt = claim(run, driver="d", facts={})
    recorder = Recorder(attempt, keep=2)
    error = WorkerLostError("worker 1 died") if status == "failed" else None
    recorder.leave(status, error, 0)  # type: ignore[arg-type]
    recorder.close()
    attempt.close()
    status_found = standing(run)
    assert status_found.status == status
    assert status_found.error == ({"type": "WorkerLostError", "message": "worker 1 died"} if error else None)
    claim(run, driver="d", facts={}).close()
    assert standing(run).status == "running"
    assert standing(run).error is None
    assert standing(run).attempts == 2


def test_one_shape_for_show_and_run_json(run: Run) -> None:
    attempt = claim(run, driver="d", facts={"host": "h", "torch": "2.15"})
    recorder = Recorder(attempt, keep=2)
    recorder.steps(block(1, 20))
    recorder.commit(snapshot(20, best=20))
    recorder.finish()
    shown = standing(run).to_json()
    view = run.view()
    assert shown.keys() >= SHAPE
    assert view.keys() >= SHAPE
    assert {key: shown[key] for key in SHAPE} == {key: view[key] for key in SHAPE}
    assert json.loads(json.dumps(shown)) == shown
    assert shown["best"]["metric"] == "val/loss"
    assert shown["metrics"] == {"val/loss": 0.5}
    assert shown["total_steps"] == 1000
    assert view["history"] == [
        {
            "attempt": 1,
            "claimed": shown["started"],
            "committed": 20,
            "outcome": None,
            "host": "h",
            "torch": "2.15",
        }
    ]
    assert view["birth"]["cell_steps"] == 100
    recorder.close()
    attempt.close()


def test_a_view_that_cannot_be_read_is_as_good_as_none(run: Run) -> None:
    assert run.view() == {}
    for text in (b"{", b"[]", b"\xff"):
        run.storage.replace("run.json", text)
        assert run.view() == {}
        assert not run.has_result()
