"""Rows, snapshots and runs for the tests of the record."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.runs.journal.entries import BestCheckpoint
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from pipeline.runs.writer import Snapshot
from pipeline.storage import Storage

SEGMENT_STEPS = 4


def create_run(url: str, name: str = "run") -> Run:
    """A run, born."""
    run = Run(Storage.open(url), name)
    assert run.create("schema: 1\nname: x\n", {"total_steps": 20, "cell_steps": SEGMENT_STEPS})
    return run


def acquire_attempt(run: Run, driver: str = "driver") -> Attempt:
    return acquire_lease(run, driver=driver, metadata={"host": "here", "pid": 1})


def make_block(first: int, last: int) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of the steps `first` to `last`."""
    steps = np.arange(first, last + 1)
    return {
        "epoch": (steps + 9) // 10,
        "step": steps,
        "loss": 1.0 / steps,
        "correct": steps.astype(np.float64),
        "lr": np.full(len(steps), 0.1),
        "samples": np.full(len(steps), 10),
        "seconds": np.full(len(steps), 0.001),
        "time": 1.7e9 + steps,
    }


def make_evaluation(step: int, loss: float = 0.5) -> dict[str, Any]:
    row = {"epoch": (step + 9) // 10, "step": step, "split": "val", "loss": loss, "accuracy": 0.5}
    return {**row, "correct": 5, "samples": 10, "seconds": 0.1, "time": 1.7e9 + step}


def make_snapshot(step: int, *, best: int | None = None, end: bool = False, weight: float | None = None) -> Snapshot:
    """A snapshot whose one weight is its step."""
    value = float(step) if weight is None else weight
    return Snapshot(
        step=step,
        epoch=(step + 9) // 10,
        weights={"0.weight": torch.full((2, 3), value)},
        state={"optimizer.momentum": torch.full((6,), float(step))},
        position={"step": step},
        metrics={"val/loss": 1.0 / step},
        best=BestCheckpoint(metric="val/loss", step=best, value=0.1) if best is not None else None,
        best_weights={"0.weight": torch.full((2, 3), float(best))} if best is not None and best != step else None,
        preprocess={"kind": "none"},
        is_final=end,
    )
