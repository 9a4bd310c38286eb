"""The vocabulary of metrics: what every evaluation of a task measures, and in which direction each is better."""

from __future__ import annotations

METRICS: dict[str, tuple[str, ...]] = {
    "multiclass": ("loss", "accuracy", "correct", "balanced_accuracy", "f1", "auc", "log_loss", "baseline_accuracy"),
    "binary": ("loss", "accuracy", "correct", "balanced_accuracy", "f1", "auc", "log_loss", "baseline_accuracy"),
    "regression": ("loss", "rmse", "mae", "r2", "baseline_rmse", "baseline_mae"),
}
"""Columns of an evaluation by the kind of the task. Definitions: `pipeline.learn.metrics`."""

HIGHER_IS_BETTER = ("accuracy", "correct", "balanced_accuracy", "f1", "auc", "r2")
LOWER_IS_BETTER = ("loss", "log_loss", "rmse", "mae")

RESERVED_COLUMNS = {name for names in METRICS.values() for name in names} | {
    *("run", "attempt", "epoch", "step", "split", "samples", "seconds", "time"),
}
"""What a metric of the user's own cannot be called."""


def own_metric(name: str) -> str:
    """The column of a metric of the user's own: `mypkg.m:cost` is `cost`."""
    return name.partition(":")[2]
