"""The names of metrics: those of every evaluation of a task, and in which direction each is better."""

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
"""Of a regression with several targets, each of these also exists per target, in its own unit: `rmse_height`."""

MAX_NAMED_TARGETS = 64
"""With more targets than this, single targets have no columns."""

HIGHER_IS_BETTER = ("accuracy", "correct", "balanced_accuracy", "f1", "auc", "r2")
LOWER_IS_BETTER = ("loss", "log_loss", "rmse", "mae")

RESERVED_COLUMNS = {name for names in METRICS.values() for name in names} | {
    *("run", "attempt", "epoch", "step", "split", "samples", "seconds", "time"),
}
"""Names that a custom metric cannot have."""


def make_target_names(labels: Sequence[str], num_targets: int) -> tuple[str, ...]:
    """Return the suffixes of the columns of single targets: `temp_C` for the label `temp (°C)`; numbers from 0 without
    labels. Empty for a single target, and for more than `MAX_NAMED_TARGETS`.

    Parameters
    ----------
    labels: names of the targets; empty if only the data determines how many there are.
    num_targets: how many there are.
    """
    if not 1 < num_targets <= MAX_NAMED_TARGETS:
        return ()
    names: list[str] = []
    for index in range(num_targets):
        name = (re.sub(r"\W+", "_", labels[index]).strip("_") if labels else "") or str(index)
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return tuple(names)


def make_target_columns(names: Sequence[str]) -> list[str]:
    """Return the columns of single targets."""
    return [f"{metric}_{name}" for metric in TARGET_METRICS for name in names]


def metric_column(name: str) -> str:
    """Return the column of a custom metric: `cost` for `mypkg.m:cost`."""
    return name.partition(":")[2]
