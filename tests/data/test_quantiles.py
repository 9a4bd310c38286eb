"""Exact quantiles of columns, sorted in memory or selected in passes, compared with NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import statistics
from pipeline.data.transforms import quantiles
from pipeline.data.transforms.quantiles import QuantileSelect, compute_quantiles

NUMBERS = st.floats(-(2.0**120), 2.0**120, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5])


def expected_quantiles(values: np.ndarray, probabilities: list[float]) -> np.ndarray:
    values = values[~np.isnan(values)].astype(np.float64)
    return np.quantile(values, probabilities) if len(values) else np.full(len(probabilities), np.nan)


@given(
    columns=st.lists(st.lists(NUMBERS | st.just(float("nan")), min_size=9, max_size=9), min_size=1, max_size=4),
    rows=st.sets(st.integers(0, 8), min_size=1),
    probabilities=st.lists(st.floats(0, 1), min_size=1, max_size=7),
    dtype=st.sampled_from(["float32", "float64"]),
    is_sorted=st.booleans(),
    block=st.sampled_from([1, 5, 1 << 20]),
)
@settings(deadline=None, max_examples=200)
def test_quantiles_match_numpy(
    columns: list[list[float]], rows: set[int], probabilities: list[float], dtype: str, is_sorted: bool, block: int
) -> None:
    inputs, indices = np.array(columns).T.astype(dtype), np.array(sorted(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK_VALUES", block)
        patch.setattr(quantiles, "MAX_SORTED_VALUES", 2 * len(rows) if is_sorted else 0)
        computed = compute_quantiles(inputs, indices, np.arange(len(columns)), probabilities)
    for column, values in enumerate(inputs[indices].T):
        scale = np.nanmax(np.abs(values), initial=0)
        np.testing.assert_allclose(
            computed[:, column], expected_quantiles(values, probabilities), rtol=1e-13, atol=1e-13 * scale
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("max_sorted_values", [0, 1 << 17, 1 << 24])
def test_many_quantiles_of_many_rows(dtype: str, max_sorted_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "MAX_SORTED_VALUES", max_sorted_values)
    values = np.random.default_rng(3).standard_t(2, (70_001, 4)) * [1e-30, 1, 1, 1e30]
    values[:, 2] = np.round(values[:, 2])
    values[::7, 1], values[1::7, 1] = np.nan, -np.nan
    inputs, probabilities = values.astype(dtype), np.linspace(0, 1, 1000)
    computed = compute_quantiles(inputs, np.arange(70_000), np.array([0, 1, 3]), probabilities)
    expected = np.nanquantile(inputs[:70_000, [0, 1, 3]].astype(np.float64), probabilities, axis=0)
    np.testing.assert_allclose(computed, expected, rtol=1e-12, atol=0)


def test_a_memory_mapped_table_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(5_000, 6)))
    mapped, reads = np.load(tmp_path / "table.npy", mmap_mode="r"), list[int]()
    monkeypatch.setattr(quantiles, "MAX_SORTED_VALUES", 1_000)
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 500)
    update = QuantileSelect.update

    def note_size(select: QuantileSelect, pass_index: int, values: np.ndarray) -> None:
        reads.append(values.size)
        update(select, pass_index, values)

    monkeypatch.setattr(QuantileSelect, "update", note_size)
    computed = compute_quantiles(mapped, np.arange(0, 5_000, 2), np.array([1, 5]), [0.1, 0.9])
    assert max(reads) <= 500
    np.testing.assert_allclose(computed, np.quantile(mapped[::2, [1, 5]], [0.1, 0.9], axis=0), rtol=1e-14)


def test_the_largest_numbers_do_not_overflow() -> None:
    largest = np.finfo(np.float64).max
    inputs = np.array([[-largest], [largest]])
    assert compute_quantiles(inputs, np.arange(2), np.arange(1), [0, 0.5, 1]).tolist() == [[-largest], [0], [largest]]
