"""Metrics as people read them: a short line, or all of a split with what no learning at all would give beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping

NUMBER_WIDTH = 10

HEADLINES = ("loss", "accuracy", "rmse", "r2")
"""What a short line shows."""

BASELINES = {
    "accuracy": ("baseline_accuracy", "majority class"),
    "rmse": ("baseline_rmse", "always the mean"),
    "mae": ("baseline_mae", "always the mean"),
}


def format_headline(metrics: Mapping[str, float], best_metric: str = "") -> str:
    """`val loss 0.1432  accuracy 0.9571`, split by split: the headlines, and the metric that decides on the best.

    metrics: `split/column`, what is finite of them.
    """
    parts, last = [], ""
    for metric, value in metrics.items():
        split, _, name = metric.partition("/")
        if name in HEADLINES or metric == best_metric:
            parts.append(f"{split + ' ' if split != last else ''}{name} {format_number(value)}")
            last = split
    return "  ".join(parts)


def headline_fields(metrics: Mapping[str, float], best_metric: str = "") -> list[tuple[str, float]]:
    """What `short_words` shows, one by one: `("val loss", 0.1432)`, the metric that decides on the best first."""
    shown = [name for name in metrics if name.partition("/")[2] in HEADLINES or name == best_metric]
    return [(name.replace("/", " "), metrics[name]) for name in sorted(shown, key=lambda name: name != best_metric)]


def format_metric_table(metrics: Mapping[str, float], split: str) -> list[str]:
    """One line for each metric of a split: `accuracy           0.8800 (majority class: 0.8800)`."""
    values = select_split(metrics, split)
    shown = [name for name in values if name not in ("correct", "samples") and not name.startswith("baseline_")]
    width = max(map(len, shown), default=0)
    lines = []
    for name in shown:
        column, text = _baseline_column(name)
        notes = [f"{text}: {format_number(values[column])}"] if column in values else []
        if name in BASELINES and any(other.startswith(f"baseline_{name}_") for other in values):
            notes.insert(0, "in standard deviations")
        beside = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"{name.ljust(width)}  {format_number(values[name])}{beside}")
    return lines


def _baseline_column(name: str) -> tuple[str, str]:
    """The column of what no learning would give, and what that is; of a single target, `rmse_height`, too."""
    for metric, (column, text) in BASELINES.items():
        if name == metric or name.startswith(f"{metric}_"):
            return column + name.removeprefix(metric), text
    return "", ""


def baseline_warning(metrics: Mapping[str, float], split: str) -> str:
    """A warning where a model does no better than its baseline, else nothing."""
    values = select_split(metrics, split)
    if "baseline_accuracy" in values and values["accuracy"] <= values["baseline_accuracy"]:
        return f"on {split} no better than always answering the majority class"
    if "baseline_rmse" in values and values.get("rmse", math.inf) >= values["baseline_rmse"]:
        return f"on {split} no better than always answering the mean of the training targets"
    return ""


def format_divergence_advice(run: str, best_step: int | None, last_step: int | None, no_gain: str = "") -> str:
    """What to do about a run whose loss or weights became NaN or infinite: the same command would end there again.

    Parameters
    ----------
    best_step, last_step: of the best and the last checkpoint, where there are any.
    no_gain: that no evaluation is better than before training: then no checkpoint is worth going on from.
    """
    advice = "lower the learning rate (train.phases) or set train.clip_norm: the changed job is a new run"
    if no_gain:
        return f"{advice}; {no_gain}, so no checkpoint is worth going on from"
    if best_step is not None:
        return f"{advice}, and model.init_from: {run}@best begins it at the best checkpoint, of step {best_step}"
    if last_step is not None:
        return f"{advice}, and model.init_from: {run}@last begins it at the last checkpoint, of step {last_step}"
    return advice


def select_split(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """By column, without what is not finite: None, or NaN."""
    by_column = {name.partition("/")[2]: value for name, value in metrics.items() if name.partition("/")[0] == split}
    return {name: value for name, value in by_column.items() if value is not None and value == value}


def format_number(value: float) -> str:
    """Four places, or four digits where those would hide it: at most `NUMBER_WIDTH` characters."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def format_rate(per_second: float) -> str:
    """Three digits in five characters at most: `912`, `52.1k`, `1.23M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= size * (1 - 5e-4):
            return f"{per_second / size:#.3g}".rstrip(".") + unit
    return f"{per_second:.0f}"
