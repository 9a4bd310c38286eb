"""A worker that hangs on a real Ray cluster: it is named, its stacks are saved, and the run continues."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.train import train
from pipeline.events import Event, EventHandler, StepsLogged, TrainingStarted, WarningMessage, ignore_event
from pipeline.runs.status import RunStatus
from tests.cluster.ray_processes import find_actor_processes
from tests.process_kill.run_assertions import read_entries, read_log, wait_for

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and of what it imports

HANG_S = 4.0
USER_MODEL = """
import os
import re
import signal
import threading
import time
from pathlib import Path

import torch


class Hangs(torch.nn.Module):
    '''In step 60 a rank hangs in the way that a file in `folder` names, once: the file is renamed first.'''

    def __init__(self, folder):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.folder, self.calls = Path(folder), 0

    def forward(self, inputs):
        if self.training:
            time.sleep(0.01)
            self.calls += 1
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
            if self.calls == 60 and rank is not None:
                for name in ("deadlock", "hold_the_gil", "stop"):
                    file = self.folder / f"{name}-{rank}"
                    if file.exists():
                        file.rename(self.folder / f"done-{time.time()}")
                        getattr(self, name)()
        return self.layers(inputs)

    def deadlock(self):
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    def stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def hold_the_gil(self):
        re.match("(a*)*b", "a" * 60)
"""
JOB = f"""
schema: 1
name: hang
data: {{source: disc, normalize: scalar, splits: {{by: random, val: 0.2}}}}
model: {{kind: "cluster_hang_code:Hangs", args: {{folder: FOLDER}}}}
train:
  batch_size: 31
  optimizer: {{kind: sgd, momentum: 0.9}}
  phases: [{{epochs: 5, lr: 0.3}}]
  precision: fp64
evaluate: {{every_steps: 25}}
checkpoint: {{every_steps: 10, keep: 2}}
scale: {{workers: 2, device: cpu, hang_s: {HANG_S}}}
"""


class EventLog:
    """The events of a driver, with their times."""

    def __init__(self) -> None:
        self.events: list[tuple[float, Event]] = []

    def __call__(self, event: Event) -> None:
        self.events.append((time.monotonic(), event))

    @property
    def warnings(self) -> list[str]:
        return [event.text for _, event in self.events if isinstance(event, WarningMessage)]

    def time_of(self, kind: type[Event], count: int) -> float:
        return [when for when, event in self.events if isinstance(event, kind)][count]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cluster_hang_code.py").write_text(USER_MODEL)
    (tmp_path / "job.yaml").write_text(JOB.replace("FOLDER", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train_job(folder: Path, on_event: EventHandler = ignore_event, **scale: Any) -> RunStatus:
    settings = {f"scale.{name}": value for name, value in scale.items()}
    return train("job.yaml", set=settings, storage=str(folder / f"runs-{scale.get('workers', 2)}"), on_event=on_event)


def check_recovered(folder: Path, outcome: RunStatus) -> None:
    """Check that there were two attempts, and that the losses are those of a run in this process."""
    run = Path(outcome.url)
    assert outcome.status == "finished"
    assert [entry["attempt"] for entry in read_entries(run) if entry["kind"] == "claim"] == [1, 2]
    single_process = train_job(folder, workers=0)
    losses = [read_log(Path(status.url), "steps")["loss"].to_pylist() for status in (outcome, single_process)]
    assert len(losses[0]) == 130
    assert losses[0] == pytest.approx(losses[1], abs=1e-9, rel=0)


def format_times(event_log: EventLog, hang_start: float) -> str:
    detected = event_log.time_of(WarningMessage, 0) - hang_start
    restarted = event_log.time_of(TrainingStarted, 1) - hang_start
    finished = event_log.time_of(StepsLogged, -1) - hang_start
    return f"detected after {detected:.1f} s, training again after {restarted:.1f} s (done after {finished:.1f} s)"


def hang_time(folder: Path) -> float:
    """Return when the file was renamed, by this process' monotonic clock."""
    (done,) = folder.glob("done-*")
    return float(done.name.removeprefix("done-")) - time.time() + time.monotonic()


def test_hung_worker_is_named_and_the_run_restarts(cluster: Any, folder: Path) -> None:
    """Starts of workers: 2. Rank 0 waits for the rank that hangs, and must not be named instead of it."""
    (folder / "deadlock-1").touch()
    event_log = EventLog()
    outcome = train_job(folder, event_log)
    stacks = Path(outcome.url) / "stacks" / "attempt-0001-rank-1.txt"
    (warning,) = event_log.warnings
    assert "worker 1 made no progress for 4 s in cluster_hang_code.py:" in warning
    assert f"(deadlock); stacks in {stacks}; starting again from step" in warning
    assert "in forward" in stacks.read_text()
    assert [path.name for path in stacks.parent.iterdir()] == [stacks.name]
    check_recovered(folder, outcome)
    detected = event_log.time_of(WarningMessage, 0) - hang_time(folder)
    assert HANG_S < detected < HANG_S + 60
    print(f"\na deadlock in rank 1: {format_times(event_log, hang_time(folder))}, with a limit of {HANG_S:.0f} s")


@pytest.mark.slow
def test_hang_while_holding_the_gil(cluster: Any, folder: Path) -> None:
    """The watchdog of the process cannot run; the next attempt stores the stacks."""
    (folder / "hold_the_gil-1").touch()
    event_log = EventLog()
    outcome = train_job(folder, event_log)
    failure, later = event_log.warnings
    assert "starting again from step" in failure
    assert "an earlier process hung in cluster_hang_code.py:" in later
    assert "in hold_the_gil" in (Path(outcome.url) / "stacks" / "attempt-0001-rank-1.txt").read_text()
    check_recovered(folder, outcome)
    print(f"\nthe GIL held in rank 1: {format_times(event_log, hang_time(folder))}, with a limit of {HANG_S:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "victim"), [(2, 0), (2, 1), (1, 0)])
def test_stopped_worker_is_detected(cluster: Any, folder: Path, workers: int, victim: int) -> None:
    """After SIGSTOP it cannot report anything. Another worker detects it, or Ray if there is none, and it is killed."""
    (folder / f"stop-{victim}").touch()
    event_log = EventLog()
    outcome = train_job(folder, event_log, workers=workers)
    text = f"worker {victim}, which sends no heartbeat" if workers > 1 else "worker 0 was lost (it did not respond)"
    assert text in event_log.warnings[0]
    check_recovered(folder, outcome)
    wait_for(lambda: not find_actor_processes(cluster, "RayTrainWorker"), 60, "the end of the stopped process")
    print(
        f"\n{victim} of {workers} stopped: {format_times(event_log, hang_time(folder))}, with a limit of {HANG_S:.0f} s"
    )
