"""The arithmetic of the comparison: ranks over tables, intervals by resampling tables, differences from a base.

A score is AUC for classes and R2 for numbers, or, for tables of classes alone, accuracy. It is averaged over splits
first, then ranked within a table; 1 is best, and equal scores share the mean of their ranks. A result without a score
(an error, a prediction that is not finite) ranks last. Only tables are counted on which all compared methods have
results for the same splits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

Metric = Literal["score", "accuracy"]
Row = Mapping[str, Any]
Results = Mapping[tuple[str, int, str], Row]

RESAMPLES = 10_000

Line = TypeVar("Line")


@dataclass(frozen=True)
class Estimate:
    """A mean over tables, and the 95 % interval from resampling them with replacement."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MethodRank:
    """One line of the ranking.

    `by_split`: the mean rank where each (table, split) is ranked by itself. `failed`: results without a score, or no
    better than a constant prediction (R2 below 0, AUC below 0.5). `cpu_s`: median over (table, split). `cpu_ratio`:
    median of the ratio to LightGBM on the same split, NaN where there is none.
    """

    method: str
    rank: Estimate
    by_split: float
    mean_score: float
    wins: int
    failed: int
    cpu_s: float
    cpu_ratio: float


@dataclass(frozen=True)
class Difference:
    """One line of the ablation: a variant minus the base, in points (hundredths of AUC, R2 or accuracy)."""

    method: str
    points: Estimate
    better: int
    tables: int
    cpu_ratio: float


def read_score(row: Row, metric: Metric) -> float:
    """Return AUC or R2, or accuracy; minus infinity for a result without."""
    names = ("accuracy",) if metric == "accuracy" else ("r2", "auc")
    values = [float(row[name]) for name in names if row.get(name) is not None]
    return values[0] if values and row.get("error") is None else -np.inf


def complete_tables(results: Results, methods: Sequence[str], metric: Metric) -> dict[str, list[int]]:
    """Return the tables on which all methods have results, with the splits that they share."""
    found: dict[str, dict[str, set[int]]] = {}
    for (table, split, method), row in results.items():
        if method in methods and (metric == "score" or row["task"] != "regression"):
            found.setdefault(table, {}).setdefault(method, set()).add(split)
    shared = {
        table: sorted(set.intersection(*of_method.values()))
        for table, of_method in found.items()
        if set(of_method) == set(methods)
    }
    return {table: splits for table, splits in shared.items() if splits}


def rank_methods(results: Results, methods: Sequence[str], metric: Metric) -> list[MethodRank]:
    """Return the methods by their mean rank, the best first; empty if no table is complete."""
    tables = complete_tables(results, methods, metric)
    if not tables:
        return []
    scores = mean_scores(results, methods, tables, metric)
    ranks = np.array([rank_scores(row) for row in scores])
    pairs = [(table, split) for table, splits in tables.items() for split in splits]
    by_split = np.array(
        [
            rank_scores([read_score(results[table, split, method], metric) for method in methods])
            for table, split in pairs
        ]
    )
    lines = []
    for column, method in enumerate(methods):
        rows = [results[table, split, method] for table, split in pairs]
        lines.append(
            MethodRank(
                method,
                rank=estimate(ranks[:, column]),
                by_split=float(by_split[:, column].mean()),
                mean_score=float(scores[:, column].mean()),
                wins=int(np.sum(ranks[:, column] == ranks.min(1))),
                failed=sum(is_failed(row) for row in rows),
                cpu_s=_median(row.get("cpu_s") for row in rows),
                cpu_ratio=cpu_ratio(results, pairs, method, "lightgbm"),
            )
        )
    return sorted(lines, key=lambda line: line.rank.mean)


def compare_to_base(results: Results, base: str, methods: Sequence[str], metric: Metric) -> list[Difference]:
    """Return what each method brings over a base, on the tables and splits that the two share."""
    lines = []
    for method in methods:
        tables = complete_tables(results, [base, method], metric)
        if not tables:
            continue
        scores = mean_scores(results, [base, method], tables, metric)
        points = 100 * (scores[:, 1] - scores[:, 0])
        pairs = [(table, split) for table, splits in tables.items() for split in splits]
        lines.append(
            Difference(
                method,
                estimate(points),
                better=int(np.sum(points > 0)),
                tables=len(points),
                cpu_ratio=cpu_ratio(results, pairs, method, base),
            )
        )
    return lines


def mean_scores(
    results: Results, methods: Sequence[str], tables: Mapping[str, Sequence[int]], metric: Metric
) -> np.ndarray:
    """Return the scores averaged over splits: float (tables, methods)."""
    return np.array(
        [
            [np.mean([read_score(results[table, split, method], metric) for split in splits]) for method in methods]
            for table, splits in tables.items()
        ]
    )


def rank_scores(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the rank of each score, 1 for the highest; equal scores share the mean of their ranks."""
    values = np.asarray(scores, dtype=float)
    higher = (values[None, :] > values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    ranks: np.ndarray = higher + (equal + 1) / 2
    return ranks


def estimate(values: np.ndarray) -> Estimate:
    """Return the mean over tables with its interval (percentile bootstrap, fixed seed)."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def is_failed(row: Row) -> bool:
    """Whether a result has no score, or one below that of a constant prediction."""
    return read_score(row, "score") < (0 if row["task"] == "regression" else 0.5)


def cpu_ratio(results: Results, pairs: Iterable[tuple[str, int]], method: str, to: str) -> float:
    """Return the median over (table, split) of the CPU seconds of a method over those of another."""
    ratios = []
    for table, split in pairs:
        ours, theirs = (results.get((table, split, name), {}).get("cpu_s") for name in (method, to))
        if ours and theirs:
            ratios.append(ours / theirs)
    return _median(ratios)


def _median(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else float("nan")


def format_ranking(lines: Sequence[MethodRank], metric: Metric) -> str:
    """Return the ranking as a table in Markdown."""
    name = "accuracy" if metric == "accuracy" else "AUC or R2"
    return _format_table(
        [
            "method",
            f"mean rank by {name} [95 %]",
            "by split",
            f"mean {name}",
            "best on",
            "failed",
            "CPU s",
            "x LightGBM",
        ],
        lines,
        lambda line: [
            line.method,
            f"{line.rank.mean:.2f} [{line.rank.low:.2f}, {line.rank.high:.2f}]",
            f"{line.by_split:.2f}",
            f"{line.mean_score:.4f}",
            str(line.wins),
            str(line.failed),
            f"{line.cpu_s:.1f}",
            f"{line.cpu_ratio:.1f}",
        ],
    )


def format_differences(lines: Sequence[Difference], base: str, metric: Metric) -> str:
    """Return the ablation as a table in Markdown."""
    name = "accuracy" if metric == "accuracy" else "AUC or R2"
    return _format_table(
        [f"over {base}", f"points of {name} [95 %]", "better on", "x CPU"],
        lines,
        lambda line: [
            line.method,
            f"{line.points.mean:+.2f} [{line.points.low:+.2f}, {line.points.high:+.2f}]",
            f"{line.better} of {line.tables}",
            f"{line.cpu_ratio:.2f}",
        ],
    )


def format_scores(results: Results, methods: Sequence[str], metric: Metric) -> str:
    """Return the score of each method on each table, averaged over splits, as a table in Markdown."""
    tables = complete_tables(results, methods, metric)
    scores = mean_scores(results, methods, tables, metric)
    return _format_table(
        ["table", *methods],
        list(zip(tables, scores, strict=True)),
        lambda line: [line[0], *[f"{value:.4f}" for value in line[1]]],
    )


def _format_table(head: Sequence[str], lines: Sequence[Line], cells: Callable[[Line], Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *map(cells, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
