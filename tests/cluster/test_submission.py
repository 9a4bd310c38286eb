"""Submitted jobs on a cluster with token authentication: one command to a finished run, and recovery from kills of the
client and of the processes on the cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from pipeline import train
from pipeline.cluster.submission.client import connect
from pipeline.cluster.submission.job_status import tail_until_done
from pipeline.cluster.submission.packaging import ENTRYPOINT_MODULE
from tests.cli.conftest import CompletedCommand, trainyard
from tests.cluster.submission_cluster import TOKEN, JobsCluster, TcpProxy, add_node, list_command_lines, start_cluster
from tests.process_kill.run_assertions import check_checkpoints, final_state, read_entries, wait_for

__all__ = ["trainyard"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and of what it imports

RunCommand = Callable[..., CompletedCommand]

USER_MODEL = """
import os
import time

import torch


class Slow(torch.nn.Module):
    def __init__(self, pause_s=0.0, needs=None):
        super().__init__()
        assert needs is None or os.environ[needs]
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.pause_s = pause_s

    def forward(self, inputs):
        if self.training:
            time.sleep(self.pause_s)
        return self.layers(inputs)
"""
JOB: dict[str, Any] = {
    "name": "sent",
    "data": {"source": "disc", "normalize": "scalar", "splits": {"val": 0.2}},
    "model": {"kind": "slow_nets:Slow", "args": {}},
    "train": {"batch_size": 100, "phases": [{"epochs": 10, "lr": 0.3}]},
    "checkpoint": {"every_steps": 5, "keep": 2},
}
"""80 steps."""


@pytest.fixture(autouse=True)
def _with_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def cluster_options(jobs_cluster: JobsCluster) -> tuple[str, str]:
    return "--address", jobs_cluster.url


def write_job_files(folder: Path, pause_s: float = 0.0, **changes: Any) -> str:
    (folder / "slow_nets.py").write_text(USER_MODEL)
    job = {**JOB, "model": {"kind": "slow_nets:Slow", "args": {"pause_s": pause_s}}, **changes}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return str(folder / "job.yaml")


def count_commits(storage: Path) -> int:
    return sum(entry["kind"] == "commit" for run in storage.glob("*/journal") for entry in read_entries(run.parent))


def last_committed_step(storage: Path) -> int:
    steps = [
        entry["step"] for run in storage.glob("*/journal") for entry in read_entries(run.parent) if "step" in entry
    ]
    return max(steps, default=0)


class ProcessScanner(threading.Thread):
    """Searches the command lines of all processes of this machine for texts that must not be in them."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(daemon=True)
        self.texts, self.matches, self.stopped = texts, set[str](), threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.2):
            lines = list_command_lines().values()
            self.matches |= {line[:80] for line in lines for text in self.texts if text in line}


def test_submitted_job_ships_code_and_secrets_and_finishes(
    trainyard: RunCommand, cluster_options: tuple[str, str], jobs_cluster: JobsCluster, s3_url: str, tmp_path: Path
) -> None:
    """Starts of workers: 1. The storage is S3, and only the job has its credentials."""
    secrets = {"AWS_SECRET_ACCESS_KEY": "planted-1f6e9c-key", "TRACKER_LOGIN": "planted-77ab02-login"}
    (tmp_path / "secrets.env").write_text("".join(f"{name}={value}\n" for name, value in secrets.items()))
    model = {"kind": "slow_nets:Slow", "args": {"needs": "TRACKER_LOGIN"}}
    job = write_job_files(tmp_path, model=model, scale={"workers": 1, "device": "cpu"})
    os.environ["TRACKER_LOGIN"] = "the value of the client"
    scanner = ProcessScanner([*secrets.values(), TOKEN])
    scanner.start()
    try:
        names = ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
        options = ["--env-file", "secrets.env", *(word for name in names for word in ("--env", name))]
        completed = trainyard("submit", job, *cluster_options, "--storage", s3_url, *options, "--json", "--name", "one")
        shown = trainyard("show", "one", "--storage", s3_url, "--json")
    finally:
        del os.environ["TRACKER_LOGIN"]
        scanner.stopped.set()
    assert completed.exit_code == 0, completed.stderr
    assert completed.json["status"] == "finished"
    assert (completed.json["run"], completed.json["step"], completed.json["exit_code"]) == ("one", 80, 0)
    assert re.fullmatch(r"sent-[0-9a-f]{8}-1", completed.json["job"])
    assert f"job {completed.json['job']}\n" in completed.stderr
    assert "1 file of its code" in completed.stderr
    assert "epoch 10" in completed.stderr
    assert "\x1e" not in completed.stderr
    assert shown.json["status"] == "finished"
    assert trainyard("status", "one", *cluster_options, "--json").json["job"] == completed.json["job"]
    assert "training to step 80" in trainyard("logs", "one", *cluster_options).stdout

    scanner.join()
    assert scanner.matches == set()
    cluster = connect(jobs_cluster.url)
    infos = [json.dumps(info.dict(), default=str) for info in cluster.list_jobs()]
    assert len(infos) >= 2, "the job and a probe"
    leaks = [info for info in infos for secret in secrets.values() if secret in info]
    leaks += [str(file) for secret in secrets.values() for file in files_containing(jobs_cluster.folder, secret)]
    import s3fs

    store = s3fs.S3FileSystem(use_listings_cache=False)
    files = {path: store.cat_file(path) for path in store.find(s3_url)}
    assert any(path.endswith("run.json") for path in files)
    leaks += [path for path, content in files.items() for secret in secrets.values() if secret.encode() in content]
    assert leaks == []
    assert not [info for info in infos if TOKEN in info]


def files_containing(folder: Path, text: str) -> list[Path]:
    """Return the files that contain a text: logs, unpacked packages, and whatever else a cluster writes."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return [file for file in files if text.encode() in file.read_bytes()]


def test_run_continues_after_the_client_is_killed_until_stopped(
    trainyard: RunCommand, cluster_options: tuple[str, str], jobs_cluster: JobsCluster, tmp_path: Path
) -> None:
    """Also, a client that follows the log loses nothing if its connection breaks. Training is in the entry point's
    process, without workers."""
    storage = tmp_path / "runs"
    long_training = {**JOB["train"], "phases": [{"epochs": 1000, "lr": 0.3}]}
    job = write_job_files(tmp_path, pause_s=0.2, name="killed-client", train=long_training)
    command = [sys.executable, "-m", "pipeline", "submit", job, *cluster_options, "--storage", str(storage)]
    client = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert client.stderr is not None
    stderr_lines = iter(client.stderr.readline, "")
    job_id = next(line.split()[1] for line in stderr_lines if line.startswith("job "))
    client.kill()
    client.communicate()
    before = last_committed_step(storage)
    wait_for(lambda: last_committed_step(storage) >= before + 5, 120, "a checkpoint after the client was killed")

    again = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--no-wait")
    assert (again.exit_code, again.stdout) == (0, f"{job_id}\n"), again.stderr
    assert "is running there: attached" in again.stderr

    proxy = TcpProxy(urlsplit(jobs_cluster.url).port or 0)
    lines, messages = list[str](), list[str]()
    client_by_proxy = connect(f"http://127.0.0.1:{proxy.port}")
    following = threading.Thread(target=lambda: tail_until_done(client_by_proxy, job_id, lines.append, messages.append))
    following.start()
    wait_for(lambda: any("epoch 1" in line for line in lines), 60, "a line from the job")
    proxy.disconnect(3.0)
    num_lines = len(lines)
    wait_for(lambda: len(lines) > num_lines, 60, "a line after the disconnection")
    assert any("trying again for 120 s" in message for message in messages)

    stopped = trainyard("stop", job_id, *cluster_options)
    assert stopped.exit_code == 0, stopped.stderr
    assert re.search(r"interrupted: stopped at step \d+ of 8000, and saved", stopped.stdout), stopped.stdout
    following.join(60)
    proxy.close()
    log = trainyard("logs", job_id, *cluster_options).stdout.splitlines()
    assert lines == log, "each line is shown once"
    status = trainyard("status", job_id, *cluster_options, "--json").json
    assert (status["status"], status["exit_code"]) == ("interrupted", 143)
    (run,) = (path.parent for path in storage.glob("*/job.yaml"))
    *_, commit, leave = read_entries(run)
    assert (commit["kind"], leave["kind"], leave["status"]) == ("commit", "leave", "interrupted")
    assert 0 < commit["step"] == leave["step"] < 8000
    check_checkpoints(run)
    assert trainyard("stop", job_id, *cluster_options).stderr == "the job has ended already\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resubmission_resumes_bit_identically_after_entrypoint_kill(
    trainyard: RunCommand, cluster_options: tuple[str, str], jobs_cluster: JobsCluster, tmp_path: Path
) -> None:
    """Starts of workers: 3. A `submit` that follows its job starts it again by itself. The reference is a run in this
    process."""
    storage = tmp_path / "runs"
    job = write_job_files(tmp_path, pause_s=0.2, name="killed-entry", scale={"workers": 1, "device": "cpu"})
    sent = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--no-wait", "--quiet")
    first = sent.stdout.strip()
    wait_for(lambda: count_commits(storage) >= 2, 180, "checkpoints")
    (entry,) = [pid for pid, line in list_command_lines().items() if ENTRYPOINT_MODULE in line and is_our_process(pid)]
    os.kill(entry, signal.SIGKILL)
    wait_for(
        lambda: trainyard("status", first, *cluster_options, "--json").json["status"] == "failed",
        60,
        "the failed status",
    )
    completed = trainyard("logs", first, *cluster_options, "--follow")
    assert completed.exit_code == 1
    assert "its entry point was killed by signal 9" in completed.stderr
    assert "the same submit resumes" in completed.stderr

    def kill_again() -> None:
        before = count_commits(storage)
        wait_for(lambda: count_commits(storage) > before, 240, "another checkpoint")
        kill_process(ENTRYPOINT_MODULE)

    killer = threading.Thread(target=kill_again)
    killer.start()
    again = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--json")
    killer.join()
    assert again.exit_code == 0, again.stderr
    assert "-2: its entry point was killed by signal 9; starting again (1 of 3)" in again.stderr
    assert again.json["job"] == first.removesuffix("-1") + "-3"
    (run,) = (path.parent for path in storage.glob("*/job.yaml"))
    reference = train(job, set={"scale.workers": 0}, storage=str(tmp_path / "reference"))
    assert final_state(run) == final_state(Path(reference.url))
    assert {entry["attempt"] for entry in read_entries(run)} == {1, 2, 3}


def test_submission_recovers_from_killed_ray_processes(
    trainyard: RunCommand, cluster_options: tuple[str, str], tmp_path: Path
) -> None:
    """The processes are those that start the probe, and then the job. Training is in the entry point's process, without
    workers."""
    storage = tmp_path / "runs"
    job = write_job_files(
        tmp_path, pause_s=0.1, name="lost", train={"batch_size": 100, "phases": [{"epochs": 5, "lr": 0.3}]}
    )

    others = list_our_processes("ray::JobSupervisor")  # of earlier jobs, which may not have ended yet

    def kill_each() -> None:
        kill_process("ray::JobSupervisor", exclude=others)
        wait_for(lambda: count_commits(storage) > 0, 240, "a checkpoint")
        kill_process("ray::JobSupervisor", exclude=others)

    killer = threading.Thread(target=kill_each)
    killer.start()
    completed = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--json")
    killer.join()
    assert completed.exit_code == 0, completed.stderr
    assert (completed.json["status"], completed.json["attempts"], completed.json["job"][-2:]) == ("finished", 2, "-2")
    failure = "Ray's process that started it was lost (its process was killed)"
    assert f"the probe was lost: {failure}; trying again" in completed.stderr
    assert f"-1: {failure}; starting again (1 of 3)" in completed.stderr
    first = trainyard("logs", f"{completed.json['job'][:-2]}-1", *cluster_options)
    status = trainyard("status", f"{completed.json['job'][:-2]}-1", *cluster_options)
    assert f"failed: {failure}" in status.stdout
    for text in ("common causes", "class_name", "connection error code"):
        assert text not in completed.stderr + completed.stdout + first.stdout + status.stdout
    (run,) = (path.parent for path in storage.glob("*/job.yaml"))
    reference = train(job, name=run.name, storage=str(tmp_path / "reference"))
    assert final_state(run) == final_state(Path(reference.url))


def kill_process(text: str, exclude: Collection[int] = ()) -> None:
    """Wait for processes of these clusters with `text` in their command line, except for some, and kill them."""
    wait_for(lambda: bool(set(list_our_processes(text)) - set(exclude)), 240, f"a process of {text}")
    for pid in set(list_our_processes(text)) - set(exclude):
        os.kill(pid, signal.SIGKILL)


def list_our_processes(text: str) -> list[int]:
    return [pid for pid, line in list_command_lines().items() if text in line and is_our_process(pid)]


def is_our_process(pid: int) -> bool:
    try:
        return TOKEN.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_job_may_finish_its_step(
    trainyard: RunCommand, cluster_options: tuple[str, str], tmp_path: Path
) -> None:
    """By default Ray kills a job that has not ended after 3 seconds."""
    job = write_job_files(tmp_path, pause_s=12.0, name="long-steps")
    storage = str(tmp_path / "runs")
    job_id = trainyard("submit", job, *cluster_options, "--storage", storage, "--no-wait", "--quiet").stdout.strip()
    wait_for(lambda: "epoch 0" in trainyard("logs", job_id, *cluster_options).stdout, 120, "the first step")
    stopped = trainyard("stop", job_id, *cluster_options, "--json")
    assert stopped.json["exit_code"] == 143, stopped.stderr
    assert trainyard("show", stopped.json["run"], "--storage", storage, "--json").json["step"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_submitted_job_recovers_from_a_killed_worker(
    trainyard: RunCommand, cluster_options: tuple[str, str], jobs_cluster: JobsCluster, tmp_path: Path
) -> None:
    """Starts of workers: 2. The client shows the failure, and the metrics are those of a run in this process."""
    storage = tmp_path / "runs"
    job = write_job_files(tmp_path, pause_s=0.2, name="killed-worker", scale={"workers": 1, "device": "cpu"})

    def kill() -> None:
        wait_for(lambda: count_commits(storage) >= 2, 180, "checkpoints")
        (run,) = (path.parent for path in storage.glob("*/job.yaml"))
        os.kill(next(entry for entry in read_entries(run) if entry["kind"] == "claim")["facts"]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    completed = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--json")
    killer.join()
    assert completed.exit_code == 0, completed.stderr
    assert re.search(r"starting again from step \d+", completed.stderr)
    local = train(job, set={"scale.workers": 0, "model.args.pause_s": 0}, storage=str(tmp_path / "local"))
    assert completed.json["metrics"] == pytest.approx(dict(local.metrics))
    assert completed.json["attempts"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_local_path_storage_is_rejected_on_two_nodes(trainyard: RunCommand, tmp_path: Path) -> None:
    with start_cluster() as cluster, add_node(cluster):
        job = write_job_files(tmp_path)
        completed = trainyard("submit", job, "--address", cluster.url, "--storage", str(tmp_path))
        assert completed.exit_code == 2
        assert "the cluster has 2 nodes" in completed.stderr
        assert "s3://" in completed.stderr
        shared = f"file://{tmp_path}/runs"  # both nodes have this folder: they are on one machine
        completed = trainyard("submit", job, "--address", cluster.url, "--storage", shared)
        assert completed.exit_code == 0, completed.stderr
