"""Promise 1: kill it anywhere, and nobody can tell afterwards. Real processes, real SIGKILLs.

Which moments are tried is drawn from `SEED`; another number tries others. `-m slow` tries every one of two stretches.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.process_kill.fork_server import ChildResult, ForkServer, SignalAt
from tests.process_kill.run_assertions import (
    RunReader,
    check_checkpoints,
    final_state,
    find_run,
    hash_committed_files,
    read_entries,
)

SEED = int(os.environ.get("TRAINYARD_TEST_SEED", "1"))
MAX_KILLS = 6
"""For each job; then it may finish."""

DATA_MODULE = """
import numpy as np

def images():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 330)
    return (draw.integers(0, 200, (330, 8, 8, 1)) + 20 * labels[:, None, None, None]).astype(np.uint8), labels

def curve():
    x = np.random.default_rng(0).uniform(-2, 2, (700, 3)).astype(np.float32)
    return x, np.sin(x.sum(1))
"""

JOB_HEADER = """
schema: 1
name: victim
data: {source: disc, normalize: scalar, splits: {by: random, val: 0.2}}
"""

JOBS = {
    "momentum": (
        JOB_HEADER
        + """
model: {kind: mlp, hidden: [8, 4], activation: tanh}
train:
  batch_size: 32
  optimizer: {kind: sgd, momentum: 0.9}
  phases: [{epochs: 13, lr: 0.5}, {steps: 80, lr: 0.1, optimizer_state: reset}]
evaluate: {every_steps: 7, splits: [train, val]}
checkpoint: {every_steps: 5, keep: 2}
""",
        [],
    ),
    "adam": (
        JOB_HEADER
        + """
model: {kind: mlp, hidden: [8, 8], activation: relu, dropout: 0.2, batch_norm: true}
train:
  batch_size: 30
  optimizer: {kind: adamw, weight_decay: 0.01}
  phases: [{epochs: 6, lr: 0.05, schedule: cosine, warmup_steps: 9}, {epochs: 7, lr: 0.02, schedule: one_cycle}]
  clip_norm: 0.5
evaluate: {every_steps: 13}
checkpoint: {every_steps: 6, keep: 1}
""",
        [],
    ),
    "patience": (
        JOB_HEADER
        + """
model: {kind: mlp, hidden: [8], activation: relu}
train:
  batch_size: 16
  optimizer: {kind: sgd}
  phases: [{epochs: 40, lr: 1.5}]
evaluate: {every_steps: 11, splits: [val]}
best: {metric: val/accuracy, mode: max, patience: 30}
checkpoint: {every_steps: 9, keep: 3}
""",
        [],
    ),
    "fp16": (
        JOB_HEADER
        + """
model: {kind: mlp, hidden: [16], activation: gelu}
train:
  batch_size: 16
  optimizer: {kind: adam}
  phases: [{epochs: 8, lr: 0.1}]
  precision: fp16
evaluate: {every_epochs: 1}
checkpoint: {every_steps: 10}
""",
        [],
    ),
    "augmented": (
        """
schema: 1
name: victim
data:
  source: {call: fault_source:images}
  splits: {by: random, val: 30, stratify: true}
  augment: {crop: 1, flip: true, rotate: 20, jitter: {brightness: 0.3}, mixup: 0.4}
model: {kind: cnn, conv: [{channels: 3, kernel: 3}], hidden: [6], dropout: 0.1}
train:
  batch_size: 40
  micro_batch: 15
  optimizer: {kind: adam}
  phases: [{epochs: 100, lr: 0.03}]
evaluate: {every_steps: 10, limit: 17}
checkpoint: {every_epochs: 1, keep: 1}
""",
        ["--max-steps", "330"],
    ),
    "table": (
        """
schema: 1
name: victim
data:
  source: parquet
  url: victims.parquet
  label: fate
  one_hot_up_to: 2
  splits: {by: group, column: town, val: 0.2}
  cache: {folder: cache, in_memory_mb: 0}
model: {kind: mlp, hidden: [8, 4], dropout: 0.1, freeze: [3.bias]}
task: {kind: binary, positive: [dead], class_weights: balanced}
train:
  batch_size: 32
  optimizer: {kind: adamw, groups: [{match: "embeddings.*", lr_factor: 2, weight_decay: 0}]}
  phases: [{epochs: 24, lr: 0.02, schedule: cosine}]
evaluate: {every_steps: 9}
best: {metric: val/auc}
checkpoint: {every_steps: 7, keep: 2}
""",
        [],
    ),
    "regression": (
        """
schema: 1
name: victim
data: {source: {call: fault_source:curve}, normalize: standard, splits: {by: range, train: [0, 600]}}
model: {kind: mlp, hidden: [12], activation: relu}
task: regression
train:
  batch_size: 50
  optimizer: {kind: sgd, momentum: 0.8, nesterov: true}
  phases: [{epochs: 30, lr: 0.05}]
  precision: fp64
checkpoint: {every_steps: 3, keep: 2}
""",
        [],
    ),
    "short": (
        JOB_HEADER
        + """
train:
  batch_size: 80
  phases: [{epochs: 3, lr: 0.3}]
evaluate: {every_steps: 4}
checkpoint: {every_steps: 3}
""",
        [],
    ),
}
LONG_JOBS = [name for name in JOBS if name != "short"]


def write_table(path: Path) -> None:
    """A table with numbers, nulls, levels and groups."""
    draw = np.random.default_rng(0)
    age, town = draw.normal(40, 12, 600), draw.integers(0, 30, 600)
    dead = draw.random(600) < 1 / (1 + np.exp(-(age - 45) / 5 - draw.normal(0, 1, 30)[town]))
    columns = {
        "age": pa.array(age, mask=draw.random(600) < 0.1),
        "town": town,
        "trade": [f"trade {number}" for number in draw.integers(0, 9, 600)],
        "fate": np.where(dead, "dead", "alive"),
    }
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "fault_source.py").write_text(DATA_MODULE)
    write_table(folder / "victims.parquet")
    for name, (text, _) in JOBS.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def fork_server(folder: Path) -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINYARD_HEARTBEAT_S", "0.1")  # so that live rows are written too
        nursery = ForkServer(folder)
    yield nursery
    nursery.close()


def train_command(name: str, storage: Path) -> list[str]:
    return ["train", f"{name}.yaml", "--storage", str(storage), *JOBS[name][1]]


def run_until_signal(nursery: ForkServer, argv: list[str], draw: random.Random) -> ChildResult:
    """One attempt that ends by a signal somewhere, or comes to its end before."""
    kind = draw.choice(["files", "files", "steps", "clock", "signal"])
    if kind == "clock":
        child = nursery.start(*argv)
        time.sleep(draw.uniform(0.1, 0.5))
        os.kill(child.pid, signal.SIGKILL)
        return nursery.wait(child)
    if kind == "signal":
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        return nursery.run(*argv, signal_at=SignalAt("steps", draw.randint(1, 60), number))
    return nursery.run(
        *argv,
        signal_at=SignalAt("steps", draw.randint(1, 80))
        if kind == "steps"
        else SignalAt("files", draw.randint(1, 180)),
    )


@pytest.mark.parametrize("name", LONG_JOBS)
def test_repeatedly_killed_run_matches_reference(fork_server: ForkServer, folder: Path, name: str) -> None:
    untouched, storage = folder / f"{name}-untouched", folder / f"{name}-killed"
    assert fork_server.run(*train_command(name, untouched)).exit_code == 0
    expected = final_state(find_run(untouched))
    draw, story = random.Random(f"{SEED} {name}"), list[int]()
    with RunReader(storage) as watcher:
        while len(story) < 4 * MAX_KILLS and sum(code < 0 for code in story) < MAX_KILLS:
            outcome = run_until_signal(fork_server, train_command(name, storage), draw)
            story.append(outcome.exit_code)
            assert outcome.exit_code in (0, -signal.SIGKILL, 130, 143), outcome.stderr
            if outcome.exit_code == 0:
                break
            for run in storage.glob("*/job.yaml"):
                check_checkpoints(run.parent)
        run = find_run(storage)
        # Once more shortly before the end: what a run knows of its past has to come through too.
        to_go = len(expected["steps"]) - max([entry.get("step", 0) for entry in read_entries(run)], default=0)
        if to_go > 9:
            story.append(
                fork_server.run(
                    *train_command(name, storage), signal_at=SignalAt("steps", to_go - draw.randint(1, 8))
                ).exit_code
            )
            check_checkpoints(run)
        outcome = fork_server.run(*train_command(name, storage))
        assert outcome.exit_code == 0, outcome.stderr
    check_checkpoints(run)
    assert final_state(run) == expected, f"after {story}"
    assert sum(code < 0 for code in story) > 2, f"hardly killed: {story}"
    assert watcher.looks > 0
    assert not list(run.glob(".tmp/*"))


def test_kill_jobs_cover_all_features(fork_server: ForkServer, folder: Path) -> None:
    """What the runs must have for the test above to mean something."""
    results = {}
    for name in LONG_JOBS:
        storage = folder / f"{name}-untouched"
        assert fork_server.run(*train_command(name, storage)).exit_code == 0
        results[name] = (final_state(find_run(storage)), read_entries(find_run(storage)))
    assert {name for name, (found, _) in results.items() if found["chosen"] == found["last"]} <= {"regression"}
    assert all(len(found["steps"]) > 300 for found, _ in results.values())
    assert all(sum(entry["kind"] == "commit" for entry in journal) > 4 for _, journal in results.values())
    assert len(results["patience"][0]["steps"]) < 40 * 50, "no early stop"
    assert len(results["augmented"][0]["steps"]) == 330


STRIDES = [15, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
"""Which operations on files are tried: each, or one in so many."""


def kill_at_each_operation(stride: int, nursery: ForkServer, work: Path, name: str, begun: Path | None) -> int:
    """Kill at the n-th operation on files for n in steps of `stride`, go on, and compare with an untouched run, until
    an attempt comes to its end before. Returns how many were killed."""
    untouched = work / "untouched"
    assert nursery.run(*train_command(name, untouched)).exit_code == 0
    expected = final_state(find_run(untouched))
    first = random.Random(SEED).randint(1, stride)
    for count in itertools.count(first, stride):
        storage = work / str(count)
        if begun is not None:
            shutil.copytree(begun, storage)
        outcome = nursery.run(*train_command(name, storage), signal_at=SignalAt("files", count))
        assert outcome.exit_code in (0, -signal.SIGKILL), outcome.stderr
        again = nursery.run(*train_command(name, storage))
        assert again.exit_code == 0, f"killed at {count}: {again.stderr}"
        check_checkpoints(find_run(storage))
        assert final_state(find_run(storage)) == expected, f"killed at {count}"
        if outcome.exit_code == 0:
            return (count - first) // stride
        shutil.rmtree(storage)
    raise AssertionError


@pytest.mark.parametrize("stride", STRIDES)
def test_kill_during_any_operation_of_the_end_is_recovered(
    fork_server: ForkServer, tmp_path: Path, stride: int
) -> None:
    """From a resume shortly before the end to the last file: claim, cells, end, result, retention, view."""
    begun = tmp_path / "begun"
    assert (
        fork_server.run(*train_command("momentum", begun), signal_at=SignalAt("steps", 395, signal.SIGINT)).exit_code
        == 130
    )
    assert kill_at_each_operation(stride, fork_server, tmp_path, "momentum", begun) > 120 / stride


@pytest.mark.parametrize("stride", STRIDES)
def test_kill_during_any_operation_of_a_short_run_is_recovered(
    fork_server: ForkServer, tmp_path: Path, stride: int
) -> None:
    """From nothing through the first commits to the end."""
    assert kill_at_each_operation(stride, fork_server, tmp_path, "short", None) > 120 / stride


def test_finished_run_is_not_changed(fork_server: ForkServer, folder: Path, tmp_path: Path) -> None:
    assert fork_server.run(*train_command("short", tmp_path)).exit_code == 0
    before = hash_committed_files(find_run(tmp_path))
    again = fork_server.run(*train_command("short", tmp_path))
    assert again.exit_code == 0
    assert "already finished" in again.stderr
    assert hash_committed_files(find_run(tmp_path)) == before
