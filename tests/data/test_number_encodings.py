"""Robust scaling, quantiles and piecewise-linear bins of numbers: compared with scikit-learn and NumPy."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import QuantileTransformer

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.fitted_transforms import FittedTransforms, find_rounded_columns, fit_transforms
from pipeline.data.sources import Dataset, DatasetPart
from pipeline.data.splits import make_splits
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.transforms import ArrayTransform, InputTransform, fit_input_transform, input_transform_from_json
from pipeline.data.transforms.number_encodings import MAX_NORMAL
from pipeline.errors import DataError
from pipeline.models import build_model
from tests.devices import require_device

CPU = torch.device("cpu")
ENCODINGS = ("robust", "quantile", "piecewise")


def make_job(encoding: str, *, source: Any = "parquet", **data: Any) -> JobConfig:
    data = {"source": source, **({"url": "x", "label": "y"} if source == "parquet" else {}), **data}
    if encoding == "piecewise":
        return build_job({"name": "t", "data": data, "model": {"numeric_embedding": "piecewise"}}, "test")
    return build_job({"name": "t", "data": {**data, "normalize": encoding}}, "test")


def make_table(inputs: np.ndarray, categories: dict[int, int] | None = None) -> Dataset:
    """Return a dataset of number columns, except for the given columns of so many categories."""
    columns = [
        Column(f"c{index}", "category", categories=tuple(map(str, range(categories[index]))))
        if categories and index in categories
        else Column(f"c{index}", "number")
        for index in range(inputs.shape[1])
    ]
    targets = np.arange(len(inputs)) % 2
    return Dataset(DatasetPart(inputs, targets), None, (), "fingerprint", Schema(tuple(columns)))


def fit(encoding: str, inputs: np.ndarray, rows: Any = None, **data: Any) -> InputTransform:
    indices = np.arange(len(inputs)) if rows is None else np.asarray(rows)
    return fit_input_transform(make_job(encoding, **data), make_table(inputs), indices)


def apply_transform(
    fitted: InputTransform, raw: np.ndarray, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> np.ndarray:
    rows = torch.from_numpy(raw.copy()).to(device)
    out = fitted.make_transform_fn(device, dtype)(rows)
    assert tuple(out.shape) == (len(raw), *fitted.output_shape)
    assert out.dtype == dtype
    transformed = out.cpu().numpy().copy()
    out.add_(1)
    assert np.array_equal(rows.cpu().numpy(), raw, equal_nan=True)  # never shares memory with the data
    return transformed


def smooth_clip(scaled: np.ndarray) -> np.ndarray:
    return scaled / np.sqrt(1 + (scaled / 3) ** 2)


def robust_reference(train: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """RealMLP's preprocessing (arXiv 2407.04491)."""
    first, median, third = np.nanquantile(train, [0.25, 0.5, 0.75], axis=0)
    scale = np.where(third > first, third - first, 0.5 * (np.nanmax(train, 0) - np.nanmin(train, 0)))
    factor = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return smooth_clip((np.where(np.isnan(raw), median, raw) - median) * factor)


def piecewise_reference(train: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Equation 1 of arXiv 2203.05556, for one column."""
    edges = np.unique(np.quantile(train, np.linspace(0, 1, 33)))
    parts, last = [], len(edges) - 2
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        part = (raw - low) / (high - low)
        part = np.where((raw < low) & (number > 0), 0, part)
        parts.append(np.where((raw >= high) & (number < last), 1, part))
    return np.stack(parts, 1)


def random_table(rows: int, seed: int = 0, missing: float = 0.1, dtype: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = [
        rng.normal(40, 12, rows),
        rng.standard_t(1.5, rows),  # outliers
        rng.integers(0, 5, rows),  # ties
        np.where(rng.random(rows) < 0.9, 0, rng.exponential(3, rows)),  # an interquartile range of 0
        1.7e9 + rng.normal(0, 1e5, rows),  # far from zero
    ]
    values = np.stack(columns, 1).astype(dtype)
    values[rng.random(values.shape) < missing] = np.nan
    return values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_robust_matches_its_formula(dtype: str) -> None:
    raw = random_table(500, dtype=dtype)
    out = apply_transform(fit("robust", raw, np.arange(300)), raw)
    np.testing.assert_allclose(out, robust_reference(raw[:300].astype(np.float64), raw.astype(np.float64)), atol=1e-9)
    assert np.abs(out).max() < 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [7, 400, 5_000])
def test_quantile_matches_scikit_learn(rows: int, dtype: str) -> None:
    raw = random_table(rows + 200, seed=rows, dtype=dtype)
    train, wide = np.arange(rows), raw.astype(np.float64)
    reference = QuantileTransformer(n_quantiles=min(1000, rows), output_distribution="normal", subsample=None).fit(
        wide[:rows]
    )
    # Of equal whole numbers, scikit-learn's rounding takes some for smaller ones.
    reference.quantiles_[:, 2] = np.round(reference.quantiles_[:, 2], 9)
    fitted = fit("quantile", raw, train)
    median = np.nanmedian(wide[:rows], 0)
    expected = reference.transform(np.where(np.isnan(wide), median, wide))
    out = apply_transform(fitted, raw)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    single = apply_transform(fitted, raw.astype(np.float32), torch.float32) if dtype == "float32" else out
    is_inside = np.abs(expected) < 3  # beyond, a difference of one rounding is far in the normal distribution
    np.testing.assert_allclose(single[is_inside], expected[is_inside], atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_piecewise_matches_the_definition(dtype: str) -> None:
    raw = random_table(700, missing=0, dtype=dtype)
    out, begin = apply_transform(fit("piecewise", raw, np.arange(500)), raw), 0
    for column in raw.astype(np.float64).T:
        expected = piecewise_reference(column[:500], column)
        np.testing.assert_allclose(out[:, begin : begin + expected.shape[1]], expected, atol=1e-9, rtol=1e-9)
        begin += expected.shape[1]
    assert begin == out.shape[1] == fit("piecewise", raw, np.arange(500)).num_numbers
    assert begin < 5 * 32  # columns with ties have fewer bins


NUMBERS = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0, -1.0])


@given(
    train=st.lists(NUMBERS, min_size=1, max_size=40),
    new=st.lists(NUMBERS | st.sampled_from([1e30, -1e30]), min_size=2, max_size=20),
    encoding=st.sampled_from(ENCODINGS),
    dtype=st.sampled_from(["float32", "float64"]),
    has_missing=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_encodings_are_monotone_finite_and_stored(
    train: list[float], new: list[float], encoding: str, dtype: str, has_missing: bool
) -> None:
    inputs = np.array([*train, *([np.nan] if has_missing else [])], dtype)[:, None]
    fitted = fit(encoding, inputs)
    stored = json.loads(json.dumps(fitted.to_json()))
    assert input_transform_from_json(stored) == fitted
    raw = np.sort(np.array([*train, *new], dtype))[:, None]
    for work in (torch.float32, torch.float64):
        out = apply_transform(fitted, raw, work)
        assert np.isfinite(out).all()
        tolerance = 1e-5 if encoding == "quantile" else 1e-6  # rounding, where the encoding is almost flat
        assert (np.diff(out, axis=0) >= -tolerance).all()
        if len(set(train)) == 1:
            assert not out.any(), "a constant stays 0, also for other values"
        elif encoding == "robust":
            assert np.abs(out).max() <= 3
        elif encoding == "quantile":
            assert np.abs(out).max() <= MAX_NORMAL * (1 + 1e-6)
            assert out[0] < 0 < out[-1]
    missing = apply_transform(fitted, np.array([[np.nan]], dtype))
    filled = apply_transform(fitted, np.array([[np.median(np.array(train, dtype).astype(np.float64))]], np.float64))
    np.testing.assert_allclose(missing, filled, atol=1e-3)


@given(rows=st.sets(st.integers(0, 39), min_size=1, max_size=39), encoding=st.sampled_from(ENCODINGS))
@settings(deadline=None, max_examples=40)
def test_only_training_rows_are_fitted(rows: set[int], encoding: str) -> None:
    indices, raw = np.array(sorted(rows)), random_table(40)
    changed = raw.copy()
    others = np.setdiff1d(np.arange(40), indices)
    changed[others] = 7 * random_table(len(others), 1)
    assert fit(encoding, raw, indices) == fit(encoding, changed, indices)


def test_empty_columns_become_zero() -> None:
    raw = random_table(20)
    raw[:10, 1] = np.nan
    for encoding in ENCODINGS:
        fitted = fit(encoding, raw, np.arange(10))
        assert input_transform_from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
        out = apply_transform(fitted, raw[:, :])
        column = 1 if encoding != "piecewise" else len(fitted.knots[0]) - 1
        assert not out[:, column].any()


def test_small_differences_of_large_numbers_are_kept() -> None:
    raw = (1.7e9 + np.arange(1000.0))[:, None]
    for encoding in ENCODINGS:
        out = apply_transform(fit(encoding, raw), raw, torch.float32)
        assert (np.diff(out.sum(1)) > 0).all()
        assert fit(encoding, raw).to_json()["dtype"] == "float64"


def test_very_small_numbers_are_not_at_the_ends() -> None:
    raw = np.random.default_rng(0).normal(size=(1000, 1)) * 1e-12
    out = apply_transform(fit("quantile", raw), raw)
    assert abs(out.std() - 1) < 0.05  # scikit-learn would take all of them for the smallest


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_numbers_come_before_one_hot_columns_and_codes(encoding: str) -> None:
    raw = random_table(300, missing=0)
    raw[:, 0], raw[:, 1] = np.arange(300) % 3, np.arange(300) % 40
    dataset = make_table(raw, {0: 3, 1: 40})
    job = make_job(encoding)
    fitted = fit_input_transform(job, dataset, np.arange(300))
    alone = fit(encoding, raw[:, 2:])
    assert fitted.num_numbers == alone.output_shape[0]
    out = apply_transform(fitted, raw)
    np.testing.assert_array_equal(out[:, : fitted.num_numbers], apply_transform(alone, raw[:, 2:]))
    assert np.array_equal(out[:, fitted.num_numbers :][:, :3].argmax(1), raw[:, 0])
    assert np.array_equal(out[:, -1], raw[:, 1] + 1)
    model = build_model(job, fitted.output_shape, 2, 0, fitted.code_sizes)
    assert model(torch.from_numpy(out).float()).shape == (300, 2)
    assert dataset.schema is not None
    reversed_schema = Schema(dataset.schema.columns[::-1])
    reordered = fitted.make_transform_fn(CPU, torch.float64, reversed_schema)(torch.from_numpy(raw[:, ::-1].copy()))
    np.testing.assert_array_equal(reordered, out)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays_are_encoded_as_tables(encoding: str, dtype: str) -> None:
    raw = random_table(200, missing=0, dtype=dtype)
    job = make_job(encoding, source={"call": "m:f"})
    fitted = fit_input_transform(job, Dataset(DatasetPart(raw, np.zeros(200)), None, (), "f"), np.arange(150))
    assert isinstance(fitted, ArrayTransform)
    assert input_transform_from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
    table = fit(encoding, raw, np.arange(150))
    np.testing.assert_array_equal(apply_transform(fitted, raw), apply_transform(table, raw))
    assert fitted.num_numbers == table.num_numbers == fitted.output_shape[0]


@pytest.mark.parametrize(
    ("encoding", "where"),
    [("robust", "data.normalize"), ("quantile", "data.normalize"), ("piecewise", "model.numeric_embedding")],
)
@pytest.mark.parametrize(
    "inputs", [np.zeros((5, 8, 8), np.uint8), np.zeros((5, 3)).astype(np.uint8), np.zeros((5, 1, 2, 2))]
)
def test_images_are_refused(encoding: str, where: str, inputs: np.ndarray) -> None:
    dataset = Dataset(DatasetPart(inputs, np.zeros(5, np.int64)), None, (), "f")
    with pytest.raises(DataError, match=f"{encoding} is for columns of numbers") as error:
        fit_input_transform(make_job(encoding, source={"call": "m:f"}), dataset, np.arange(5))
    assert error.value.where == where
    assert error.value.fix


def fit_all(encoding: str, dataset: Dataset) -> FittedTransforms:
    job = make_job(encoding)
    return fit_transforms(job, dataset, make_splits(job, dataset))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rounding_is_compared_with_the_scale(encoding: str) -> None:
    inputs = np.stack([np.full(100, 3.0), np.arange(100.0), np.arange(100.0)], 1)
    dataset = make_table(inputs)
    fitted = fit_all(encoding, dataset)
    coarse = Dataset(**{**vars(dataset), "rounding_errors": np.array([1.0, 0.1, 1e-9])})
    assert find_rounded_columns(make_job(encoding), coarse, fitted) == (
        ["c1"] if encoding == "robust" else ["c0", "c1"]
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_devices_give_the_same_result(kind: str, encoding: str) -> None:
    device, raw = require_device(kind), random_table(500, missing=0.1)
    fitted = fit(encoding, raw, np.arange(400))
    np.testing.assert_allclose(
        apply_transform(fitted, raw, torch.float32, device), apply_transform(fitted, raw), atol=1e-4
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"encoding": "other"},
        {"encoding": "robust"},
        {"encoding": None},
        {"knots": []},
        {"knots": [[2.0, 1.0]]},
        {"knots": [["a"]]},
        {"knots": [[]]},
    ],
)
def test_damaged_knots_are_rejected(damage: dict[str, Any]) -> None:
    stored = fit("quantile", np.arange(5.0)[:, None]).to_json()
    assert stored["version"] == 4, "earlier versions of the program must refuse it"
    if "knots" in damage:
        stored["columns"][0] |= damage
    else:
        stored |= damage
    with pytest.raises(DataError, match=r"preprocess\.json"):
        input_transform_from_json(stored)
