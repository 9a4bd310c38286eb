"""The names of metrics: those of every evaluation of a task, and in which direction each is better."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CLASSIFICATION = ("loss", "accuracy", "correct", "balanced_accuracy", "f1", "auc", "average_precision", "log_loss")

METRICS: dict[str, tuple[str, ...]] = {
    "multiclass": (*_CLASSIFICATION, "baseline_accuracy"),
    "binary": (*_CLASSIFICATION, "baseline_accuracy", "recall", "precision", "specificity"),
    "multilabel": (
        *("loss", "accuracy", "exact_match", "f1", "f1_micro", "auc", "average_precision"),
        "baseline_accuracy",
    ),
    "regression": ("loss", "rmse", "mae", "r2", "baseline_rmse", "baseline_mae"),
}
"""Columns of an evaluation by the kind of the task. Definitions: `pipeline.training.metrics`."""

TARGET_METRICS = ("rmse", "mae", "r2", "baseline_rmse", "baseline_mae")
"""Of a regression with several targets, each of these also exists per target, in its own unit: `rmse_height`."""

CLASS_METRICS = ("recall", "precision")
"""Of a multiclass task, each of these exists per class: `recall_cat`."""

PART_METRICS: dict[str, tuple[str, ...]] = {
    "multiclass": CLASS_METRICS,
    "multilabel": (*CLASS_METRICS, "auc"),
    "regression": TARGET_METRICS,
}
"""By the kind of the task, the metrics that exist of each of its parts: its targets, classes or labels."""

MAX_NAMED_PARTS = 64
"""With more targets or classes than this, single ones have no columns."""

HIGHER_IS_BETTER = (
    *("accuracy", "correct", "balanced_accuracy", "f1", "auc", "average_precision"),
    *("recall", "precision", "specificity", "r2", "exact_match", "f1_micro"),
)
LOWER_IS_BETTER = ("loss", "log_loss", "rmse", "mae", "pinball")

RESERVED_COLUMNS = {
    *("loss", "accuracy", "correct", "balanced_accuracy", "f1", "auc", "log_loss", "baseline_accuracy"),
    *("rmse", "mae", "r2", "baseline_rmse", "baseline_mae"),
    *("run", "attempt", "epoch", "step", "split", "samples", "seconds", "time"),
}
"""Names that a custom metric cannot have. Names of metrics that were added later are not among them: a custom metric of
that name, which earlier versions allowed, takes the place of the metric."""


def make_part_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return the suffixes of the columns of single targets or classes: `temp_C` for the label `temp (°C)`; numbers from
    0 without names. Empty for a single one, and for more than `MAX_NAMED_PARTS`.

    Parameters
    ----------
    names: of the targets or classes; empty if only the data determines how many there are.
    count: how many there are.
    """
    if not 1 < count <= MAX_NAMED_PARTS:
        return ()
    suffixes: list[str] = []
    for index in range(count):
        suffix = (re.sub(r"\W+", "_", names[index]).strip("_") if names else "") or str(index)
        while suffix in suffixes:
            suffix = f"{suffix}_{index}"
        suffixes.append(suffix)
    return tuple(suffixes)


def make_part_columns(kind: str, part_names: Sequence[str]) -> list[str]:
    """Return the columns of single targets or classes."""
    return [f"{metric}_{name}" for metric in PART_METRICS.get(kind, ()) for name in part_names]


def is_part_column(kind: str, column: str) -> bool:
    """Return whether a column may be that of a single target or class, if these were known."""
    return any(column.startswith(f"{metric}_") for metric in PART_METRICS.get(kind, ()))


def metric_column(name: str) -> str:
    """Return the column of a custom metric: `cost` for `mypkg.m:cost`."""
    return name.partition(":")[2]
