"""Format metrics as text: a short line, or a table of a split's metrics with their baselines without any training."""

from __future__ import annotations

import math
from collections.abc import Mapping

NUMBER_WIDTH = 10

HEADLINES = ("loss", "accuracy", "coverage", "rmse", "r2")
"""The metrics of a short line."""

BASELINES = {
    "accuracy": ("baseline_accuracy", "majority class"),
    "rmse": ("baseline_rmse", "always the mean"),
    "mae": ("baseline_mae", "always the mean"),
}


def format_headline(metrics: Mapping[str, float], best_metric: str = "") -> str:
    """Format the headline metrics and `best_metric`, by split: `val loss 0.1432  accuracy 0.9571`.

    metrics: finite values by `split/column`.
    """
    parts, last = [], ""
    for metric, value in metrics.items():
        split, _, name = metric.partition("/")
        if name in HEADLINES or metric == best_metric:
            parts.append(f"{split + ' ' if split != last else ''}{name} {format_number(value)}")
            last = split
    return "  ".join(parts)


def headline_fields(metrics: Mapping[str, float], best_metric: str = "") -> list[tuple[str, float]]:
    """Return names and values of what `format_headline` shows, such as `("val loss", 0.1432)`; `best_metric` first."""
    shown = [name for name in metrics if name.partition("/")[2] in HEADLINES or name == best_metric]
    return [(name.replace("/", " "), metrics[name]) for name in sorted(shown, key=lambda name: name != best_metric)]


def format_metric_table(metrics: Mapping[str, float], split: str) -> list[str]:
    """Format one line for each metric of a split: `accuracy           0.8800 (majority class: 0.8800)`; and one for
    each class of a multiclass task, with its recall and precision, or each label of a multilabel task."""
    values = select_split(metrics, split)
    classes = [name.removeprefix("recall_") for name in values if name.startswith("recall_")]
    classes = [name for name in classes if f"precision_{name}" in values]
    part_metrics = ["recall", "precision", *(["auc"] if any(f"auc_{name}" in values for name in classes) else [])]
    of_classes = {f"{metric}_{name}" for metric in part_metrics for name in classes}
    hidden = {"correct", "samples", *of_classes}
    shown = [name for name in values if name not in hidden and not name.startswith("baseline_")]
    width = max(map(len, shown), default=0)
    lines = []
    for name in shown:
        column, text = _baseline_column(name)
        notes = [f"{text}: {format_number(values[column])}"] if column in values else []
        if name in BASELINES and any(other.startswith(f"baseline_{name}_") for other in values):
            notes.insert(0, "in standard deviations")
        beside = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"{name.ljust(width)}  {format_number(values[name])}{beside}")
    if not classes:
        return lines
    kind = "class" if "auc" not in part_metrics else "label"
    width = max(map(len, [kind, *classes]))
    lines.append(kind.ljust(width) + "".join(f"  {metric.rjust(9)}" for metric in part_metrics))
    for name in classes:
        cells = [values.get(f"{metric}_{name}", math.nan) for metric in part_metrics]
        lines.append(name.ljust(width) + "".join(f"  {format_number(cell).rjust(9)}" for cell in cells))
    return lines


def _baseline_column(name: str) -> tuple[str, str]:
    """Return the column of a metric's baseline and its description, also for the metric of one target, `rmse_height`;
    empty if it has none."""
    for metric, (column, text) in BASELINES.items():
        if name == metric or name.startswith(f"{metric}_"):
            return column + name.removeprefix(metric), text
    return "", ""


def baseline_warning(metrics: Mapping[str, float], split: str) -> str:
    """Return a warning if a model is no better than its baseline, else an empty string."""
    values = select_split(metrics, split)
    has_threshold = "threshold" in values  # chosen for another aim than accuracy
    if "baseline_accuracy" in values and values["accuracy"] <= values["baseline_accuracy"] and not has_threshold:
        return f"on {split} no better than always answering the majority class"
    if "baseline_rmse" in values and values.get("rmse", math.inf) >= values["baseline_rmse"]:
        return f"on {split} no better than always answering the mean of the training targets"
    return ""


LOWER_LEARNING_RATE = "lower the learning rate (train.phases) or set train.clip_norm"


def format_divergence_advice(
    run: str, best_step: int | None, last_step: int | None, no_gain: str = "", change: str = LOWER_LEARNING_RATE
) -> str:
    """Return what to do about a run whose loss or weights became NaN or infinite: the same command would fail again.

    Parameters
    ----------
    best_step, last_step: of the best and the last checkpoint; None if there is none.
    no_gain: message that no evaluation is better than before training, so that no checkpoint is worth starting from;
        else empty.
    change: what to change in the job.
    """
    advice = f"{change}: the changed job is a new run"
    if no_gain:
        return f"{advice}; {no_gain}, so no checkpoint is worth starting from"
    if best_step is not None:
        return f"{advice}, and model.init_from: {run}@best starts it from the best checkpoint, of step {best_step}"
    if last_step is not None:
        return f"{advice}, and model.init_from: {run}@last starts it from the last checkpoint, of step {last_step}"
    return advice


def select_split(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """Return the metrics of a split by column, without None and NaN."""
    by_column = {name.partition("/")[2]: value for name, value in metrics.items() if name.partition("/")[0] == split}
    return {name: value for name, value in by_column.items() if value is not None and value == value}


def format_number(value: float) -> str:
    """Format with four decimals, or four significant digits for very small and large values: at most `NUMBER_WIDTH`
    characters."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def format_rate(per_second: float) -> str:
    """Format with three digits in at most five characters: `912`, `52.1k`, `1.23M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= size * (1 - 5e-4):
            return f"{per_second / size:#.3g}".rstrip(".") + unit
    return f"{per_second:.0f}"
