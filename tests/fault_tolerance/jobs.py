"""A job that takes long enough for faults, drivers that run it, and its reference run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.fault_tolerance.nodes import REPOSITORY, RayCluster, find_free_port
from tests.process_kill.run_assertions import find_run, read_entries, wait_for

COMMAND = str(Path(sys.executable).with_name("trainyard"))

HURRY_FILE = "hurry"
"""A file beside the job: while it exists, steps do not pause."""

USER_MODEL = """
import time
from pathlib import Path

import torch

HURRY = Path(__file__).with_name("hurry")


class Slow(torch.nn.Module):
    '''Waits a little in each step of training, so that there is time for faults.'''

    def __init__(self, pause_s=0.0):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.pause_s = pause_s

    def forward(self, inputs):
        if self.training and not HURRY.exists():
            time.sleep(self.pause_s)
        return self.layers(inputs)
"""


def write_job(folder: Path, *, epochs: int, pause_s: float, workers: int = 2) -> None:
    """Write `job.yaml` and its code. The pause in each step does not change the results."""
    job = {
        "schema": 1,
        "name": "survivor",
        "data": {"source": "disc", "normalize": "scalar", "splits": {"by": "random", "val": 0.2}},
        "model": {"kind": "survivor_code:Slow", "args": {"pause_s": pause_s}},
        "train": {
            "batch_size": 31,
            "optimizer": {"kind": "sgd", "momentum": 0.9},
            "phases": [{"epochs": epochs, "lr": 0.3}],
            "precision": "fp64",
        },
        "evaluate": {"every_steps": 25},
        "checkpoint": {"every_steps": 10, "keep": 2},
        "scale": {"workers": workers, "device": "cpu"},
    }
    (folder / "survivor_code.py").write_text(USER_MODEL)
    (folder / "job.yaml").write_text(yaml.safe_dump(job))


class DriverProcess:
    """`trainyard train job.yaml` in a separate process; stores the time of each line that it prints."""

    def __init__(self, folder: Path, storage: str, cluster: RayCluster, options: Sequence[str]) -> None:
        self.lines: list[tuple[float, str]] = []
        self._process = subprocess.Popen(
            cluster.command(
                [COMMAND, "train", "job.yaml", "--storage", storage, "--address", cluster.address, *options]
            ),
            cwd=folder,
            env={**cluster.environment(), "PYTHONPATH": f"{folder}:{REPOSITORY}"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def seconds_to(self, pattern: str, since: float) -> float | None:
        """Return the seconds from a time to the first line after it that matches."""
        for when, line in list(self.lines):
            if when >= since and re.search(pattern, line):
                return round(when - since, 1)
        return None

    def wait_for(self, pattern: str, since: float, limit_s: float) -> float:
        """Wait for a line that matches, and return the seconds since `since`."""
        wait_for(
            lambda: self.seconds_to(pattern, since) is not None or self.is_over, limit_s, f"{pattern}\n{self.output}"
        )
        elapsed_s = self.seconds_to(pattern, since)
        assert elapsed_s is not None, f"ended without {pattern!r}:\n{self.output}"
        return elapsed_s

    def wait_for_exit(self, limit_s: float = 180) -> int:
        """Wait for the process' end and return its exit code."""
        code = self._process.wait(limit_s)
        self._reader.join(10)
        if not self._reader.is_alive() and self._process.stderr is not None:
            self._process.stderr.close()
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the process and its children."""
        os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append((time.monotonic(), line.rstrip()))


@contextmanager
def running_driver(folder: Path, storage: Path | str, cluster: RayCluster, *options: str) -> Iterator[DriverProcess]:
    """Run a driver; it is killed at the end if it has not ended."""
    driver = DriverProcess(folder, str(storage), cluster, options)
    try:
        yield driver
    finally:
        if not driver.is_over:
            driver.send_signal(signal.SIGKILL)
            driver.wait_for_exit()


def read_commits(storage: Path, attempt: int | None = None) -> list[dict[str, Any]]:
    """Return the commit entries of the only run there, of one attempt or all; none before the run is created."""
    if not list(storage.glob("*/job.yaml")):
        return []
    journal_entries = read_entries(find_run(storage))
    return [entry for entry in journal_entries if entry["kind"] == "commit" and attempt in (None, entry["attempt"])]


def read_claims(storage: Path) -> list[dict[str, Any]]:
    """Return the claim entries of the only run there, one per attempt."""
    if not list(storage.glob("*/job.yaml")):
        return []
    return [entry for entry in read_entries(find_run(storage)) if entry["kind"] == "claim"]


def train_reference(folder: Path, storage: Path) -> Path:
    """Train the job without faults, by the same number of plain processes with gloo, without Ray and without pauses."""
    (folder / HURRY_FILE).touch()
    completed = subprocess.run(
        [sys.executable, "-m", "tests.fault_tolerance.reference_run", str(storage), str(find_free_port())],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}", "GLOO_SOCKET_IFNAME": "lo"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )
    assert completed.returncode == 0, completed.stderr
    return find_run(storage)
