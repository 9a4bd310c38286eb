"""Warnings on columns that tell nothing, or give the label away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import statistics
from pipeline.data.preprocess import fit_warnings, leaks
from pipeline.data.sources import Arrays, Source
from pipeline.data.tables.schema import Column, Schema
from pipeline.job_file import build_job

ROWS = 3_000


def warned(columns: dict[str, tuple[Column, np.ndarray]], targets: np.ndarray, task: Any, rows: Any = None) -> set[str]:
    """Which columns are warned of, and why."""
    schema = Schema(tuple(column for column, _ in columns.values()))
    inputs = np.concatenate([values.reshape(len(values), -1) for _, values in columns.values()], axis=1)
    source = Source(Arrays(inputs.astype(np.float32), targets), None, (), "f", schema)
    job = build_job({"name": "t", "task": task, "data": {"source": "parquet", "url": "x", "label": "y"}}, "test")
    warnings_found = set()
    for warning in fit_warnings(job, source, np.arange(len(inputs)) if rows is None else rows):
        name = warning.partition("'")[2].partition("'")[0]
        warnings_found.add(f"{name} {'leaks' if 'gives the label away' in warning else 'tells nothing'}")
    return warnings_found


def number(name: str, values: np.ndarray) -> tuple[Column, np.ndarray]:
    return Column(name, "number", values.shape[1] if values.ndim > 1 else 1), values


def category(name: str, values: np.ndarray) -> tuple[Column, np.ndarray]:
    return Column(name, "category", levels=tuple(map(str, range(int(np.nanmax(values)) + 1)))), values


def noise(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=rows)


def columns(*given_columns: tuple[Column, np.ndarray]) -> dict[str, tuple[Column, np.ndarray]]:
    return {column.name: (column, values) for column, values in given_columns}


@pytest.mark.parametrize("classes", [2, 7])
def test_what_gives_a_label_away(classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, classes, ROWS)
    almost = labels.astype(float)
    almost[:2] = (almost[:2] + 1) % classes
    often = labels.astype(float)
    often[::50] = (often[::50] + 1) % classes  # right in 98 %
    scores = labels + 0.3 * np.tanh(noise(1))
    warnings_found = warned(
        columns(
            number("noise", noise(2)),
            number("hint", labels + noise(3)),
            number("same", labels.astype(float)),
            number("almost", almost),
            number("often", often),
            number("scores", scores),
            number("vector", np.stack([noise(4), -scores, noise(5)], axis=1)),
            category("renamed", (labels * 3 + 1) % 7),
            category("where_missing", np.where(labels == 0, np.nan, labels)),
            category("customer", np.arange(ROWS)),
            category("pair", np.arange(ROWS) // 2),
            number("customer_number", np.random.default_rng(6).permutation(ROWS).astype(float)),
        ),
        labels,
        "multiclass",
    )
    leaking = {"same", "almost", "scores", "vector", "renamed", "where_missing"}
    assert warnings_found == {f"{name} leaks" for name in leaking}


def test_a_rare_class_is_no_leak() -> None:
    labels = (np.arange(ROWS) < 20).astype(np.int64)
    assert warned(columns(number("flag", labels.astype(float))), labels, "binary") == set()


def test_what_gives_a_number_away() -> None:
    goal = noise(0)
    holed = goal * -3 + 1e3
    holed[::2] = np.nan
    warnings_found = warned(
        columns(
            number("noise", noise(1)),
            number("near", goal + 0.05 * noise(2)),
            number("twice", 2 * goal + 1e3),
            number("holed", holed),
            category("level", np.arange(ROWS) % 3),
        ),
        np.stack([noise(3), goal], axis=1).astype(np.float32),
        "regression",
    )
    assert warnings_found == {"twice leaks", "holed leaks"}


def test_columns_that_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "MOST_ROWS", 1_000)  # the rest is looked at in blocks
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 300)
    late = np.ones(ROWS)
    late[2_500] = 2
    late_value = np.full(ROWS, np.nan)
    late_value[2_999] = 1
    given_columns = columns(
        number("constant", np.full(ROWS, 0.1)),
        number("empty", np.full((ROWS, 2), np.nan)),
        category("one_level", np.ones(ROWS)),
        number("late", late),
        number("late_value", late_value),
        number("half", np.stack([np.ones(ROWS), noise(1)], axis=1)),
    )
    labels = np.random.default_rng(0).integers(0, 2, ROWS)
    always = {"constant tells nothing", "empty tells nothing", "one_level tells nothing"}
    assert warned(given_columns, labels, "binary") == always
    rows = np.delete(np.arange(ROWS), [2_500, 2_999])
    assert warned(given_columns, labels, "binary", rows) == {*always, "late tells nothing", "late_value tells nothing"}


@given(
    rows=st.integers(1, 400),
    seed=st.integers(0, 10_000),
    task=st.sampled_from(["multiclass", "regression"]),
    missing=st.sampled_from([0.0, 0.5]),
)
@settings(deadline=None, max_examples=60)
def test_noise_is_no_leak(rows: int, seed: int, task: str, missing: float) -> None:
    draws = np.random.default_rng(seed)
    values = draws.normal(size=rows)
    values[draws.random(rows) < missing] = np.nan
    labels = np.arange(rows) % 3 if task == "multiclass" else draws.normal(size=rows).astype(np.float32)
    given_columns = columns(number("x", values), category("c", draws.integers(0, 300, rows).astype(float)))
    assert not any("leaks" in one for one in warned(given_columns, labels, task))


def test_arrays_have_no_columns() -> None:
    job = build_job({"name": "t"}, "test")
    source = Source(Arrays(np.zeros((30, 2), np.float32), np.arange(30) % 2), None, (), "f")
    assert fit_warnings(job, source, np.arange(30)) == []


def test_a_table_that_is_sorted_by_its_label_hides_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "MOST_ROWS", 1_000)
    labels = np.sort(np.random.default_rng(0).integers(0, 2, 10 * ROWS))
    warnings_found = warned(
        columns(number("leak", labels.astype(float)), number("noise", noise(2, len(labels)))), labels, "binary"
    )
    assert warnings_found == {"leak leaks"}
