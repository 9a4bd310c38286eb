"""`show` and `runs` for running, stalled, interrupted, failed and finished runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pipeline.cli.terminal import format_age, format_run_status, format_runs
from pipeline.commands.show import runs
from pipeline.config import JobConfig
from pipeline.config.files import dump_job
from pipeline.config.files.yaml_io import YamlDumper
from pipeline.errors import WorkerLostError
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.lease.heartbeat import read_heartbeat
from pipeline.runs.run import Run
from pipeline.runs.status import read_run_status
from pipeline.storage import Storage
from tests.cli.command_line import RunCommand
from tests.process_kill.run_assertions import wait_for
from tests.runs.factories import create_run, make_block, make_snapshot

METADATA = {"host": "node-7", "world_size": 2, "device": "cpu"}


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    """An attempt at step 57, with a checkpoint at step 20."""
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    attempt = acquire_lease(create_run(str(tmp_path / "runs")), driver="d", metadata=METADATA)
    recorder = AsyncRunWriter(attempt, keep=2)
    recorder.log_steps(make_block(1, 20))
    recorder.commit(make_snapshot(20, best=20))
    recorder.finish()
    attempt.update_heartbeat(57, 0.5)
    wait_for(lambda: read_run_status(attempt.run).latest_step == 57, 60, "a heartbeat")
    yield attempt
    recorder.close()
    attempt.close()


def show_lines(attempt: Attempt, later_s: float = 0) -> list[str]:
    """Return the lines of `show` at `later_s` seconds after the last heartbeat, however long the test takes."""
    beat = read_heartbeat(attempt.run.storage, attempt.number)[1]
    assert beat is not None
    return format_run_status(
        read_run_status(attempt.run, now_s=datetime.fromisoformat(beat.time).timestamp() + later_s)
    )


def write_exit(attempt: Attempt, status: Literal["interrupted", "failed"], error: Exception | None) -> None:
    recorder = AsyncRunWriter(attempt, keep=2)
    recorder.write_exit(status, error, 57)
    recorder.close()


def test_show_reports_steps_beyond_the_last_commit(attempt: Attempt) -> None:
    first, where, saved, *_ = show_lines(attempt)
    assert first == "run: running at step 57 of 1000, seen 0 s ago"
    assert where.startswith("  runs on   node-7 (2 workers, cpu), since 20")
    assert saved == "  saved     step 20, epoch 1"


def test_show_reports_a_stalled_run_with_advice(attempt: Attempt) -> None:
    first, where, _saved, next_step, *_ = show_lines(attempt, later_s=250)
    assert first == "run: stalled at step 57 of 1000, no heartbeat for 4 min"
    assert where.startswith("  ran on    node-7")
    assert next_step == "  next      the same command resumes from step 20"


def test_show_reports_the_failure_reason(attempt: Attempt) -> None:
    write_exit(attempt, "failed", WorkerLostError("worker 1 died"))
    first, error, _where, next_step, *_ = show_lines(attempt)
    assert first == "run: failed at step 20 of 1000, epoch 1"
    assert error == "  error     worker 1 died"
    assert next_step == "  next      the same command resumes from step 20"


def test_runs_lists_an_interrupted_run(attempt: Attempt, trainyard: RunCommand) -> None:
    write_exit(attempt, "interrupted", None)
    assert show_lines(attempt)[0] == "run: interrupted at step 20 of 1000, epoch 1"
    storage = attempt.run.root_url
    listed = trainyard("runs", "--storage", storage, "--json").json["runs"][0]
    assert (listed["status"], listed["step"], listed["where"]["host"]) == ("interrupted", 20, "node-7")
    header, row = trainyard("runs", "--storage", storage).stdout.splitlines()
    assert header.split() == ["RUN", "STATUS", "SEEN", "STEP", "BEST", "LATEST"]
    assert re.fullmatch(r"run +interrupted +\d+ s +20/1000 .*", row)


def make_job_tree(**changes: Any) -> dict[str, Any]:
    """Return the content of a job file."""
    return {"name": "sweep", "data": {"source": "disc"}, "train": {"phases": [{"steps": 3, "lr": 0.5}]}, **changes}


def create_run_of(storage: str, name: str, job: dict[str, Any], **metadata: Any) -> None:
    """Create a run of a job, without any attempt."""
    run = Run(Storage.open(storage), name)
    assert run.create(
        dump_job(JobConfig.model_validate(job)), {"total_steps": 3, "cell_steps": 3, "fingerprint": "f" * 64} | metadata
    )


def phases_of(*lrs: float) -> dict[str, Any]:
    return {"phases": [{"steps": 3, "lr": lr} for lr in lrs]}


def user_function_source(args: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"source": {"call": "a:b", "args": args}}}


def differences_by_run(storage: str) -> dict[str, Mapping[str, Any]]:
    return {run.status.run: run.differs for run in runs(storage)[1]}


def test_runs_of_a_job_are_distinguished_by_their_differences(tmp_path: Path, trainyard: RunCommand) -> None:
    storage = str(tmp_path)
    create_run_of(storage, "sweep-b", make_job_tree())
    create_run_of(storage, "sweep-a", make_job_tree(train=phases_of(0.1)), max_steps=2)
    create_run_of(storage, "other-1", make_job_tree(name="other", seed=7))
    assert list(differences_by_run(storage).values()) == [
        {"train.phases.0.lr": 0.5, "max_steps": None},
        {"train.phases.0.lr": 0.1, "max_steps": 2},
        {},
    ], "the oldest first; a job with one run has no differences"
    listed = trainyard("runs", "--storage", storage, "--json").json["runs"]
    assert [(run["run"], run["job"], run["differs"]) for run in listed] == [
        ("sweep-b", "sweep", {"train.phases.0.lr": 0.5, "max_steps": None}),
        ("sweep-a", "sweep", {"train.phases.0.lr": 0.1, "max_steps": 2}),
        ("other-1", "other", {}),
    ]
    assert listed[0]["born"] < listed[1]["born"] < listed[2]["born"]
    header, first, second, third = trainyard("runs", "--storage", storage).stdout.splitlines()
    assert "DIFFERS" in header
    assert "lr=0.5 max_steps=null" in first
    assert "lr=0.1 max_steps=2" in second
    assert "=" not in third


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({}, {"seed": 2}, {"seed.all": 1}),
        ({"model": {"hidden": [4, 8]}}, {"model": {"hidden": [4]}}, {"model.hidden.1": 8}),
        ({"train": phases_of(1, 2)}, {"train": phases_of(1, 3)}, {"train.phases.1.lr": 2.0}),
        ({"metrics": ["a:b"]}, {}, {"metrics.0": "a:b"}),
        (user_function_source({"x: y": "1\n2", "on": "off"}), user_function_source({"x: y": "1\n3", "on": "off"}),
         {"data.source.args.x: y": "1\n2"}),
        ({"storage": "./here"}, {"storage": "./there"}, {}),
    ],
)  # fmt: skip
def test_differences_are_named_as_command_line_overrides(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], expected: dict[str, Any]
) -> None:
    create_run_of(str(tmp_path), "one", make_job_tree(**one))
    create_run_of(str(tmp_path), "two", make_job_tree(**other))
    differences = differences_by_run(str(tmp_path))
    assert {name: differences["one"][name] for name in expected} == expected
    assert {name for name in differences["one"] if differences["one"][name] is not None} <= {*expected, "metrics"}


@pytest.mark.parametrize("data", [{"source": "disc"}, {"source": {"call": "a:b"}}])
def test_keys_of_other_sources_in_a_job_of_an_earlier_version_are_no_difference(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    job = JobConfig.model_validate(make_job_tree(data=data)).to_dict()
    other_sources = {"root": "~/raw", "url": None, "features": ["*"], "missing": {"numeric": "median"}, "mode": "rgb"}
    earlier = {**job, "seed": {**job["seed"], "all": 2}, "data": {**job["data"], **other_sources}}
    create_run_of(str(tmp_path), "one", make_job_tree(data=data))
    run = Run(Storage.open(str(tmp_path)), "two")
    text = yaml.dump(earlier, Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=120)
    assert run.create(text, {"total_steps": 3, "cell_steps": 3, "fingerprint": "f" * 64})
    assert differences_by_run(str(tmp_path)) == {"one": {"seed.all": 1}, "two": {"seed.all": 2}}


def test_runs_of_one_job_with_other_models_and_sources_are_distinguished(tmp_path: Path) -> None:
    create_run_of(str(tmp_path), "one", make_job_tree())
    create_run_of(str(tmp_path), "two", make_job_tree(model={"kind": "cnn"}, data={"source": "mnist"}))
    differences = differences_by_run(str(tmp_path))
    assert (differences["one"]["model.kind"], differences["two"]["model.kind"]) == ("mlp", "cnn")
    assert (differences["one"]["data.source"], differences["two"]["data.source"]) == ("disc", "mnist")
    assert (differences["one"]["data.root"], differences["two"]["data.root"]) == (None, "~/.cache/trainyard")


def test_runs_on_other_data_are_distinguished_by_digest(tmp_path: Path) -> None:
    create_run_of(str(tmp_path), "one", make_job_tree())
    create_run_of(str(tmp_path), "two", make_job_tree(), fingerprint="0123456789ab")
    assert differences_by_run(str(tmp_path)) == {"one": {"fingerprint": "ffffffff"}, "two": {"fingerprint": "01234567"}}


def test_differences_are_kept_on_a_narrow_terminal(tmp_path: Path) -> None:
    for number in range(3):
        optimizer = {"kind": "sgd" if number else "adamw", "weight_decay": number / 7}
        create_run_of(
            str(tmp_path),
            f"sweep-{number:08x}",
            make_job_tree(seed=number, train={**phases_of(0.5), "optimizer": optimizer}),
        )
    url, listed, _ = runs(str(tmp_path))
    header, first, second, _ = format_runs(url, listed, 80)
    assert max(len(header), len(first), len(second)) <= 80
    assert header.split() == ["RUN", "STATUS", "STEP", "BEST", "DIFFERS"], (
        "first it drops the columns that `show` has too"
    )
    assert first.endswith("seed=0 optimizer=adamw weight_decay=0")
    assert second.endswith("seed=1 optimizer=sgd weight_decay=0.1429")
    assert all(len(row) <= 40 and row.startswith(("RUN", "sweep-")) for row in format_runs(url, listed, 40))
    assert format_runs(url, listed)[0].split()[-1] == "LATEST", "without a terminal no column is dropped"


def test_show_reports_a_run_that_never_started(tmp_path: Path) -> None:
    run = create_run(str(tmp_path))
    created_s = datetime.fromisoformat(run.created_at()).timestamp()
    assert format_run_status(read_run_status(run, now_s=created_s))[0] == "run: running at step 0 of 1000, seen 0 s ago"
    assert format_run_status(read_run_status(run, now_s=4e9))[:2] == [
        "run: interrupted at step 0 of 1000, epoch 0",
        "  next      the same command starts from the beginning",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s ago"), (119, "119 s ago"), (125, "2 min ago"), (7300, "2 h ago"), (200_000, "2 days ago")],
)
def test_age_is_formatted_in_a_suitable_unit(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
