"""How a run stands, told from storage alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.errors import WorkerLostError
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.lease.attempt import acquire_lease
from pipeline.runs.run import Run
from pipeline.runs.status import STARTUP_GRACE_S, read_run_status
from tests.runs.parts import create_run, make_block, make_snapshot

STATUS_KEYS = {"run", "url", "status", "step", "epoch", "attempts", "best", "metrics", "error"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(str(tmp_path))


def test_created_and_never_claimed(run: Run) -> None:
    assert read_run_status(run).status == "running", "somebody is about to claim it"
    status = read_run_status(run, time.time() + STARTUP_GRACE_S + 5)
    assert (status.status, status.step, status.attempts, status.started) == ("interrupted", 0, 0, None)


def test_fresh_heartbeat_is_running_and_stale_is_stalled(run: Run) -> None:
    attempt = acquire_lease(run, driver="d", metadata={})
    assert read_run_status(run).status == "running"
    attempt.close()
    assert read_run_status(run, time.time() + 25).status == "running"
    assert read_run_status(run, time.time() + 35).status == "stalled"


def test_claim_without_a_heartbeat(run: Run) -> None:
    acquire_lease(run, driver="d", metadata={}).close()
    run.storage.delete("heartbeats/0001.json")
    assert read_run_status(run).status == "running"
    assert read_run_status(run).heartbeat is None
    assert read_run_status(run, time.time() + 35).status == "stalled"


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_exit_entry_gives_the_reason(run: Run, status: str) -> None:
    attempt = acquire_lease(run, driver="d", metadata={})
    recorder = AsyncRunWriter(attempt, keep=2)
    error = WorkerLostError("worker 1 died") if status == "failed" else None
    recorder.write_exit(status, error, 0)  # type: ignore[arg-type]
    recorder.close()
    attempt.close()
    status_found = read_run_status(run)
    assert status_found.status == status
    assert status_found.error == ({"type": "WorkerLostError", "message": "worker 1 died"} if error else None)
    acquire_lease(run, driver="d", metadata={}).close()
    assert read_run_status(run).status == "running"
    assert read_run_status(run).error is None
    assert read_run_status(run).attempts == 2


def test_show_and_run_json_have_the_same_keys(run: Run) -> None:
    attempt = acquire_lease(run, driver="d", metadata={"host": "h", "torch": "2.15"})
    recorder = AsyncRunWriter(attempt, keep=2)
    recorder.log_steps(make_block(1, 20))
    recorder.commit(make_snapshot(20, best=20))
    recorder.finish()
    shown = read_run_status(run).to_json()
    view = run.read_summary()
    assert shown.keys() >= STATUS_KEYS
    assert view.keys() >= STATUS_KEYS
    assert {key: shown[key] for key in STATUS_KEYS} == {key: view[key] for key in STATUS_KEYS}
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


def test_unreadable_summary_is_ignored(run: Run) -> None:
    assert run.read_summary() == {}
    for text in (b"{", b"[]", b"\xff"):
        run.storage.replace("run.json", text)
        assert run.read_summary() == {}
        assert not run.has_result()
