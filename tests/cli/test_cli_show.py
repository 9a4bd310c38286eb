"""What `show` and `runs` say of a run that goes on, stands still, was interrupted, failed, or is done."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pipeline.errors import WorkerLostError
from pipeline.job import Job
from pipeline.job_file import dump_job
from pipeline.job_file.yaml12 import Dumper
from pipeline.record.attempt import Attempt, claim
from pipeline.record.heartbeat import read_beat
from pipeline.record.recorder import Recorder
from pipeline.record.run import Run
from pipeline.record.standing import standing
from pipeline.storage import Storage
from pipeline.terminal import ago, result_lines, runs_lines
from pipeline.verbs.show import runs
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
    wait_for(lambda: standing(attempt.run).reached == 57, 60, "a heartbeat")
    yield attempt
    recorder.close()
    attempt.close()


def lines(attempt: Attempt, later_s: float = 0) -> list[str]:
    """As seen so long after the heartbeat, whatever the time is that this test takes."""
    beat = read_beat(attempt.run.storage, attempt.number)[1]
    assert beat is not None
    return result_lines(standing(attempt.run, now=datetime.fromisoformat(beat.time).timestamp() + later_s))


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
    head, where, _saved, after, *_ = lines(attempt, later_s=250)
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
    header, row = trainyard("runs", "--storage", storage).out.splitlines()
    assert header.split() == ["RUN", "STATUS", "SEEN", "STEP", "BEST", "LATEST"]
    assert re.fullmatch(r"run +interrupted +\d+ s +20/1000 .*", row)


def tree(**changes: Any) -> dict[str, Any]:
    """A job, as a job file has it."""
    return {"name": "sweep", "data": {"source": "disc"}, "train": {"phases": [{"steps": 3, "lr": 0.5}]}, **changes}


def make(storage: str, name: str, job: dict[str, Any], **facts: Any) -> None:
    """A run of a job, born and no more."""
    run = Run(Storage.open(storage), name)
    assert run.birth(
        dump_job(Job.model_validate(job)), {"total_steps": 3, "cell_steps": 3, "fingerprint": "f" * 64} | facts
    )


def rates(*lrs: float) -> dict[str, Any]:
    return {"phases": [{"steps": 3, "lr": lr} for lr in lrs]}


def call(args: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"source": {"call": "a:b", "args": args}}}


def differing(storage: str) -> dict[str, Mapping[str, Any]]:
    return {run.standing.run: run.differs for run in runs(storage)[1]}


def test_runs_of_a_job_are_told_apart_by_what_differs(tmp_path: Path, trainyard: Trainyard) -> None:
    storage = str(tmp_path)
    make(storage, "sweep-b", tree())
    make(storage, "sweep-a", tree(train=rates(0.1)), max_steps=2)
    make(storage, "other-1", tree(name="other", seed=7))
    assert list(differing(storage).values()) == [
        {"train.phases.0.lr": 0.5, "max_steps": None},
        {"train.phases.0.lr": 0.1, "max_steps": 2},
        {},
    ], "the oldest first; a job of one run has nothing to be told from"
    listed = trainyard("runs", "--storage", storage, "--json").json["runs"]
    assert [(run["run"], run["job"], run["differs"]) for run in listed] == [
        ("sweep-b", "sweep", {"train.phases.0.lr": 0.5, "max_steps": None}),
        ("sweep-a", "sweep", {"train.phases.0.lr": 0.1, "max_steps": 2}),
        ("other-1", "other", {}),
    ]
    assert listed[0]["born"] < listed[1]["born"] < listed[2]["born"]
    header, first, second, third = trainyard("runs", "--storage", storage).out.splitlines()
    assert "DIFFERS" in header
    assert "lr=0.5 max_steps=null" in first
    assert "lr=0.1 max_steps=2" in second
    assert "=" not in third


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({}, {"seed": 2}, {"seed.all": 1}),
        ({"model": {"hidden": [4, 8]}}, {"model": {"hidden": [4]}}, {"model.hidden.1": 8}),
        ({"train": rates(1, 2)}, {"train": rates(1, 3)}, {"train.phases.1.lr": 2.0}),
        ({"metrics": ["a:b"]}, {}, {"metrics.0": "a:b"}),
        (call({"x: y": "1\n2", "on": "off"}), call({"x: y": "1\n3", "on": "off"}), {"data.source.args.x: y": "1\n2"}),
        ({"storage": "./here"}, {"storage": "./there"}, {}),
    ],
)  # fmt: skip
def test_what_differs_is_named_as_on_the_command_line(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], expected: dict[str, Any]
) -> None:
    make(str(tmp_path), "one", tree(**one))
    make(str(tmp_path), "two", tree(**other))
    found = differing(str(tmp_path))
    assert {name: found["one"][name] for name in expected} == expected
    assert {name for name in found["one"] if found["one"][name] is not None} <= {*expected, "metrics"}


@pytest.mark.parametrize("data", [{"source": "disc"}, {"source": {"call": "a:b"}}])
def test_keys_of_other_sources_in_a_job_of_an_earlier_version_are_no_difference(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    job = Job.model_validate(tree(data=data)).resolved()
    of_others = {"root": "~/raw", "url": None, "features": ["*"], "missing": {"numeric": "median"}, "mode": "rgb"}
    earlier = {**job, "seed": {**job["seed"], "all": 2}, "data": {**job["data"], **of_others}}
    make(str(tmp_path), "one", tree(data=data))
    run = Run(Storage.open(str(tmp_path)), "two")
    text = yaml.dump(earlier, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120)
    assert run.birth(text, {"total_steps": 3, "cell_steps": 3, "fingerprint": "f" * 64})
    assert differing(str(tmp_path)) == {"one": {"seed.all": 1}, "two": {"seed.all": 2}}


def test_runs_of_one_job_with_other_models_and_sources_are_told_apart(tmp_path: Path) -> None:
    make(str(tmp_path), "one", tree())
    make(str(tmp_path), "two", tree(model={"kind": "cnn"}, data={"source": "mnist"}))
    found = differing(str(tmp_path))
    assert (found["one"]["model.kind"], found["two"]["model.kind"]) == ("mlp", "cnn")
    assert (found["one"]["data.source"], found["two"]["data.source"]) == ("disc", "mnist")
    assert (found["one"]["data.root"], found["two"]["data.root"]) == (None, "~/.cache/trainyard")


def test_runs_of_one_job_on_other_data_are_told_apart_by_its_digest(tmp_path: Path) -> None:
    make(str(tmp_path), "one", tree())
    make(str(tmp_path), "two", tree(), fingerprint="0123456789ab")
    assert differing(str(tmp_path)) == {"one": {"fingerprint": "ffffffff"}, "two": {"fingerprint": "01234567"}}


def test_on_a_narrow_terminal_what_differs_stays(tmp_path: Path) -> None:
    for number in range(3):
        optimizer = {"kind": "sgd" if number else "adamw", "weight_decay": number / 7}
        make(str(tmp_path), f"sweep-{number:08x}", tree(seed=number, train={**rates(0.5), "optimizer": optimizer}))
    url, listed, _ = runs(str(tmp_path))
    header, first, second, _ = runs_lines(url, listed, 80)
    assert max(len(header), len(first), len(second)) <= 80
    assert header.split() == ["RUN", "STATUS", "STEP", "BEST", "DIFFERS"], "the columns that `show` has too go first"
    assert first.endswith("seed=0 optimizer=adamw weight_decay=0")
    assert second.endswith("seed=1 optimizer=sgd weight_decay=0.1429")
    assert all(len(row) <= 40 and row.startswith(("RUN", "sweep-")) for row in runs_lines(url, listed, 40))
    assert runs_lines(url, listed)[0].split()[-1] == "LATEST", "in a file or a pipe all is there"


def test_one_that_never_began(tmp_path: Path) -> None:
    run = born(str(tmp_path))
    born_at = datetime.fromisoformat(run.born()).timestamp()
    assert result_lines(standing(run, now=born_at))[0] == "run: running at step 0 of 1000, seen 0 s ago"
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
