"""A run that is killed at any moment and then resumed gives the same bits. Real processes, real SIGKILLs.

The moments are random, from `SEED`. `-m slow` tries every file operation of two intervals.
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
"""Kills of a job before it may finish."""

DATA_MODULE = """
import numpy as np

def images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 330)
    return (rng.integers(0, 200, (330, 8, 8, 1)) + 20 * labels[:, None, None, None]).astype(np.uint8), labels

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
task: {kind: binary, positive: [dead], class_weights: balanced, threshold: f1}
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
    "ensemble": (
        """
schema: 1
name: victim
data: {source: parquet, url: victims.parquet, label: fate, one_hot_up_to: 2, splits: {by: random, val: 0.2}}
model: {kind: mlp, hidden: [8, 4], dropout: 0.1, ensemble: 3, numeric_embedding: periodic}
task: {kind: binary, positive: [dead]}
train:
  batch_size: 32
  optimizer: {kind: adamw, weight_decay: 0.01, decay: weights}
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
    """Write a table with numeric and categorical columns, nulls and groups."""
    rng = np.random.default_rng(0)
    age, town = rng.normal(40, 12, 600), rng.integers(0, 30, 600)
    dead = rng.random(600) < 1 / (1 + np.exp(-(age - 45) / 5 - rng.normal(0, 1, 30)[town]))
    columns = {
        "age": pa.array(age, mask=rng.random(600) < 0.1),
        "town": town,
        "trade": [f"trade {number}" for number in rng.integers(0, 9, 600)],
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
        server = ForkServer(folder)
    yield server
    server.close()


def train_command(name: str, storage: Path) -> list[str]:
    return ["train", f"{name}.yaml", "--storage", str(storage), *JOBS[name][1]]


def run_until_signal(fork_server: ForkServer, argv: list[str], rng: random.Random) -> ChildResult:
    """Run one attempt, which a signal ends at a random moment, unless it finishes before."""
    moment = rng.choice(["files", "files", "steps", "time", "signal"])
    if moment == "time":
        child = fork_server.start(*argv)
        time.sleep(rng.uniform(0.1, 0.5))
        os.kill(child.pid, signal.SIGKILL)
        return fork_server.wait(child)
    if moment == "signal":
        number = rng.choice([signal.SIGINT, signal.SIGTERM])
        return fork_server.run(*argv, signal_at=SignalAt("steps", rng.randint(1, 60), number))
    return fork_server.run(
        *argv,
        signal_at=SignalAt("steps", rng.randint(1, 80))
        if moment == "steps"
        else SignalAt("files", rng.randint(1, 180)),
    )


@pytest.mark.parametrize("name", LONG_JOBS)
def test_repeatedly_killed_run_matches_reference(fork_server: ForkServer, folder: Path, name: str) -> None:
    reference, storage = folder / f"{name}-reference", folder / f"{name}-killed"
    assert fork_server.run(*train_command(name, reference)).exit_code == 0
    expected = final_state(find_run(reference))
    rng, exit_codes = random.Random(f"{SEED} {name}"), list[int]()
    with RunReader(storage) as reader:
        while len(exit_codes) < 4 * MAX_KILLS and sum(code < 0 for code in exit_codes) < MAX_KILLS:
            outcome = run_until_signal(fork_server, train_command(name, storage), rng)
            exit_codes.append(outcome.exit_code)
            assert outcome.exit_code in (0, -signal.SIGKILL, 130, 143), outcome.stderr
            if outcome.exit_code == 0:
                break
            for run in storage.glob("*/job.yaml"):
                check_checkpoints(run.parent)
        run = find_run(storage)
        # Once more shortly before the end, so that the state of the whole run is restored too.
        remaining_steps = len(expected["steps"]) - max([entry.get("step", 0) for entry in read_entries(run)], default=0)
        if remaining_steps > 9:
            exit_codes.append(
                fork_server.run(
                    *train_command(name, storage), signal_at=SignalAt("steps", remaining_steps - rng.randint(1, 8))
                ).exit_code
            )
            check_checkpoints(run)
        outcome = fork_server.run(*train_command(name, storage))
        assert outcome.exit_code == 0, outcome.stderr
    check_checkpoints(run)
    assert final_state(run) == expected, f"after {exit_codes}"
    assert sum(code < 0 for code in exit_codes) > 2, f"hardly killed: {exit_codes}"
    assert reader.reads > 0
    assert not list(run.glob(".tmp/*"))


def test_kill_jobs_cover_all_features(fork_server: ForkServer, folder: Path) -> None:
    """The test above is meaningful only for runs with these properties."""
    results = {}
    for name in LONG_JOBS:
        storage = folder / f"{name}-reference"
        assert fork_server.run(*train_command(name, storage)).exit_code == 0
        results[name] = (final_state(find_run(storage)), read_entries(find_run(storage)))
    assert {name for name, (state, _) in results.items() if state["chosen"] == state["last"]} <= {"regression"}
    assert all(len(state["steps"]) > 300 for state, _ in results.values())
    assert all(sum(entry["kind"] == "commit" for entry in journal) > 4 for _, journal in results.values())
    assert len(results["patience"][0]["steps"]) < 40 * 50, "no early stop"
    assert len(results["augmented"][0]["steps"]) == 330


STRIDES = [15, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
"""Distances between the file operations that are tried."""


def kill_at_each_operation(stride: int, fork_server: ForkServer, folder: Path, name: str, started: Path | None) -> int:
    """Kill a run at every `stride`-th file operation, resume it, and compare it with an uninterrupted run, until an
    attempt finishes first. Return the number of kills.

    started: a copy of this interrupted run is killed instead of a new one.
    """
    reference = folder / "reference"
    assert fork_server.run(*train_command(name, reference)).exit_code == 0
    expected = final_state(find_run(reference))
    first = random.Random(SEED).randint(1, stride)
    for count in itertools.count(first, stride):
        storage = folder / str(count)
        if started is not None:
            shutil.copytree(started, storage)
        outcome = fork_server.run(*train_command(name, storage), signal_at=SignalAt("files", count))
        assert outcome.exit_code in (0, -signal.SIGKILL), outcome.stderr
        again = fork_server.run(*train_command(name, storage))
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
    """From a resume shortly before the end to the last file: claim, segments, end, result, retention, run.json."""
    started = tmp_path / "started"
    assert (
        fork_server.run(*train_command("momentum", started), signal_at=SignalAt("steps", 395, signal.SIGINT)).exit_code
        == 130
    )
    assert kill_at_each_operation(stride, fork_server, tmp_path, "momentum", started) > 120 / stride


@pytest.mark.parametrize("stride", STRIDES)
def test_kill_during_any_operation_of_a_short_run_is_recovered(
    fork_server: ForkServer, tmp_path: Path, stride: int
) -> None:
    """From the creation of the run through the first commits to the end."""
    assert kill_at_each_operation(stride, fork_server, tmp_path, "short", None) > 120 / stride


def test_finished_run_is_not_changed(fork_server: ForkServer, folder: Path, tmp_path: Path) -> None:
    assert fork_server.run(*train_command("short", tmp_path)).exit_code == 0
    before = hash_committed_files(find_run(tmp_path))
    again = fork_server.run(*train_command("short", tmp_path))
    assert again.exit_code == 0
    assert "already finished" in again.stderr
    assert hash_committed_files(find_run(tmp_path)) == before
