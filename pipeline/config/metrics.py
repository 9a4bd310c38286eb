"""The vocabulary of metrics: what every evaluation of a task measures, and in which direction each is better."""

from __future__ import annotations

import re
from collections.abc import Sequence

METRICS: dict[str, tuple[str, ...]] = {
    "multiclass": ("loss", "accuracy", "correct", "balanced_accuracy", "f1", "auc", "log_loss", "baseline_accuracy"),
    "binary": ("loss", "accuracy", "correct", "balanced_accuracy", "f1", "auc", "log_loss", "baseline_accuracy"),
    "regression": ("loss", "rmse", "mae", "r2", "baseline_rmse", "baseline_mae"),
}
"""Columns of an evaluation by the kind of the task. Definitions: `pipeline.training.metrics`."""

TARGET_METRICS = ("rmse", "mae", "r2", "baseline_rmse", "baseline_mae")
"""Of a regression of several targets, each of these is there for each target too, in its own unit: `rmse_height`."""

MAX_NAMED_TARGETS = 64
"""More targets than this have no columns of their own."""

HIGHER_IS_BETTER = ("accuracy", "correct", "balanced_accuracy", "f1", "auc", "r2")
LOWER_IS_BETTER = ("loss", "log_loss", "rmse", "mae")

RESERVED_COLUMNS = {name for names in METRICS.values() for name in names} | {
    *("run", "attempt", "epoch", "step", "split", "samples", "seconds", "time"),
}
"""What a metric of the user's own cannot be called."""


def make_target_names(labels: Sequence[str], num_targets: int) -> tuple[str, ...]:
    """What the columns of single targets end in: `temp_C` for the label `temp (°C)`; numbers from 0 without labels.

    Parameters
    ----------
    labels: names of the targets; empty where only the data knows how many there are.
    count: how many there are. Of one there is nothing to tell apart, and of very many nothing to read.
    """
    if not 1 < num_targets <= MAX_NAMED_TARGETS:
        return ()
    names: list[str] = []
    for place in range(num_targets):
        name = (re.sub(r"\W+", "_", labels[place]).strip("_") if labels else "") or str(place)
        while name in names:
            name = f"{name}_{place}"
        names.append(name)
    return tuple(names)


def make_target_columns(names: Sequence[str]) -> list[str]:
    """The columns of single targets."""
    return [f"{metric}_{name}" for metric in TARGET_METRICS for name in names]


def metric_column(name: str) -> str:
    """The column of a metric of the user's own: `mypkg.m:cost` is `cost`."""
    return name.partition(":")[2]
