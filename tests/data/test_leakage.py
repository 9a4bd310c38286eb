"""Warnings about columns that carry no information, or that leak the label."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.files import build_job
from pipeline.data import leakage, statistics
from pipeline.data.leakage import leakage_warnings
from pipeline.data.sources import Dataset, DatasetPart
from pipeline.data.tabular.schema import Column, Schema

NUM_ROWS = 3_000


def warned_columns(
    columns: dict[str, tuple[Column, np.ndarray]], targets: np.ndarray, task: Any, indices: Any = None
) -> set[str]:
    """Return the columns that are warned about, each with "leaks" or "is constant"."""
    schema = Schema(tuple(column for column, _ in columns.values()))
    inputs = np.concatenate([values.reshape(len(values), -1) for _, values in columns.values()], axis=1)
    dataset = Dataset(DatasetPart(inputs.astype(np.float32), targets), None, (), "f", schema)
    job = build_job({"name": "t", "task": task, "data": {"source": "parquet", "url": "x", "label": "y"}}, "test")
    warned = set()
    for warning in leakage_warnings(job, dataset, np.arange(len(inputs)) if indices is None else indices):
        name = warning.partition("'")[2].partition("'")[0]
        assert ("predicts the label" in warning) != ("carries no information" in warning)
        warned.add(f"{name} {'leaks' if 'predicts the label' in warning else 'is constant'}")
    return warned


def numeric_column(name: str, values: np.ndarray) -> tuple[Column, np.ndarray]:
    return Column(name, "number", values.shape[1] if values.ndim > 1 else 1), values


def categorical_column(name: str, values: np.ndarray) -> tuple[Column, np.ndarray]:
    return Column(name, "category", categories=tuple(map(str, range(int(np.nanmax(values)) + 1)))), values


def make_noise(seed: int, rows: int = NUM_ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=rows)


def make_columns(*given_columns: tuple[Column, np.ndarray]) -> dict[str, tuple[Column, np.ndarray]]:
    return {column.name: (column, values) for column, values in given_columns}


@pytest.mark.parametrize("classes", [2, 7])
def test_leaking_columns_of_a_classification(classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, classes, NUM_ROWS)
    almost = labels.astype(float)
    almost[:2] = (almost[:2] + 1) % classes
    often = labels.astype(float)
    often[::50] = (often[::50] + 1) % classes  # right in 98 %
    scores = labels + 0.3 * np.tanh(make_noise(1))
    warned = warned_columns(
        make_columns(
            numeric_column("noise", make_noise(2)),
            numeric_column("hint", labels + make_noise(3)),
            numeric_column("same", labels.astype(float)),
            numeric_column("almost", almost),
            numeric_column("often", often),
            numeric_column("scores", scores),
            numeric_column("vector", np.stack([make_noise(4), -scores, make_noise(5)], axis=1)),
            categorical_column("renamed", (labels * 3 + 1) % 7),
            categorical_column("where_missing", np.where(labels == 0, np.nan, labels)),
            categorical_column("customer", np.arange(NUM_ROWS)),
            categorical_column("pair", np.arange(NUM_ROWS) // 2),
            numeric_column("customer_number", np.random.default_rng(6).permutation(NUM_ROWS).astype(float)),
        ),
        labels,
        "multiclass",
    )
    leaking = {"same", "almost", "scores", "vector", "renamed", "where_missing"}
    assert warned == {f"{name} leaks" for name in leaking}


def test_predictor_of_a_rare_class_does_not_leak() -> None:
    labels = (np.arange(NUM_ROWS) < 20).astype(np.int64)
    assert warned_columns(make_columns(numeric_column("flag", labels.astype(float))), labels, "binary") == set()


def test_leaking_columns_of_a_regression() -> None:
    target = make_noise(0)
    with_missing = target * -3 + 1e3
    with_missing[::2] = np.nan
    warned = warned_columns(
        make_columns(
            numeric_column("noise", make_noise(1)),
            numeric_column("near", target + 0.05 * make_noise(2)),
            numeric_column("twice", 2 * target + 1e3),
            numeric_column("with_missing", with_missing),
            categorical_column("level", np.arange(NUM_ROWS) % 3),
        ),
        np.stack([make_noise(3), target], axis=1).astype(np.float32),
        "regression",
    )
    assert warned == {"twice leaks", "with_missing leaks"}


def test_constant_columns_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "MAX_SCANNED_ROWS", 1_000)  # the other rows are checked in blocks
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 300)
    late = np.ones(NUM_ROWS)
    late[2_500] = 2
    late_value = np.full(NUM_ROWS, np.nan)
    late_value[2_999] = 1
    given_columns = make_columns(
        numeric_column("constant", np.full(NUM_ROWS, 0.1)),
        numeric_column("empty", np.full((NUM_ROWS, 2), np.nan)),
        categorical_column("one_level", np.ones(NUM_ROWS)),
        numeric_column("late", late),
        numeric_column("late_value", late_value),
        numeric_column("half", np.stack([np.ones(NUM_ROWS), make_noise(1)], axis=1)),
    )
    labels = np.random.default_rng(0).integers(0, 2, NUM_ROWS)
    always = {"constant is constant", "empty is constant", "one_level is constant"}
    assert warned_columns(given_columns, labels, "binary") == always
    indices = np.delete(np.arange(NUM_ROWS), [2_500, 2_999])
    assert warned_columns(given_columns, labels, "binary", indices) == {
        *always,
        "late is constant",
        "late_value is constant",
    }


@given(
    rows=st.integers(1, 400),
    seed=st.integers(0, 10_000),
    task=st.sampled_from(["multiclass", "regression"]),
    missing=st.sampled_from([0.0, 0.5]),
)
@settings(deadline=None, max_examples=60)
def test_noise_does_not_leak(rows: int, seed: int, task: str, missing: float) -> None:
    draws = np.random.default_rng(seed)
    values = draws.normal(size=rows)
    values[draws.random(rows) < missing] = np.nan
    labels = np.arange(rows) % 3 if task == "multiclass" else draws.normal(size=rows).astype(np.float32)
    given_columns = make_columns(
        numeric_column("x", values), categorical_column("c", draws.integers(0, 300, rows).astype(float))
    )
    assert not any("leaks" in warning for warning in warned_columns(given_columns, labels, task))


def test_arrays_without_columns_are_not_checked() -> None:
    job = build_job({"name": "t"}, "test")
    dataset = Dataset(DatasetPart(np.zeros((30, 2), np.float32), np.arange(30) % 2), None, (), "f")
    assert leakage_warnings(job, dataset, np.arange(30)) == []


def test_leak_in_a_table_sorted_by_label_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "MAX_SCANNED_ROWS", 1_000)
    labels = np.sort(np.random.default_rng(0).integers(0, 2, 10 * NUM_ROWS))
    warned = warned_columns(
        make_columns(numeric_column("leak", labels.astype(float)), numeric_column("noise", make_noise(2, len(labels)))),
        labels,
        "binary",
    )
    assert warned == {"leak leaks"}
