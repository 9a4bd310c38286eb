"""No name leads out of storage: neither one that a user gives, nor one in a stored document, nor a link."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from pipeline.config import validate_name
from pipeline.config.files import build_job
from pipeline.errors import InputError, StorageError
from pipeline.runs.journal.entries import Claim, parse_entry
from pipeline.runs.lease.process_lock import delete_stale_lock, is_held
from pipeline.runs.run import Run, open_run
from pipeline.runs.serialization import with_digest
from pipeline.storage import Storage
from tests.cli.command_line import RunCommand
from tests.security.corruption import ExampleRuns, quick_and_slow

CopyRun = Callable[[str], Path]

path_pieces = st.sampled_from(
    [
        "..", ".", "/", "\\", "\x00", "%2e%2e", "%2f", "\uff0e\uff0e", "\u2024\u2024", "\u202e", "\n", "~", "-", "a",
        "run",        "etc", "passwd", "file://", "s3://", "::", "models", ":", "*", "$HOME", "|", " ",
    ]
)  # fmt: skip
hostile_names = st.lists(path_pieces, min_size=1, max_size=6).map("".join) | st.text(max_size=20)


@settings(deadline=None)
@given(hostile_names)
def test_name_is_a_storage_folder_or_rejected(name: str) -> None:
    try:
        validate_name(name)
    except ValueError:
        with pytest.raises(StorageError):
            Run(Storage.open("/nowhere/runs"), name)
        with pytest.raises(InputError):
            build_job({"name": name}, "test")
        return
    assert os.path.normpath(os.path.join("/nowhere/runs", name)) == f"/nowhere/runs/{name}"
    assert name.isascii()
    assert not name.startswith((".", "-"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(hostile_names)
def test_path_stays_in_its_folder_or_is_rejected(tmp_path: Path, path: str) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    with suppress(InputError):
        Storage.open(str(inside)).replace(path, b"x")
    assert not outside.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


@settings(deadline=None)
@given(hostile_names, st.sampled_from(["checkpoint", "kept", "best"]))
def test_names_in_a_commit_are_valid_or_rejected(name: str, where: str) -> None:
    best = {"metric": "val/loss", "step": 1, "value": 1.0, "checkpoint": name if where == "best" else "step-1"}
    tree = {
        "kind": "commit",
        "number": 1,
        "nonce": "a",
        "time": "2026-11-21T08:00:00+00:00",
        "attempt": 1,
        "checkpoint": name if where == "checkpoint" else "step-1",
        "step": 1,
        "epoch": 1,
        "end": False,
        "kept": [["step-1", name if where == "kept" else None]],
        "best": best,
        "metrics": {},
        "patience": None,
    }
    try:
        parse_entry(with_digest(tree), 1)
    except ValueError:
        return
    assert name == "" or validate_name(name) == name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(hostile_names)
def test_hostile_lock_path_in_a_claim_is_ignored(tmp_path: Path, path: str) -> None:
    """A claim names the lock file of its process. No other file is opened or deleted."""
    from pipeline.runs.lease.process_lock import read_boot_id

    other_file = tmp_path / "other"
    other_file.write_text("mine")
    for lock in (path, str(other_file), f"{tmp_path}/{path}", f"{tmp_path}/trainyard-ab.lock/../other"):
        claim = Claim(
            number=1, nonce="a", time="2026-11-21T08:00:00+00:00", attempt=1, boot=read_boot_id(), lock=lock, facts={}
        )
        assert is_held(claim) is None
        delete_stale_lock(claim)
    assert other_file.read_text() == "mine"


def test_lock_that_is_a_pipe_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.runs.lease import process_lock

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.mkfifo(tmp_path / "trainyard-ab.lock")
    claim = Claim(
        number=1,
        nonce="a",
        time="",
        attempt=1,
        boot=process_lock.read_boot_id(),
        lock=f"{tmp_path}/trainyard-ab.lock",
        facts={},
    )
    assert is_held(claim) is not True


def test_hostile_names_on_the_command_line_are_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, tmp_path: Path
) -> None:
    for name in ("../x", "/x", "a/b", "%2e%2e", "x\u202e", "models", ".x", "a..b", "x" * 200):
        result = trainyard("train", str(example_runs.job), "--storage", "runs", "--name", name)
        assert (result.exit_code, result.stderr.count("error:")) == (2, 1), name
        assert "--name" in result.stderr
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError):
        open_run("..", str(tmp_path))


@pytest.mark.parametrize(
    "link",
    quick_and_slow(
        [".tmp", "checkpoints", "heartbeats", "journal", "metrics", "job.yaml", "run.json"], ".tmp", "checkpoints"
    ),
)
def test_symlinks_in_storage_are_not_followed(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, tmp_path: Path, link: str
) -> None:
    """Such as `.tmp`, all of whose files a resume deletes."""
    run = copy_run("interrupted")
    home = tmp_path / "home"
    home.mkdir()
    for name in ("manifest.json", "thesis.txt"):
        (home / name).write_text("mine")
    path, target = run / link, home / "thesis.txt" if "." in link[1:] else home
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(target)
    result = trainyard("train", str(example_runs.job), "--storage", "runs")
    assert result.exit_code == 2, result.stderr
    assert "symbolic link" in result.stderr
    assert sorted(path.name for path in home.iterdir()) == ["manifest.json", "thesis.txt"]
    assert (home / "thesis.txt").read_text() == "mine"
    assert trainyard("runs").exit_code == 0


def test_symlinked_checkpoint_target_is_not_deleted(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, tmp_path: Path
) -> None:
    run = copy_run("interrupted")
    home = tmp_path / "home"
    home.mkdir()
    (home / "manifest.json").write_text("mine")
    (run / "checkpoints" / "step-000000001-a0001").symlink_to(home)
    result = trainyard("train", str(example_runs.job), "--storage", "runs")
    assert "symbolic link" in result.stderr
    assert (home / "manifest.json").read_text() == "mine"


def test_pipe_in_storage_does_not_hang(trainyard: RunCommand, copy_run: CopyRun) -> None:
    run = copy_run("finished")
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")
    assert "not a regular file" in trainyard("show", run.name).stderr


def test_storage_root_may_be_a_symlink(example_runs: ExampleRuns, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(example_runs.finished.parent)
    assert open_run(example_runs.finished.name, str(tmp_path / "link")).exists()
