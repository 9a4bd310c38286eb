"""Factories for runs, metric rows and snapshots in tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.checkpoints.snapshot import Snapshot
from pipeline.runs.journal.entries import BestCheckpoint, JournalEntry
from pipeline.runs.journal.journal import Journal
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from pipeline.storage import Storage

SEGMENT_STEPS = 100


def create_run(url: str, name: str = "run", **metadata: Any) -> Run:
    """Create a run with segments of `SEGMENT_STEPS` steps, unless `metadata` has another `cell_steps`."""
    run = Run(Storage.open(url), name)
    assert run.create("name: run\n", {"total_steps": 1000, "cell_steps": SEGMENT_STEPS, **metadata})
    return run


def start_attempt(run: Run, *, keep: int = 2, known_dead_attempt: int | None = None) -> tuple[Attempt, AsyncRunWriter]:
    """Claim a run and start its writer, without waiting for what the writer does at first."""
    attempt = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=known_dead_attempt)
    return attempt, AsyncRunWriter(attempt, keep=keep)


def stop_attempt(attempt: Attempt, writer: AsyncRunWriter) -> None:
    """Stop the threads of an attempt and release its lock, with no entry in the journal."""
    writer.close()
    attempt.close()


def make_block(first: int, last: int, **columns: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return metric rows for the steps from `first` to `last`; `columns` have one value for all steps."""
    steps = np.arange(first, last + 1)
    ints, floats = np.ones_like(steps), np.ones(len(steps))
    rows = {
        "epoch": ints,
        "step": steps,
        "loss": 1.0 / steps,
        "correct": ints * 50,
        "lr": floats * 0.1,
        "samples": ints * 100,
        "seconds": floats * 1e-4,
        "time": 1.8e9 + steps * 1e-4,
    }
    return rows | {name: np.full(len(steps), value) for name, value in columns.items()}


def make_evaluation(step: int, **values: Any) -> dict[str, Any]:
    """Return the metric row of one evaluation."""
    row = {"epoch": 1, "step": step, "split": "val", "loss": 0.5, "accuracy": 0.9, "correct": 90, "samples": 100}
    return {**row, "seconds": 0.01, "time": 1.8e9 + step, **values}


def make_snapshot(step: int, *, best: int | None = None, **values: Any) -> Snapshot:
    """Return a snapshot whose weights, and the value of whose best, depend on the step; `values` replace fields."""
    best_so_far = None if best is None else BestCheckpoint(metric="val/loss", step=best, value=1.0 / best)
    weights = {"0.weight": torch.full((3, 4), float(step)), "0.bias": torch.zeros(3, dtype=torch.float64)}
    defaults: dict[str, Any] = {
        "epoch": 1,
        "weights": weights,
        "state": {"optimizer.momentum": torch.full((12,), 0.5), "optimizer.step": torch.tensor(step)},
        "position": {"step": step},
        "metrics": {"val/loss": 0.5},
        "preprocess": {"mean": 0.1307},
    }
    return Snapshot(step=step, best=best_so_far, **(defaults | values))


def read_entries(journal: Journal) -> tuple[JournalEntry, ...]:
    """Read all entries up to the first absent number, which must be the end of the journal, as for a claim."""
    count = journal.read_state().number
    journal.raise_if_gap()
    return tuple(journal.read_entry(number) for number in range(1, count + 1))
