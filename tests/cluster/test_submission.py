"""Jobs on a cluster with token authentication: from one command to a finished run, through kills on either side."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
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

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, and those of what it imports

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
    """Looks at every process of this machine for words that must not stand there."""

    def __init__(self, words: list[str]) -> None:
        super().__init__(daemon=True)
        self.words, self.seen, self.over = words, set[str](), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            lines = list_command_lines().values()
            self.seen |= {line[:80] for line in lines for word in self.words if word in line}


def test_submitted_job_ships_code_and_secrets_and_finishes(
    trainyard: RunCommand, cluster_options: tuple[str, str], jobs_cluster: JobsCluster, s3_url: str, tmp_path: Path
) -> None:
    """On one worker, onto S3 whose credentials only the job has. Fits: 1."""
    planted = {"AWS_SECRET_ACCESS_KEY": "planted-1f6e9c-key", "TRACKER_LOGIN": "planted-77ab02-login"}
    (tmp_path / "secrets.env").write_text("".join(f"{name}={value}\n" for name, value in planted.items()))
    model = {"kind": "slow_nets:Slow", "args": {"needs": "TRACKER_LOGIN"}}
    job = write_job_files(tmp_path, model=model, scale={"workers": 1, "device": "cpu"})
    os.environ["TRACKER_LOGIN"] = "of the one who submits"
    eyes = ProcessScanner([*planted.values(), TOKEN])
    eyes.start()
    try:
        names = ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
        words = [word for name in names for word in ("--env", name)]
        handed = ("--env-file", "secrets.env", *words)
        ended = trainyard("submit", job, *cluster_options, "--storage", s3_url, *handed, "--json", "--name", "one")
        shown = trainyard("show", "one", "--storage", s3_url, "--json")
    finally:
        del os.environ["TRACKER_LOGIN"]
        eyes.over.set()
    assert ended.exit_code == 0, ended.stderr
    assert ended.json["status"] == "finished"
    assert (ended.json["run"], ended.json["step"], ended.json["exit_code"]) == ("one", 80, 0)
    assert re.fullmatch(r"sent-[0-9a-f]{8}-1", ended.json["job"])
    assert f"job {ended.json['job']}\n" in ended.stderr
    assert "1 file of its code" in ended.stderr
    assert "epoch 10" in ended.stderr
    assert "\x1e" not in ended.stderr
    assert shown.json["status"] == "finished"
    assert trainyard("status", "one", *cluster_options, "--json").json["job"] == ended.json["job"]
    assert "training to step 80" in trainyard("logs", "one", *cluster_options).stdout

    eyes.join()
    assert eyes.seen == set()
    cluster = connect(jobs_cluster.url)
    infos = [json.dumps(info.dict(), default=str) for info in cluster.list_jobs()]
    assert len(infos) >= 2, "the job and a probe"
    leaks = [info for info in infos for word in planted.values() if word in info]
    leaks += [str(file) for word in planted.values() for file in files_containing(jobs_cluster.folder, word)]
    import s3fs

    store = s3fs.S3FileSystem(use_listings_cache=False)
    kept = {path: store.cat_file(path) for path in store.find(s3_url)}
    assert any(path.endswith("run.json") for path in kept)
    leaks += [path for path, content in kept.items() for word in planted.values() if word.encode() in content]
    assert leaks == []
    assert not [info for info in infos if TOKEN in info]


def files_containing(folder: Path, word: str) -> list[Path]:
    """Files that hold a word: logs, unpacked packages, and whatever else a cluster writes."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return [file for file in files if word.encode() in file.read_bytes()]


def test_run_continues_after_the_client_is_killed_until_stopped(
    trainyard: RunCommand, cluster_options: tuple[str, str], jobs_cluster: JobsCluster, tmp_path: Path
) -> None:
    """And a wire that is cut costs a follower nothing. In the entry point itself: no start of workers."""
    storage = tmp_path / "runs"
    endless = {**JOB["train"], "phases": [{"epochs": 1000, "lr": 0.3}]}
    job = write_job_files(tmp_path, pause_s=0.2, name="killed-client", train=endless)
    command = [sys.executable, "-m", "pipeline", "submit", job, *cluster_options, "--storage", str(storage)]
    client = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert client.stderr is not None
    stderr_lines = iter(client.stderr.readline, "")
    job_id = next(line.split()[1] for line in stderr_lines if line.startswith("job "))
    client.kill()
    client.communicate()
    before = last_committed_step(storage)
    wait_for(lambda: last_committed_step(storage) >= before + 5, 120, "a checkpoint after the client's death")

    again = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--no-wait")
    assert (again.exit_code, again.stdout) == (0, f"{job_id}\n"), again.stderr
    assert "is running there: attached" in again.stderr

    wire = TcpProxy(urlsplit(jobs_cluster.url).port or 0)
    lines, words = list[str](), list[str]()
    far = connect(f"http://127.0.0.1:{wire.port}")
    following = threading.Thread(target=lambda: tail_until_done(far, job_id, lines.append, words.append))
    following.start()
    wait_for(lambda: any("epoch 1" in line for line in lines), 60, "a line from the job")
    wire.disconnect(3.0)
    seen = len(lines)
    wait_for(lambda: len(lines) > seen, 60, "a line after the cut")
    assert any("trying again for 120 s" in line for line in words)

    stopped = trainyard("stop", job_id, *cluster_options)
    assert stopped.exit_code == 0, stopped.stderr
    assert re.search(r"interrupted: stopped at step \d+ of 8000, and saved", stopped.stdout), stopped.stdout
    following.join(60)
    wire.close()
    log = trainyard("logs", job_id, *cluster_options).stdout.splitlines()
    assert lines == log, "each line once"
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
    """On one worker, against a run in this process; and one that waits goes on by itself. Fits: 3."""
    storage = tmp_path / "runs"
    job = write_job_files(tmp_path, pause_s=0.2, name="killed-entry", scale={"workers": 1, "device": "cpu"})
    sent = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--no-wait", "--quiet")
    first = sent.stdout.strip()
    wait_for(lambda: count_commits(storage) >= 2, 180, "checkpoints")
    (entry,) = [pid for pid, line in list_command_lines().items() if ENTRYPOINT_MODULE in line and is_our_process(pid)]
    os.kill(entry, signal.SIGKILL)
    wait_for(
        lambda: trainyard("status", first, *cluster_options, "--json").json["status"] == "failed", 60, "Ray to see it"
    )
    ended = trainyard("logs", first, *cluster_options, "--follow")
    assert ended.exit_code == 1
    assert "its entry point was killed by signal 9" in ended.stderr
    assert "the same submit resumes" in ended.stderr

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
    untouched = train(job, set={"scale.workers": 0}, storage=str(tmp_path / "untouched"))
    assert final_state(run) == final_state(Path(untouched.url))
    assert {entry["attempt"] for entry in read_entries(run)} == {1, 2, 3}


def test_submission_recovers_from_killed_ray_processes(
    trainyard: RunCommand, cluster_options: tuple[str, str], tmp_path: Path
) -> None:
    """Those that start the probe, and then the job. In the entry point itself: no start of workers."""
    storage = tmp_path / "runs"
    job = write_job_files(
        tmp_path, pause_s=0.1, name="lost", train={"batch_size": 100, "phases": [{"epochs": 5, "lr": 0.3}]}
    )

    others = list_our_processes("ray::JobSupervisor")  # of jobs before, which may still be ending

    def kill_each() -> None:
        kill_process("ray::JobSupervisor", but=others)
        wait_for(lambda: count_commits(storage) > 0, 240, "a checkpoint")
        kill_process("ray::JobSupervisor", but=others)

    killer = threading.Thread(target=kill_each)
    killer.start()
    ended = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--json")
    killer.join()
    assert ended.exit_code == 0, ended.stderr
    assert (ended.json["status"], ended.json["attempts"], ended.json["job"][-2:]) == ("finished", 2, "-2")
    lost = "the process that Ray ran it from was lost (its process was ended from outside)"
    assert f"a first small job was lost: {lost}; trying again" in ended.stderr
    assert f"-1: {lost}; starting again (1 of 3)" in ended.stderr
    first = trainyard("logs", f"{ended.json['job'][:-2]}-1", *cluster_options)
    status = trainyard("status", f"{ended.json['job'][:-2]}-1", *cluster_options)
    assert f"failed: {lost}" in status.stdout
    for word in ("common causes", "class_name", "connection error code"):
        assert word not in ended.stderr + ended.stdout + first.stdout + status.stdout
    (run,) = (path.parent for path in storage.glob("*/job.yaml"))
    untouched = train(job, name=run.name, storage=str(tmp_path / "untouched"))
    assert final_state(run) == final_state(Path(untouched.url))


def kill_process(word: str, but: Collection[int] = ()) -> None:
    """Kill a process of these clusters by a word of its command line, as soon as there is one besides some others."""
    wait_for(lambda: bool(set(list_our_processes(word)) - set(but)), 240, f"a process of {word}")
    for pid in set(list_our_processes(word)) - set(but):
        os.kill(pid, signal.SIGKILL)


def list_our_processes(word: str) -> list[int]:
    return [pid for pid, line in list_command_lines().items() if word in line and is_our_process(pid)]


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
    """Left to itself, Ray kills what has not gone after 3 seconds."""
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
    """The follower reads of it, and the end is as if nothing had been. Fits: 2, and 1 in this process."""
    storage = tmp_path / "runs"
    job = write_job_files(tmp_path, pause_s=0.2, name="killed-worker", scale={"workers": 1, "device": "cpu"})
    begun: dict[str, float] = {}

    def kill() -> None:
        wait_for(lambda: count_commits(storage) >= 2, 180, "checkpoints")
        (run,) = (path.parent for path in storage.glob("*/job.yaml"))
        os.kill(next(entry for entry in read_entries(run) if entry["kind"] == "claim")["facts"]["pid"], signal.SIGKILL)
        begun["killed"] = time.monotonic()

    killer = threading.Thread(target=kill)
    killer.start()
    ended = trainyard("submit", job, *cluster_options, "--storage", str(storage), "--json")
    killer.join()
    assert ended.exit_code == 0, ended.stderr
    assert re.search(r"starting again from step \d+", ended.stderr)
    local = train(job, set={"scale.workers": 0, "model.args.pause_s": 0}, storage=str(tmp_path / "here"))
    assert ended.json["metrics"] == pytest.approx(dict(local.metrics))
    assert ended.json["attempts"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_local_path_storage_is_rejected_on_two_nodes(trainyard: RunCommand, tmp_path: Path) -> None:
    with start_cluster() as cluster, add_node(cluster):
        job = write_job_files(tmp_path)
        ended = trainyard("submit", job, "--address", cluster.url, "--storage", str(tmp_path))
        assert ended.exit_code == 2
        assert "the cluster has 2 nodes" in ended.stderr
        assert "s3://" in ended.stderr
        mounted = f"file://{tmp_path}/runs"  # the same folder for both nodes: they are on one machine
        ended = trainyard("submit", job, "--address", cluster.url, "--storage", mounted)
        assert ended.exit_code == 0, ended.stderr
