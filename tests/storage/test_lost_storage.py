"""A training whose storage fails for good: it stops after the time limit, saves its state on this machine, and resumes
from it to bit-identical results."""

from __future__ import annotations

import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline import load, train
from pipeline.errors import Interrupted, StorageLostError
from pipeline.events import CheckpointCommitted, Event, TrainingStarted
from pipeline.runs import async_writer
from pipeline.testing import inject_faults
from tests.process_kill.run_assertions import check_checkpoints, final_state, find_run, read_entries

USER_MODEL = """
import time

import torch


class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    def forward(self, inputs):
        if self.training:
            time.sleep(0.004)
        return self.layers(inputs)
"""

JOB = """
schema: 1
name: lost
data: {source: disc, normalize: scalar, splits: {by: random, val: 0.2}}
model: {kind: "lost_code:Slow"}
train: {batch_size: 31, optimizer: {kind: sgd, momentum: 0.9}, phases: [{epochs: 20, lr: 0.3}]}
evaluate: {every_steps: 15}
checkpoint: {every_steps: 10, keep: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lost_code.py").write_text(USER_MODEL)
    (tmp_path / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(async_writer, "COMMIT_INTERVAL_FACTOR", 0)  # commit whenever a checkpoint is due
    return tmp_path


def test_training_resumes_from_a_local_checkpoint_after_an_outage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"faulty://file{folder}/runs"
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "0.5")
    with inject_faults("expires_after=150 renewals=0"), pytest.raises(StorageLostError, match="credentials") as caught:
        train("job.yaml", storage=url)
    match = re.search(r"step (\d+) is saved in (\S+) on ", caught.value.what)
    assert match is not None
    saved, local_folder = int(match[1]), Path(match[2])
    committed = max(entry["step"] for entry in read_entries(find_run(folder / "runs")) if entry["kind"] == "commit")
    assert committed < saved, "the saved step is not committed"
    assert load(str(local_folder), trust=True).step <= saved
    assert load(f"{local_folder}@last", trust=True).step == saved

    events: list[Event] = []
    assert train("job.yaml", storage=url, on_event=events.append).status == "finished"
    assert [event.step for event in events if isinstance(event, TrainingStarted)] == [saved]
    assert any(f"resuming from step {saved}" in str(event) for event in events)
    assert not local_folder.exists()
    run = find_run(folder / "runs")
    check_checkpoints(run)
    assert train("job.yaml", storage=str(folder / "untouched")).status == "finished"
    assert final_state(run) == final_state(find_run(folder / "untouched"))


def test_slow_storage_does_not_change_the_requested_commit_interval(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `checkpoint.every_minutes` commits are as frequent as requested; without, the interval is 100 times the
    duration of the last commit."""
    monkeypatch.setattr(async_writer, "COMMIT_INTERVAL_FACTOR", 100)
    began, commits = time.monotonic(), list[tuple[float, float]]()

    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointCommitted):
            commits.append((time.monotonic(), event.write_s))
            if len(commits) == 4:
                os.kill(os.getpid(), signal.SIGINT)

    changes = {"train.phases.0.epochs": 200, "checkpoint.every_steps": 100_000, "checkpoint.every_minutes": 0.01}
    with inject_faults("delay_s=0.02 on=write"), pytest.raises(Interrupted):
        train("job.yaml", set=changes, storage=f"faulty://file{folder}/runs", on_event=on_event)
    assert commits[0][0] - began >= 0.6 - commits[0][1], "not before the first one is due"
    for (before, cost), (after, _) in pairwise(commits[:4]):
        assert after - before < async_writer.COMMIT_INTERVAL_FACTOR / 2 * cost
