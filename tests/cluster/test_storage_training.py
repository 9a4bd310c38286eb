"""Two workers train on MNIST with S3 storage while one request in twenty fails: bit-identical to a run without
faults."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml

from pipeline import train
from pipeline.storage import credentials
from pipeline.testing import inject_faults
from tests.process_kill.run_assertions import check_checkpoints, final_state, find_run

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and of what it imports

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
FAULT_RATES = "error=0.02 lost=0.015 truncated=0.01 slow_down=0.005"
FORWARDED_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")

needs_mnist = pytest.mark.skipif(
    not (DATA / "MNIST").is_dir(), reason="MNIST's files are not in ../shared/data beside the repository"
)


def make_job(**changes: Any) -> dict[str, Any]:
    """Return the tutorial's job on two workers, as a tree."""
    tree: dict[str, Any] = yaml.safe_load((REPOSITORY / "jobs" / "mnist.yaml").read_text())
    tree["data"]["root"] = str(DATA)
    return {**tree, "scale": {"workers": 2, "device": "cpu", "threads": 1}, **changes}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start_reference_run(folder: Path) -> subprocess.Popen[bytes]:
    """Train the same job on two plain processes, with storage in a local folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.fault_tolerance.reference_run", str(folder / "reference"), str(port)]
    return subprocess.Popen(command, cwd=folder, env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"})


def train_with_storage_faults(folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Counter[str]]:
    """Train on S3 with faults. Returns a local copy of the finished run, and the number of faults by kind."""
    log = folder / "faults.log"
    with inject_faults(f"seed=7 {FAULT_RATES} log={log}"):
        monkeypatch.setattr(credentials, "_forwarded_names", {*FORWARDED_VARIABLES, "TRAINYARD_FAULTS"})
        outcome = train("job.yaml", storage=s3_url.replace("s3://", "faulty://s3/"))
    assert outcome.status == "finished"
    s3 = s3fs.S3FileSystem()
    s3.get(s3_url, str(folder / "on-s3"), recursive=True)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({line[0] for line in lines}) > 1, "faults in the workers too"
    return find_run(folder / "on-s3"), Counter(line[3] for line in lines)


def check_matches_reference(folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    start_time = time.monotonic()
    with start_reference_run(folder) as reference:
        run, faults = train_with_storage_faults(folder, s3_url, monkeypatch)
    assert reference.returncode == 0
    expected, actual = final_state(find_run(folder / "reference")), final_state(run)
    assert actual.keys() == expected.keys()
    for key in expected:
        assert actual[key] == expected[key], key
    assert [row["step"] for row in actual["steps"]] == list(range(1, len(actual["steps"]) + 1))
    check_checkpoints(run)
    print(f"\n{len(actual['steps'])} steps, {time.monotonic() - start_time:.0f} s, faults: {dict(faults)}")
    return faults


@needs_mnist
def test_training_with_storage_faults(cluster: Any, folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"batch_size": 1000, "optimizer": {"kind": "sgd", "momentum": 0.9}, "phases": [{"epochs": 2, "lr": 0.1}]}
    tree = make_job(train=settings, checkpoint={"every_steps": 4, "keep": 2}, evaluate={"every_steps": 24})
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    faults = check_matches_reference(folder, s3_url, monkeypatch)
    assert faults.total() >= 3


@needs_mnist
@pytest.mark.slow
def test_full_training_with_storage_faults(
    cluster: Any, folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tutorial's job: 4,800 steps."""
    (folder / "job.yaml").write_text(yaml.safe_dump(make_job(checkpoint={"every_steps": 100, "keep": 3})))
    faults = check_matches_reference(folder, s3_url, monkeypatch)
    assert faults.total() >= 10
