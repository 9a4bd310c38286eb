"""Runs, rows and snapshots for the record's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.runs.async_writer import Snapshot
from pipeline.runs.journal.entries import BestCheckpoint, JournalEntry
from pipeline.runs.journal.journal import Journal
from pipeline.runs.run import Run
from pipeline.storage import Storage

SEGMENT_STEPS = 100


def create_run(url: str, name: str = "run", **facts: Any) -> Run:
    """A run that has just been born."""
    run = Run(Storage.open(url), name)
    assert run.create("name: run\n", {"total_steps": 1000, "cell_steps": SEGMENT_STEPS, **facts})
    return run


def make_block(first: int, last: int, **columns: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of the steps from first to last."""
    steps = np.arange(first, last + 1)
    whole, real = np.ones_like(steps), np.ones(len(steps))
    rows = {
        "epoch": whole,
        "step": steps,
        "loss": 1.0 / steps,
        "correct": whole * 50,
        "lr": real * 0.1,
        "samples": whole * 100,
        "seconds": real * 1e-4,
        "time": 1.8e9 + steps * 1e-4,
    }
    return rows | {name: np.full(len(steps), value) for name, value in columns.items()}


def read_entries(journal: Journal) -> tuple[JournalEntry, ...]:
    """All entries, up to the first absent number; as for a claim, none may be missing before that."""
    number = journal.read_state().number
    journal.raise_if_gap()
    return tuple(journal.read_entry(one) for one in range(1, number + 1))


def make_evaluation(step: int, **values: Any) -> dict[str, Any]:
    """A row of one evaluation."""
    row = {"epoch": 1, "step": step, "split": "val", "loss": 0.5, "accuracy": 0.9, "correct": 90, "samples": 100}
    return {**row, "seconds": 0.01, "time": 1.8e9 + step, **values}


def make_snapshot(step: int, *, best: int | None = None, **values: Any) -> Snapshot:
    """A snapshot whose tensors and best value tell its step."""
    so_far = None if best is None else BestCheckpoint(metric="val/loss", step=best, value=1.0 / best)
    weights = {"0.weight": torch.full((3, 4), float(step)), "0.bias": torch.zeros(3, dtype=torch.float64)}
    plain: dict[str, Any] = {
        "epoch": 1,
        "weights": weights,
        "state": {"optimizer.momentum": torch.full((12,), 0.5), "optimizer.step": torch.tensor(step)},
        "position": {"step": step},
        "metrics": {"val/loss": 0.5},
        "preprocess": {"mean": 0.1307},
    }
    return Snapshot(step=step, best=so_far, **(plain | values))
