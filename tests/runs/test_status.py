"""The status of a run, derived from storage alone."""

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
from tests.runs.factories import SEGMENT_STEPS, create_run, make_block, make_snapshot

STATUS_KEYS = {"run", "url", "status", "step", "epoch", "attempts", "best", "metrics", "error"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(str(tmp_path))


def test_created_and_never_claimed(run: Run) -> None:
    assert read_run_status(run).status == "running", "it is about to be claimed"
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
    writer = AsyncRunWriter(attempt, keep=2)
    error = WorkerLostError("worker 1 failed") if status == "failed" else None
    writer.write_exit(status, error, 0)  # type: ignore[arg-type]
    writer.close()
    attempt.close()
    run_status = read_run_status(run)
    assert run_status.status == status
    assert run_status.error == ({"type": "WorkerLostError", "message": "worker 1 failed"} if error else None)
    acquire_lease(run, driver="d", metadata={}).close()
    assert read_run_status(run).status == "running"
    assert read_run_status(run).error is None
    assert read_run_status(run).attempts == 2


def test_show_and_run_json_have_the_same_keys(run: Run) -> None:
    attempt = acquire_lease(run, driver="d", metadata={"host": "h", "torch": "2.15"})
    writer = AsyncRunWriter(attempt, keep=2)
    writer.log_steps(make_block(1, 20))
    writer.commit(make_snapshot(20, best=20))
    writer.finish()
    shown = read_run_status(run).to_json()
    summary = run.read_summary()
    assert shown.keys() >= STATUS_KEYS
    assert summary.keys() >= STATUS_KEYS
    assert {key: shown[key] for key in STATUS_KEYS} == {key: summary[key] for key in STATUS_KEYS}
    assert json.loads(json.dumps(shown)) == shown
    assert shown["best"]["metric"] == "val/loss"
    assert shown["metrics"] == {"val/loss": 0.5}
    assert shown["total_steps"] == 1000
    assert summary["history"] == [
        {
            "attempt": 1,
            "claimed": shown["started"],
            "committed": 20,
            "outcome": None,
            "host": "h",
            "torch": "2.15",
        }
    ]
    assert summary["birth"]["cell_steps"] == SEGMENT_STEPS
    writer.close()
    attempt.close()


def test_unreadable_summary_is_ignored(run: Run) -> None:
    assert run.read_summary() == {}
    for text in (b"{", b"[]", b"\xff"):
        run.storage.replace("run.json", text)
        assert run.read_summary() == {}
        assert not run.has_result()
