"""Transforms of tables: compared with NumPy and scikit-learn, and fitted on the training rows only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data import statistics
from pipeline.data.sources import Dataset, DatasetPart
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.transforms import TabularTransform, fit_input_transform, input_transform_from_json
from pipeline.data.transforms.column_statistics import compute_statistics
from pipeline.errors import DataError
from tests.devices import require_device

CPU = torch.device("cpu")
PLANS = ("basic", "free", "gold", "pro")
SCHEMA = Schema(
    (
        Column("age", "number"),
        Column("plan", "category", categories=PLANS),
        Column("taste", "number", 2),
        Column("city", "category", categories=("Aachen", "Bonn", "Celle")),
    )
)


def make_job(**data: Any) -> JobConfig:
    return build_job({"name": "t", "data": {"source": "parquet", "url": "x", "label": "y", **data}}, "test")


def make_dataset(inputs: np.ndarray, schema: Schema = SCHEMA) -> Dataset:
    return Dataset(DatasetPart(inputs, np.zeros(len(inputs), np.int64)), None, (), "fingerprint", schema)


def fit_table(inputs: np.ndarray, indices: Any, schema: Schema = SCHEMA, **data: Any) -> TabularTransform:
    fitted = fit_input_transform(make_job(**data), make_dataset(inputs, schema), np.asarray(indices))
    assert isinstance(fitted, TabularTransform)
    return fitted


def apply_transform(fitted: TabularTransform, raw: np.ndarray, schema: Schema | None = SCHEMA) -> np.ndarray:
    rows = torch.from_numpy(raw.copy())
    out = fitted.make_transform_fn(CPU, torch.float64, schema)(rows)
    assert tuple(out.shape) == (len(raw), *fitted.output_shape)
    transformed = out.numpy().copy()
    out.add_(1)
    assert np.array_equal(rows.numpy(), raw, equal_nan=True)  # never shares memory with the data
    return transformed


def random_table(rows: int, seed: int = 0, missing: float = 0.2, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = np.stack(
        [
            rng.normal(40, 12, rows),
            rng.integers(0, 4, rows),
            rng.normal(-3, 1, rows),
            1e6 + rng.normal(0, 1e3, rows),
            rng.integers(0, 3, rows),
        ],
        axis=1,
    ).astype(dtype)
    values[rng.random(values.shape) < missing] = np.nan
    return values


NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5])


@given(
    columns=st.lists(st.lists(NUMBERS | st.just(float("nan")), min_size=7, max_size=7), min_size=1, max_size=3),
    rows=st.sets(st.integers(0, 6), min_size=1),
    dtype=st.sampled_from(["float32", "float64"]),
    block=st.sampled_from([1, 5, 1 << 20]),
)
@settings(deadline=None, max_examples=150)
def test_medians_and_moments_match_numpy(columns: list[list[float]], rows: set[int], dtype: str, block: int) -> None:
    inputs = np.array(columns).T.astype(dtype)
    indices = np.array(sorted(rows))
    schema = Schema(tuple(Column(str(column), "number") for column in range(len(columns))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK_VALUES", block)
        computed = compute_statistics(inputs, indices, schema, probabilities=(0.5,))
    selected = inputs[indices].astype(np.float64)
    assert set(computed.quantiles) == {0.5}
    for column, values in enumerate(selected.T):
        values = values[~np.isnan(values)]
        assert computed.num_present[column] == len(values)
        if len(values):
            assert computed.quantiles[0.5][column] == np.median(values)
            scale = np.abs(values).max()
            assert abs(computed.mean[column] - values.mean()) <= 1e-12 * scale
            assert abs(np.sqrt(computed.variance[column]) - values.std()) <= 1e-7 * scale
        if len(set(values.tolist())) == 1:
            assert computed.variance[column] == 0


def test_medians_of_many_rows_match_numpy() -> None:
    values = np.random.default_rng(3).standard_t(2, (100_001, 3)) * [1e-30, 1, 1e30]
    values[::7, 1], values[1::7, 1] = np.nan, -np.nan  # either sign counts as missing
    schema = Schema((Column("x", "number", 3),))
    for dtype in ("float32", "float64"):
        inputs = values.astype(dtype)
        computed = compute_statistics(inputs, np.arange(100_000), schema, probabilities=(0.5,))
        assert set(computed.quantiles) == {0.5}
        assert computed.quantiles[0.5].tolist() == np.nanmedian(inputs[:100_000].astype(np.float64), axis=0).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strategy", ["median", "mean", 7.5])
def test_transform_matches_scikit_learn(strategy: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 100)
    raw, indices = random_table(300, dtype=dtype), np.arange(40, 300)
    fitted = fit_table(raw, indices, missing={"numeric": strategy})
    text = {
        "plan": np.array([*PLANS, "without"], dtype=object)[np.where(np.isnan(raw[:, 1]), 4, raw[:, 1]).astype(int)],
        "city": np.where(np.isnan(raw[:, 4]), 3, raw[:, 4]),
    }
    frame = pd.DataFrame({"a": raw[:, 0], "b": raw[:, 2], "c": raw[:, 3], **text}).astype(dict.fromkeys("abc", "f8"))
    filler = (
        SimpleImputer(strategy=strategy)
        if isinstance(strategy, str)
        else SimpleImputer(strategy="constant", fill_value=strategy)
    )
    reference = ColumnTransformer(
        [
            ("numbers", make_pipeline(filler, StandardScaler()), ["a", "b", "c"]),
            ("categories", OneHotEncoder(sparse_output=False, handle_unknown="ignore"), ["plan", "city"]),
        ]
    ).fit(frame.iloc[indices])
    np.testing.assert_allclose(apply_transform(fitted, raw), reference.transform(frame), atol=1e-9, rtol=1e-9)
    if dtype == "float32":
        single = fitted.make_transform_fn(CPU, torch.float32, SCHEMA)(torch.from_numpy(raw))
        np.testing.assert_allclose(single, reference.transform(frame), atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 1000), rows=st.sets(st.integers(0, 39), min_size=1, max_size=39), data=st.data())
@settings(deadline=None, max_examples=60)
def test_statistics_use_training_rows_only(seed: int, rows: set[int], data: st.DataObject) -> None:
    raw, indices = random_table(40, seed), np.array(sorted(rows))
    others = np.setdiff1d(np.arange(40), indices)
    changed = raw.copy()
    changed[others] = random_table(len(others), data.draw(st.integers(0, 1000)), missing=0.5)
    options: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {
                "missing": st.fixed_dictionaries(
                    {
                        "numeric": st.sampled_from(["median", "mean", 3.0]),
                        "categorical": st.sampled_from(["own_level", "Bonn", "elsewhere"]),
                    }
                ),
                "normalize": st.sampled_from(["auto", "scalar", "none"]),
                "one_hot_up_to": st.integers(0, 4),
            }
        )
    )
    first, second = (fit_table(values, indices, **options) for values in (raw, changed))
    stored = json.dumps(first.to_json())
    assert stored == json.dumps(second.to_json())
    assert input_transform_from_json(json.loads(stored)) == first
    assert np.isfinite(apply_transform(first, raw)).all()


def test_category_codes_and_unseen_values() -> None:
    schema = Schema((Column("plan", "category", categories=PLANS), Column("size", "number")))
    raw = np.array([[3, 1], [0, 2], [np.nan, 3], [2, 4], [4, 5]], np.float32)  # 4: not one of the four categories
    one_hot = fit_table(raw, [0, 1, 2], schema, normalize="none")
    assert one_hot.schema.columns[0].categories == ("basic", "pro")  # in the source's order, of the training rows only
    assert (one_hot.output_shape, one_hot.code_sizes) == ((4,), ())
    expected = [[1, 0, 1, 0], [2, 1, 0, 0], [3, 0, 0, 1], [4, 0, 0, 0], [5, 0, 0, 0]]
    assert apply_transform(one_hot, raw, schema).tolist() == expected
    codes = fit_table(raw, [0, 1, 2], schema, normalize="none", one_hot_up_to=2)
    assert (codes.output_shape, codes.code_sizes) == ((2,), (4,))
    assert apply_transform(codes, raw, schema).tolist() == [[1, 2], [2, 1], [3, 3], [4, 0], [5, 0]]
    # New data has the codes of the fitted categories: basic, pro, and 2 for any other.
    new = np.array([[0, 1], [1, 1], [2, 1], [np.nan, 1]], np.float32)
    assert apply_transform(codes, new, None).tolist() == [[1, 1], [1, 2], [1, 0], [1, 3]]


def test_embedded_columns_follow_one_hot_columns() -> None:
    raw = random_table(60, missing=0)
    fitted = fit_table(raw, np.arange(60), normalize="none", one_hot_up_to=3)
    assert fitted.code_sizes == (5,)  # plan
    assert fitted.output_shape == (3 + 3 + 1,)
    out = apply_transform(fitted, raw)
    assert np.array_equal(out[:, :3], raw[:, [0, 2, 3]])
    assert np.array_equal(out[:, 3:6].argmax(1), raw[:, 4])
    assert np.array_equal(out[:, 6], raw[:, 1] + 1)
    only_categories = Schema(SCHEMA.columns[1:2])
    assert apply_transform(
        fit_table(raw[:, 1:2], np.arange(60), only_categories), raw[:, 1:2], only_categories
    ).shape == (
        60,
        4,
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_all_devices_give_the_same_result(kind: str) -> None:
    device = require_device(kind)
    raw = random_table(200)
    fitted = fit_table(raw, np.arange(150), one_hot_up_to=4)
    out = fitted.make_transform_fn(device, torch.float32, SCHEMA)(torch.from_numpy(raw).to(device))
    assert (out.device.type, out.dtype) == (kind, torch.float32)
    np.testing.assert_allclose(out.cpu(), apply_transform(fitted, raw), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "categories", "last"),
    [
        ("own_level", ("basic", "pro"), [0, 0, 1]),
        ("pro", ("basic", "pro"), [0, 1]),
        ("none", ("basic", "pro", "none"), [0, 0, 1]),
    ],
)
def test_missing_categories_are_encoded_by_strategy(
    strategy: str, categories: tuple[str, ...], last: list[int]
) -> None:
    schema = Schema((Column("plan", "category", categories=PLANS),))
    raw = np.array([[0], [3], [np.nan]], np.float32)
    fitted = fit_table(raw, [0, 1, 2], schema, missing={"categorical": strategy})
    assert fitted.schema.columns[0].categories == categories
    assert apply_transform(fitted, raw, schema)[2].tolist() == last
    never = fit_table(raw, [0, 1], schema, missing={"categorical": strategy})
    assert never.schema.columns[0].categories == ("basic", "pro")
    assert apply_transform(never, raw, schema)[2].tolist() == ([0, 1] if strategy == "pro" else [0, 0])


def test_column_without_values_becomes_zero() -> None:
    raw = random_table(10)
    raw[:, 0] = np.nan
    for strategy in ("median", "mean"):
        assert (apply_transform(fit_table(raw, np.arange(10), missing={"numeric": strategy}), raw)[:, 0] == 0).all()


@pytest.mark.parametrize("constant", [0.1, 1e9, -3.0])
@pytest.mark.parametrize("missing", [False, True])
def test_constant_column_becomes_zero(constant: float, missing: bool) -> None:
    raw = np.full((1000, 1), constant, np.float32)
    raw[::3] = np.nan if missing else constant
    schema = Schema((Column("x", "number"),))
    fitted = fit_table(raw, np.arange(1000), schema)
    assert fitted.std == (1.0,)
    assert (fitted.make_transform_fn(CPU, torch.float32)(torch.from_numpy(raw)).abs() <= 1e-6 * abs(constant)).all()


def test_large_offsets_keep_precision() -> None:
    raw = (1.7e9 + 1000 + 128 * np.arange(-512, 513)[:, None]).astype(np.float32)  # seconds since 1970
    schema = Schema((Column("seconds", "number"),))
    exact = raw.astype(np.float64)
    single = fit_table(raw, np.arange(1025), schema).make_transform_fn(CPU, torch.float32)(torch.from_numpy(raw))
    np.testing.assert_allclose(single, (exact - exact.mean()) / exact.std(), atol=1e-6)


def test_scalar_and_explicit_normalization() -> None:
    raw = random_table(50, missing=0)
    numbers = raw[:, [0, 2, 3]].astype(np.float64)
    scalar = apply_transform(fit_table(raw, np.arange(50), normalize="scalar"), raw)[:, :3]
    np.testing.assert_allclose(scalar, (numbers - numbers.mean()) / numbers.std(), atol=1e-9)
    for given_numbers in ({"mean": 2, "std": 4}, {"mean": [1, 2, 3], "std": [1, 2, 4]}):
        fixed = apply_transform(fit_table(raw, np.arange(50), normalize=given_numbers), raw)[:, :3]
        np.testing.assert_allclose(fixed, (numbers - given_numbers["mean"]) / given_numbers["std"])


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"normalize": "unit"}, "data.normalize", ["unit", "table"]),
        ({"normalize": "imagenet"}, "data.normalize", ["imagenet", "table"]),
        ({"normalize": {"mean": [1, 2], "std": 1}}, "data.normalize.mean", ["2 numbers for 3"]),
        ({"missing": {"numeric": "fail"}}, "data.missing.numeric", ["1 of 8", "'taste'", "row 7"]),
        ({"missing": {"categorical": "fail"}}, "data.missing.categorical", ["2 of 8", "'city'", "row 5"]),
    ],
)
def test_incompatible_tables_are_rejected(options: dict[str, Any], where: str, words: list[str]) -> None:
    raw = random_table(8, missing=0)
    raw[7, 3] = raw[5, 4] = raw[6, 4] = np.nan
    with pytest.raises(DataError) as error:
        fit_table(raw, np.arange(5), **options)
    assert error.value.where == where
    assert all(word in error.value.what for word in words)
    assert error.value.fix


def test_missing_numbers_in_new_rows_are_rejected_on_request() -> None:
    clean = random_table(8, missing=0)
    transform = fit_table(clean, np.arange(8), missing={"numeric": "fail"})
    transform.check_missing_values(clean)
    with_missing = clean.copy()
    with_missing[2, 4] = np.nan  # a category: may be missing
    transform.check_missing_values(with_missing)
    with_missing[2, 0] = np.nan
    with pytest.raises(DataError, match="'age'"):
        transform.check_missing_values(with_missing)
    fit_table(clean, np.arange(8)).check_missing_values(with_missing)


def test_memory_mapped_data_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_table(2_000)
    np.save(tmp_path / "table.npy", raw)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 64 * 5)
    fitted = fit_table(mapped, np.arange(0, 2_000, 2), missing={"numeric": "median", "categorical": "own_level"})
    monkeypatch.undo()
    whole = fit_table(raw, np.arange(0, 2_000, 2))
    assert fitted.fill == whole.fill
    np.testing.assert_allclose(fitted.std, whole.std, rtol=1e-12)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 1},
        {"columns": None},
        {"columns": [{"name": "x", "kind": "number", "fill": [1], "mean": [1, 2], "std": [1]}]},
        {"columns": [{"name": "x", "kind": "text"}]},
        {"one_hot_up_to": "many"},
    ],
)
def test_damaged_statistics_are_rejected(damage: dict[str, Any]) -> None:
    stored = fit_table(random_table(20), np.arange(20)).to_json()
    with pytest.raises(DataError, match=r"preprocess\.json"):
        input_transform_from_json({**stored, **damage})
