"""Training on a real Ray cluster: the same losses, recovery from real kills, errors, signals and metrics.

A start of workers takes 10 to 20 seconds, so the tests share one cluster and, where they can, runs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.prometheus import COUNTERS, GAUGES
from pipeline.commands.show import show
from pipeline.commands.train import train
from pipeline.errors import InputError, JobError, NotFiniteError, OutOfMemoryError, RepeatedFailureError
from pipeline.events import (
    EvaluationLogged,
    Event,
    EventHandler,
    RunOpened,
    StepsLogged,
    TrainingStarted,
    WarningMessage,
    ignore_event,
)
from pipeline.inference.load import load
from pipeline.runs.status import RunStatus
from tests.cluster.ray_processes import find_actor_processes
from tests.process_kill.run_assertions import RunReader, final_state, read_entries, read_log, wait_for

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and of what it imports

EVENTS = list[Event]
COMMAND = str(Path(sys.executable).with_name("trainyard"))

USER_MODEL = """
import os
import time

import numpy as np
import torch


class Slow(torch.nn.Module):
    '''Waits a little in each step, so that there is time to kill it. After 50 steps `failing_rank` raises an error, or
    allocates more memory than there is.'''

    def __init__(self, pause_s=0.0, failing_rank=None, fails_by_memory=False):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.pause_s, self.calls = pause_s, 0
        self.failing_rank, self.fails_by_memory = failing_rank, fails_by_memory

    def forward(self, inputs):
        if self.training:
            time.sleep(self.pause_s)
            self.calls += 1
            is_failing = self.failing_rank is not None and self.failing_rank == torch.distributed.get_rank()
            if is_failing and self.calls > 50:
                if self.fails_by_memory:
                    torch.empty(1 << 50)
                raise RuntimeError("no such luck")
        return self.layers(inputs)


def two_numbers():
    inputs = np.random.default_rng(0).normal(size=(500, 2))
    return inputs, 9 * inputs


def other_data_on_workers():
    import ray

    rng = np.random.default_rng(int(ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None))
    inputs = rng.uniform(size=(300, 2)).astype(np.float32)
    return inputs, (inputs[:, 0] > inputs[:, 1]).astype(np.int64)
"""

JOB = """
schema: 1
name: workers
data: {source: disc, normalize: scalar, splits: {by: random, val: 0.2}}
model: {kind: "cluster_code:Slow", args: {pause_s: 0.01}}
train:
  batch_size: 31
  optimizer: {kind: sgd, momentum: 0.9}
  phases: [{epochs: 8, lr: 0.3}, {epochs: 3, lr: 0.1}]
  precision: fp64
evaluate: {every_steps: 25}
checkpoint: {every_steps: 10, keep: 2}
scale: {workers: 2, device: cpu}
"""


ENSEMBLE_JOB = """
schema: 1
name: ensemble
data: {source: disc, normalize: scalar, splits: {by: random, val: 0.2}}
model: {kind: mlp, hidden: [256, 128], dropout: 0.1, ensemble: 8, numeric_embedding: periodic}
train:
  batch_size: 64
  optimizer: {kind: adamw, weight_decay: 0.01, decay: weights}
  phases: [{epochs: 90, lr: 0.002, schedule: cosine}]
evaluate: {every_steps: 25}
checkpoint: {every_steps: 10, keep: 2}
scale: {workers: 2, device: cpu}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "cluster_code.py").write_text(USER_MODEL)
    (folder / "job.yaml").write_text(JOB)
    (folder / "ensemble.yaml").write_text(ENSEMBLE_JOB)
    return folder


@pytest.fixture(autouse=True)
def _working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(scope="session")
def reference_run(cluster: Any, folder: Path) -> Callable[[int], Path]:
    """Returns the uninterrupted run of this job on a number of workers."""
    runs: dict[int, Path] = {}

    def get_run(workers: int) -> Path:
        if workers not in runs:
            runs[workers] = Path(train_job(folder / f"reference-{workers}", workers).url)
        return runs[workers]

    return get_run


def train_job(storage: Path, workers: int, on_event: EventHandler = ignore_event, job: str = "job.yaml") -> RunStatus:
    return train(job, set={"scale.workers": workers}, storage=str(storage), on_event=on_event)


def read_losses(run: Path) -> list[float]:
    return list(read_log(run, "steps")["loss"].to_pylist())


def read_claims(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_entries(run) if entry["kind"] == "claim"]


def list_journals(storage: Path) -> list[Path]:
    return [path.parent for path in storage.glob("*/journal")]


def count_commits(storage: Path, attempt: int = 1) -> int:
    return sum(
        entry["kind"] == "commit" and entry["attempt"] == attempt
        for run in list_journals(storage)
        for entry in read_entries(run)
    )


class MetricsScraper(threading.Thread):
    """Reads the node's Prometheus endpoint until `stopped` is set."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.text, self.stopped = url, "", threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.3):
            try:
                with urllib.request.urlopen(self.url, timeout=5) as reply:
                    self.text += reply.read().decode()
            except OSError:
                continue

    def values(self, run: str, name: str, split: str = "", rank: int = 0) -> list[float]:
        """Return the values of a metric in the order in which they were read."""
        lines = [line for line in self.text.splitlines() if line.startswith(f"ray_{name}{{") and f'run="{run}"' in line]
        matching = [line for line in lines if f'split="{split}"' in line and f'rank="{rank}"' in line]
        return [float(line.rpartition(" ")[2]) for line in matching]

    def names(self, run: str) -> set[str]:
        """Return the names of all metrics of a run."""
        return {line.partition("{")[0] for line in self.text.splitlines() if f'run="{run}"' in line}


def test_two_workers_match_one_process_and_export_metrics(cluster: Any, folder: Path) -> None:
    """Starts of workers: 1. The run is also the reference of the next tests."""
    node = cluster.nodes()[0]
    scraper = MetricsScraper(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    scraper.start()
    events: EVENTS = []
    two = Path(train_job(folder / "reference-2", 2, events.append).url)
    scraper.stopped.set()
    single_process = Path(train_job(folder / "single_process", 0).url)
    assert two.name == single_process.name
    assert len(read_losses(two)) == 286
    assert read_losses(two) == pytest.approx(read_losses(single_process), abs=1e-9, rel=0)
    for column in ("correct", "samples", "lr", "epoch"):
        assert read_log(two, "steps")[column].to_pylist() == read_log(single_process, "steps")[column].to_pylist()
    assert read_log(two, "evals")["loss"].to_pylist() == pytest.approx(
        read_log(single_process, "evals")["loss"].to_pylist(), abs=1e-9
    )
    assert set(read_log(two, "evals")["samples"].to_pylist()) == {200}

    evaluations = [event for event in events if isinstance(event, EvaluationLogged)]
    assert [event.step for event in evaluations] == [*range(0, 286, 25), 286]
    assert {TrainingStarted, StepsLogged} <= {type(event) for event in events}

    scraper.join()
    logged_losses = set(read_log(two, "evals")["loss"].to_pylist())
    exported_losses = scraper.values(two.name, "trainyard_loss", "val", rank=0)
    assert exported_losses
    assert all(any(value == pytest.approx(loss, rel=1e-6) for loss in logged_losses) for value in exported_losses)
    assert 286 >= max(scraper.values(two.name, "trainyard_step", "train_steps", rank=0)) > 50
    assert max(scraper.values(two.name, "trainyard_epoch", "train_steps", rank=0)) > 2
    assert max(scraper.values(two.name, "trainyard_samples_per_second", "train_steps", rank=0)) > 0
    assert max(scraper.values(two.name, "trainyard_step", "train_steps", rank=1)) > 50
    assert set(scraper.values(two.name, "trainyard_learning_rate", "train_steps")) <= {0.3, 0.1}
    assert 0.5 < max(scraper.values(two.name, "trainyard_accuracy", "val")) <= 1
    assert 800 < max(scraper.values(two.name, "trainyard_samples_total")) <= 8800
    assert 1 <= max(scraper.values(two.name, "trainyard_commits_total")) <= count_commits(folder / "reference-2")
    assert 0 < max(scraper.values(two.name, "trainyard_upload_seconds")) < 60
    assert set(scraper.values(two.name, "trainyard_restarts")) == {0}
    ages = scraper.values(two.name, "trainyard_checkpoint_age_seconds")
    assert any(0 < before < after for before, after in pairwise(ages)), "the age grows between commits"
    assert scraper.names(two.name) == {f"ray_{name}" for name in (*GAUGES, *(f"{name}_total" for name in COUNTERS))}


@pytest.mark.parametrize(
    ("workers", "victim"), [(2, "rank 0"), pytest.param(3, "another", marks=pytest.mark.slow, id="3-another")]
)
def test_killed_worker_is_recovered_bit_identically(
    cluster: Any, folder: Path, reference_run: Callable[[int], Path], workers: int, victim: str
) -> None:
    """Starts of workers: 2, and 1 for the reference run on three workers."""
    kill_a_worker_and_compare(cluster, folder / f"killed-{workers}", reference_run(workers), workers, victim)


def test_killed_worker_of_an_ensemble_is_recovered_bit_identically(cluster: Any, folder: Path) -> None:
    """Starts of workers: 3."""
    reference = Path(train_job(folder / "reference-ensemble", 2, job="ensemble.yaml").url)
    kill_a_worker_and_compare(cluster, folder / "killed-ensemble", reference, 2, "another", job="ensemble.yaml")
    single_process = Path(train_job(folder / "single_process-ensemble", 0, job="ensemble.yaml").url)
    for column in ("samples", "lr", "epoch"):
        assert read_log(reference, "steps")[column].to_pylist() == read_log(single_process, "steps")[column].to_pylist()


def kill_a_worker_and_compare(
    cluster: Any, storage: Path, reference: Path, workers: int, victim: str, job: str = "job.yaml"
) -> None:
    """Kill rank 0 or another worker during training; the final state is that of the reference run."""
    times: dict[str, float] = {}
    events: EVENTS = []

    def kill() -> None:
        wait_for(lambda: count_commits(storage), 120, "a checkpoint")
        time.sleep(0.5)
        (run,) = list_journals(storage)
        rank_0 = read_claims(run)[0]["facts"]["pid"]
        others = find_actor_processes(cluster, "RayTrainWorker") - {rank_0}
        assert len(others) == workers - 1
        times["kill"] = time.monotonic()
        os.kill(rank_0 if victim == "rank 0" else min(others), signal.SIGKILL)

    def on_event(event: Event) -> None:
        events.append(event)
        if "kill" in times and isinstance(event, WarningMessage | TrainingStarted):
            times.setdefault("start" if isinstance(event, TrainingStarted) else "warning", time.monotonic())

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = train_job(storage, workers, on_event, job)
    killer.join()
    run = Path(outcome.url)
    assert outcome.status == "finished"
    assert [claim["attempt"] for claim in read_claims(run)] == [1, 2]
    assert [event.step for event in events if isinstance(event, TrainingStarted)][1] > 0
    assert set(read_log(run, "steps")["attempt"].to_pylist()) == {1, 2}
    assert final_state(run) == final_state(reference)
    delays = {name: round(times[name] - times["kill"], 1) for name in ("warning", "start")}
    print(
        f"\n{workers} workers, {victim} killed: noticed after {delays['warning']} s, training after {delays['start']} s"
    )


def test_command_survives_controller_failure_interrupt_and_fewer_workers(
    cluster: Any, folder: Path, reference_run: Callable[[int], Path]
) -> None:
    """Starts of workers: 3. The driver is a separate process."""
    storage, copy = folder / "interrupted", folder / "interrupted-copy"
    address = cluster.get_runtime_context().gcs_address
    with RunReader(storage):
        driver = subprocess.Popen(
            [COMMAND, "train", "job.yaml", "--storage", str(storage), "--address", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_for(lambda: count_commits(storage) or driver.poll() is not None, 120, "a checkpoint")
        (controller,) = find_actor_processes(cluster, "TrainController")
        os.kill(controller, signal.SIGKILL)
        wait_for(
            lambda: count_commits(storage, attempt=2) or driver.poll() is not None,
            120,
            "a checkpoint after the failure",
        )
        os.killpg(driver.pid, signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, err
    assert re.search(r"starting again from step \d+ \(1 of 3\)", err)
    assert re.search(r"stopped at step \d+ of 286", err)
    assert "same command" in err
    assert out == ""
    assert "raylet" not in err, "only --verbose shows Ray's output"
    (run,) = list_journals(storage)
    *_, commit, leave = read_entries(run)
    assert (commit["kind"], leave["kind"], leave["status"]) == ("commit", "leave", "interrupted")
    assert 0 < commit["step"] == leave["step"] < 286

    shutil.copytree(storage, copy)
    for workers, storage_url in ((0, storage), (1, copy)):
        events: EVENTS = []
        outcome = train_job(storage_url, workers, events.append)
        assert outcome.status == "finished"
        assert any("world_size is 1, was 2" in event.text for event in events if isinstance(event, WarningMessage))
        assert read_losses(Path(outcome.url)) == pytest.approx(read_losses(reference_run(2)), abs=1e-9, rel=0)
        assert read_log(Path(outcome.url), "steps")["step"].to_pylist() == list(range(1, 287))
        assert set(read_log(Path(outcome.url), "steps")["attempt"].to_pylist()) == {1, 2, 3}


def test_nonfinite_loss_ends_the_run_at_once(cluster: Any, folder: Path) -> None:
    """Starts of workers: 1."""
    storage = folder / "not-finite"
    settings = {"train.phases": [{"epochs": 20, "lr": 1.0e300}], "task": "regression", "model.args.pause_s": 0}
    settings["data.source"] = {"call": "cluster_code:two_numbers"}
    with pytest.raises(NotFiniteError, match=r"at step \d+, with learning rate 1e\+300") as raised:
        train("job.yaml", set=settings, storage=str(storage))
    assert raised.value.exit_code == 1
    (run,) = list_journals(storage)
    assert len(read_claims(run)) == 1
    leave = read_entries(run)[-1]
    assert (leave["kind"], leave["status"], leave["error"]["type"]) == ("leave", "failed", "NotFiniteError")
    assert leave["row"]["step"] >= 1


def test_user_error_is_retried_once_and_then_shown_in_full(cluster: Any, folder: Path) -> None:
    """Starts of workers: 2."""
    storage, events = folder / "user-error", list[Event]()
    settings = {"model.args.failing_rank": 1, "checkpoint.every_steps": 500}
    with pytest.raises(RepeatedFailureError, match="worker 1 failed at step 51: RuntimeError: no such luck") as raised:
        train("job.yaml", set=settings, storage=str(storage), on_event=events.append)
    assert raised.value.exit_code == 1
    assert 'raise RuntimeError("no such luck")' in str(raised.value), "the failing rank's own traceback"
    assert "PeerFailure" not in str(raised.value)
    (run,) = list_journals(storage)
    assert len(read_claims(run)) == 2 + 1  # the last claim is the driver's, to record the error
    status = show(str(run))
    assert (status.status, status.step) == ("failed", 0)
    assert status.error is not None
    assert status.error["message"].startswith("worker 1 failed at step 51: RuntimeError: no such luck")
    warnings = [event.text for event in events if isinstance(event, WarningMessage)]
    assert any("worker 1 failed at step 51" in text and "1 of 3" in text for text in warnings)


@pytest.mark.slow
def test_out_of_memory_is_not_retried(cluster: Any, folder: Path) -> None:
    """Starts of workers: 1. Only one rank runs out of memory."""
    storage = folder / "out-of-memory"
    settings = {"model.args.failing_rank": 1, "model.args.fails_by_memory": True}
    with pytest.raises(OutOfMemoryError, match="out of memory on cpu of rank 1") as raised:
        train("job.yaml", set=settings, storage=str(storage))
    assert "train.micro_batch: 8" in raised.value.fix
    (run,) = list_journals(storage)
    status = show(str(run))
    assert status.status == "failed"
    assert status.step <= 50
    assert status.error is not None
    assert status.error["type"] == "OutOfMemoryError"
    assert {entry["attempt"] for entry in read_entries(run) if entry["kind"] == "commit"} == {1}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_preemption_notice_saves_all_ranks_at_one_step_and_restarts(
    cluster: Any, folder: Path, reference_run: Callable[[int], Path], number: int
) -> None:
    """Starts of workers: 2. The notice is SIGTERM, as for a pod or a machine that will be stopped, or SIGHUP."""
    storage, events = folder / f"preempted-{number}", list[Event]()

    def send_notice() -> None:
        wait_for(lambda: count_commits(storage), 240, "a checkpoint")
        rank_0 = read_claims(list_journals(storage)[0])[0]["facts"]["pid"]
        os.kill(min(find_actor_processes(cluster, "RayTrainWorker") - {rank_0}), number)

    thread = threading.Thread(target=send_notice)
    thread.start()
    outcome = train_job(storage, 2, events.append)
    thread.join()
    run = Path(outcome.url)
    *_, commit, leave = [entry for entry in read_entries(run) if entry["attempt"] == 1]
    assert (commit["kind"], leave["kind"], leave["status"]) == ("commit", "leave", "interrupted")
    assert commit["step"] == leave["step"], "no step after the notice is lost"
    starts = [event.step for event in events if isinstance(event, TrainingStarted)]
    assert starts == [0, commit["step"]]
    assert any("and saved; starting again" in event.text for event in events if isinstance(event, WarningMessage))
    assert final_state(run) == final_state(reference_run(2))


def test_input_error_on_a_worker_is_reported_as_bad_input(cluster: Any, folder: Path) -> None:
    """Starts of workers: 1. The workers read other data than the driver, such as other files of the same name."""
    settings = {"data.source": {"call": "cluster_code:other_data_on_workers"}, "scale.workers": 1}
    with pytest.raises(JobError, match="not the data of this run") as raised:
        train("job.yaml", set=settings, storage=str(folder / "other-data"))
    assert raised.value.exit_code == 2


def test_workers_run_the_code_read_by_the_driver(cluster: Any, folder: Path, tmp_path: Path) -> None:
    """Starts of workers: 1. The file is edited before a worker can import it, as if a node had another version."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "cluster_edited.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")

    def on_event(event: Event) -> None:
        if isinstance(event, RunOpened):
            (code / "cluster_edited.py").write_text("raise RuntimeError('another file')\n")

    settings = {"code": str(code), "model": {"kind": "cluster_edited:net"}, "scale.workers": 1}
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    outcome = train("job.yaml", set=settings, storage=str(tmp_path), max_steps=3, on_event=on_event)
    assert outcome.status == "finished"
    after = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    assert after == before, "the variables that were set for Ray are removed again"
    assert list(load(outcome.url, trust=True).model.state_dict()) == ["weight", "bias"]


def test_more_workers_than_the_cluster_are_rejected_at_once(cluster: Any, folder: Path) -> None:
    with pytest.raises(InputError, match=r"4 workers of 1 CPU each do not fit: the cluster has 3 CPU") as raised:
        train_job(folder / "too-many", 4)
    assert raised.value.exit_code == 2
    assert not (folder / "too-many").exists(), "no run was created"
