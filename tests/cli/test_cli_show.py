"""What `show` and `runs` say of a run that goes on, stands still, was interrupted, failed, or is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.errors import WorkerLostError
from pipeline.record.attempt import Attempt, claim
from pipeline.record.recorder import Recorder
from pipeline.record.standing import standing
from pipeline.terminal import ago, result_lines, runs_lines
from tests.cli.cli_calls import Trainyard
from tests.faults.fault_evidence import wait_for
from tests.record.record_parts import block, born, snapshot

FACTS = {"host": "node-7", "world_size": 2, "device": "cpu"}


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    """An attempt at step 57, of which 20 steps are saved."""
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    attempt = claim(born(str(tmp_path / "runs")), driver="d", facts=FACTS)
    recorder = Recorder(attempt, keep=2)
    recorder.steps(block(1, 20))
    recorder.commit(snapshot(20, best=20))
    recorder.finish()
    attempt.beat(57, 0.5)
    wait_for(lambda: standing(attempt.run).reached == 57, 30, "a heartbeat")
    yield attempt
    recorder.close()
    attempt.close()


def lines(attempt: Attempt, **later: Any) -> list[str]:
    return result_lines(standing(attempt.run, **later))


def leave(attempt: Attempt, status: Literal["interrupted", "failed"], error: Exception | None) -> None:
    recorder = Recorder(attempt, keep=2)
    recorder.leave(status, error, 57)
    recorder.close()


def test_a_run_that_goes_on_is_ahead_of_what_is_saved(attempt: Attempt) -> None:
    head, where, saved, *_ = lines(attempt)
    assert head == "run: running at step 57 of 1000, seen 0 s ago"
    assert where.startswith("  runs on   node-7 (2 workers, cpu), since 20")
    assert saved == "  saved     step 20, epoch 1"


def test_one_that_stands_still_says_for_how_long_and_what_helps(attempt: Attempt) -> None:
    head, where, _saved, after, *_ = lines(attempt, now=time.time() + 250)
    assert head == "run: stalled at step 57 of 1000, no sign of life for 4 min"
    assert where.startswith("  ran on    node-7")
    assert after == "  next      the same command goes on from step 20"


def test_one_that_failed_says_why(attempt: Attempt) -> None:
    leave(attempt, "failed", WorkerLostError("worker 1 died"))
    head, error, _where, after, *_ = lines(attempt)
    assert head == "run: failed at step 20 of 1000, epoch 1"
    assert error == "  error     worker 1 died"
    assert after == "  next      the same command goes on from step 20"


def test_one_that_was_interrupted_is_listed_as_that(attempt: Attempt, trainyard: Trainyard) -> None:
    leave(attempt, "interrupted", None)
    assert lines(attempt)[0] == "run: interrupted at step 20 of 1000, epoch 1"
    storage = attempt.run.root_url
    found = trainyard("runs", "--storage", storage, "--json").json["runs"][0]
    assert (found["status"], found["step"], found["where"]["host"]) == ("interrupted", 20, "node-7")
    header, row = runs_lines(storage, [standing(attempt.run)])
    assert header.split() == ["RUN", "STATUS", "SEEN", "STEP", "BEST", "LATEST"]
    assert row.split()[:6] == ["run", "interrupted", "0", "s", "ago", "20/1000"]


def test_one_that_never_began(tmp_path: Path) -> None:
    run = born(str(tmp_path))
    assert result_lines(standing(run))[0] == "run: running at step 0 of 1000, seen 0 s ago"
    assert result_lines(standing(run, now=4e9))[:2] == [
        "run: interrupted at step 0 of 1000, epoch 0",
        "  next      the same command begins anew",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s ago"), (119, "119 s ago"), (125, "2 min ago"), (7300, "2 h ago"), (200_000, "2 days ago")],
)
def test_ages_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert ago(seconds) == words
