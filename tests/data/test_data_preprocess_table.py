"""Preprocessing of tables: held against NumPy and scikit-learn, and fitted on the training rows alone."""

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

from pipeline.data import statistics
from pipeline.data.preprocess import TablePreprocess, fit_preprocess, preprocess_from_json
from pipeline.data.preprocess.passes import look
from pipeline.data.sources import Arrays, Source
from pipeline.data.tables.schema import Column, Schema
from pipeline.errors import DataError
from pipeline.job import Job
from pipeline.job_file import build_job

CPU = torch.device("cpu")
PLANS = ("basic", "free", "gold", "pro")
SCHEMA = Schema(
    (
        Column("age", "number"),
        Column("plan", "category", levels=PLANS),
        Column("taste", "number", 2),
        Column("city", "category", levels=("Aachen", "Bonn", "Celle")),
    )
)


def job(**data: Any) -> Job:
    return build_job({"name": "t", "data": {"source": "parquet", "url": "x", "label": "y", **data}}, "test")


def source(inputs: np.ndarray, schema: Schema = SCHEMA) -> Source:
    return Source(Arrays(inputs, np.zeros(len(inputs), np.int64)), None, (), "fingerprint", schema)


def fit(inputs: np.ndarray, rows: Any, schema: Schema = SCHEMA, **data: Any) -> TablePreprocess:
    fitted = fit_preprocess(job(**data), source(inputs, schema), np.asarray(rows))
    assert isinstance(fitted, TablePreprocess)
    return fitted


def prepared(fitted: TablePreprocess, raw: np.ndarray, schema: Schema | None = SCHEMA) -> np.ndarray:
    rows = torch.from_numpy(raw.copy())
    out = fitted.to(CPU, torch.float64, schema)(rows)
    assert tuple(out.shape) == (len(raw), *fitted.output_shape)
    again = out.numpy().copy()
    out.add_(1)
    assert np.array_equal(rows.numpy(), raw, equal_nan=True)  # never shares memory with the data
    return again


def make(rows: int, seed: int = 0, missing: float = 0.2, dtype: str = "float32") -> np.ndarray:
    draws = np.random.default_rng(seed)
    values = np.stack(
        [
            draws.normal(40, 12, rows),
            draws.integers(0, 4, rows),
            draws.normal(-3, 1, rows),
            1e6 + draws.normal(0, 1e3, rows),
            draws.integers(0, 3, rows),
        ],
        axis=1,
    ).astype(dtype)
    values[draws.random(values.shape) < missing] = np.nan
    return values


NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5])


@given(
    columns=st.lists(st.lists(NUMBERS | st.just(float("nan")), min_size=7, max_size=7), min_size=1, max_size=3),
    rows=st.sets(st.integers(0, 6), min_size=1),
    dtype=st.sampled_from(["float32", "float64"]),
    block=st.sampled_from([1, 5, 1 << 20]),
)
@settings(deadline=None, max_examples=150)
def test_medians_and_moments_are_numpys(columns: list[list[float]], rows: set[int], dtype: str, block: int) -> None:
    inputs = np.array(columns).T.astype(dtype)
    ids = np.array(sorted(rows))
    schema = Schema(tuple(Column(str(column), "number") for column in range(len(columns))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK_VALUES", block)
        seen = look(inputs, ids, schema, medians=True)
    chosen = inputs[ids].astype(np.float64)
    assert seen.median is not None
    for column, values in enumerate(chosen.T):
        values = values[~np.isnan(values)]
        assert seen.present[column] == len(values)
        if len(values):
            assert seen.median[column] == np.median(values)
            scale = np.abs(values).max()
            assert abs(seen.mean[column] - values.mean()) <= 1e-12 * scale
            assert abs(np.sqrt(seen.variance[column]) - values.std()) <= 1e-7 * scale
        if len(set(values.tolist())) == 1:
            assert seen.variance[column] == 0


def test_medians_of_many_rows() -> None:
    values = np.random.default_rng(3).standard_t(2, (100_001, 3)) * [1e-30, 1, 1e30]
    values[::7, 1], values[1::7, 1] = np.nan, -np.nan  # either sign counts as missing
    schema = Schema((Column("x", "number", 3),))
    for dtype in ("float32", "float64"):
        inputs = values.astype(dtype)
        seen = look(inputs, np.arange(100_000), schema, medians=True)
        assert seen.median is not None
        assert seen.median.tolist() == np.nanmedian(inputs[:100_000].astype(np.float64), axis=0).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strategy", ["median", "mean", 7.5])
def test_equals_scikit_learn(strategy: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 100)
    raw, rows = make(300, dtype=dtype), np.arange(40, 300)
    fitted = fit(raw, rows, missing={"numeric": strategy})
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
            ("levels", OneHotEncoder(sparse_output=False, handle_unknown="ignore"), ["plan", "city"]),
        ]
    ).fit(frame.iloc[rows])
    np.testing.assert_allclose(prepared(fitted, raw), reference.transform(frame), atol=1e-9, rtol=1e-9)
    if dtype == "float32":
        single = fitted.to(CPU, torch.float32, SCHEMA)(torch.from_numpy(raw))
        np.testing.assert_allclose(single, reference.transform(frame), atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 1000), rows=st.sets(st.integers(0, 39), min_size=1, max_size=39), data=st.data())
@settings(deadline=None, max_examples=60)
def test_what_is_fitted_depends_on_no_other_row(seed: int, rows: set[int], data: st.DataObject) -> None:
    raw, ids = make(40, seed), np.array(sorted(rows))
    others = np.setdiff1d(np.arange(40), ids)
    changed = raw.copy()
    changed[others] = make(len(others), data.draw(st.integers(0, 1000)), missing=0.5)
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
    first, second = (fit(values, ids, **options) for values in (raw, changed))
    stored = json.dumps(first.to_json())
    assert stored == json.dumps(second.to_json())
    assert preprocess_from_json(json.loads(stored)) == first
    assert np.isfinite(prepared(first, raw)).all()


def test_levels_codes_and_what_is_unseen() -> None:
    schema = Schema((Column("plan", "category", levels=PLANS), Column("size", "number")))
    raw = np.array([[3, 1], [0, 2], [np.nan, 3], [2, 4], [4, 5]], np.float32)  # 4: beyond the four levels
    one_hot = fit(raw, [0, 1, 2], schema, normalize="none")
    assert one_hot.schema.columns[0].levels == ("basic", "pro")  # in the source's order, of the training rows alone
    assert (one_hot.output_shape, one_hot.code_sizes) == ((4,), ())
    expected = [[1, 0, 1, 0], [2, 1, 0, 0], [3, 0, 0, 1], [4, 0, 0, 0], [5, 0, 0, 0]]
    assert prepared(one_hot, raw, schema).tolist() == expected
    codes = fit(raw, [0, 1, 2], schema, normalize="none", one_hot_up_to=2)
    assert (codes.output_shape, codes.code_sizes) == ((2,), (4,))
    assert prepared(codes, raw, schema).tolist() == [[1, 2], [2, 1], [3, 3], [4, 0], [5, 0]]
    # New data comes by the fitted levels: basic, pro, and 2 for any other.
    new = np.array([[0, 1], [1, 1], [2, 1], [np.nan, 1]], np.float32)
    assert prepared(codes, new, None).tolist() == [[1, 1], [1, 2], [1, 0], [1, 3]]


def test_large_columns_come_behind_small_ones() -> None:
    raw = make(60, missing=0)
    fitted = fit(raw, np.arange(60), normalize="none", one_hot_up_to=3)
    assert fitted.code_sizes == (5,)  # plan
    assert fitted.output_shape == (3 + 3 + 1,)
    out = prepared(fitted, raw)
    assert np.array_equal(out[:, :3], raw[:, [0, 2, 3]])
    assert np.array_equal(out[:, 3:6].argmax(1), raw[:, 4])
    assert np.array_equal(out[:, 6], raw[:, 1] + 1)
    only_levels = Schema(SCHEMA.columns[1:2])
    assert prepared(fit(raw[:, 1:2], np.arange(60), only_levels), raw[:, 1:2], only_levels).shape == (60, 4)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_device_gives_the_same(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    raw = make(200)
    fitted = fit(raw, np.arange(150), one_hot_up_to=4)
    out = fitted.to(torch.device(kind), torch.float32, SCHEMA)(torch.from_numpy(raw).to(kind))
    assert (out.device.type, out.dtype) == (kind, torch.float32)
    np.testing.assert_allclose(out.cpu(), prepared(fitted, raw), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("stand_in", "levels", "last"),
    [
        ("own_level", ("basic", "pro"), [0, 0, 1]),
        ("pro", ("basic", "pro"), [0, 1]),
        ("none", ("basic", "pro", "none"), [0, 0, 1]),
    ],
)
def test_what_a_missing_level_counts_as(stand_in: str, levels: tuple[str, ...], last: list[int]) -> None:
    schema = Schema((Column("plan", "category", levels=PLANS),))
    raw = np.array([[0], [3], [np.nan]], np.float32)
    fitted = fit(raw, [0, 1, 2], schema, missing={"categorical": stand_in})
    assert fitted.schema.columns[0].levels == levels
    assert prepared(fitted, raw, schema)[2].tolist() == last
    never = fit(raw, [0, 1], schema, missing={"categorical": stand_in})
    assert never.schema.columns[0].levels == ("basic", "pro")
    assert prepared(never, raw, schema)[2].tolist() == ([0, 1] if stand_in == "pro" else [0, 0])


def test_a_column_without_any_value_becomes_zero() -> None:
    raw = make(10)
    raw[:, 0] = np.nan
    for strategy in ("median", "mean"):
        assert (prepared(fit(raw, np.arange(10), missing={"numeric": strategy}), raw)[:, 0] == 0).all()


@pytest.mark.parametrize("constant", [0.1, 1e9, -3.0])
@pytest.mark.parametrize("missing", [False, True])
def test_a_constant_column_becomes_zero(constant: float, missing: bool) -> None:
    raw = np.full((1000, 1), constant, np.float32)
    raw[::3] = np.nan if missing else constant
    schema = Schema((Column("x", "number"),))
    fitted = fit(raw, np.arange(1000), schema)
    assert fitted.std == (1.0,)
    assert (fitted.to(CPU, torch.float32)(torch.from_numpy(raw)).abs() <= 1e-6 * abs(constant)).all()


def test_columns_far_from_zero_keep_their_digits() -> None:
    raw = (1.7e9 + 1000 + 128 * np.arange(-512, 513)[:, None]).astype(np.float32)  # seconds since 1970
    schema = Schema((Column("seconds", "number"),))
    exact = raw.astype(np.float64)
    single = fit(raw, np.arange(1025), schema).to(CPU, torch.float32)(torch.from_numpy(raw))
    np.testing.assert_allclose(single, (exact - exact.mean()) / exact.std(), atol=1e-6)


def test_scalar_and_given_normalisations() -> None:
    raw = make(50, missing=0)
    numbers = raw[:, [0, 2, 3]].astype(np.float64)
    scalar = prepared(fit(raw, np.arange(50), normalize="scalar"), raw)[:, :3]
    np.testing.assert_allclose(scalar, (numbers - numbers.mean()) / numbers.std(), atol=1e-9)
    for given_numbers in ({"mean": 2, "std": 4}, {"mean": [1, 2, 3], "std": [1, 2, 4]}):
        fixed = prepared(fit(raw, np.arange(50), normalize=given_numbers), raw)[:, :3]
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
def test_what_does_not_fit(options: dict[str, Any], where: str, words: list[str]) -> None:
    raw = make(8, missing=0)
    raw[7, 3] = raw[5, 4] = raw[6, 4] = np.nan
    with pytest.raises(DataError) as refused:
        fit(raw, np.arange(5), **options)
    assert refused.value.where == where
    assert all(word in refused.value.what for word in words)
    assert refused.value.fix


def test_new_rows_are_checked_as_the_job_says() -> None:
    clean = make(8, missing=0)
    strict = fit(clean, np.arange(8), missing={"numeric": "fail"})
    strict.check(clean)
    holed = clean.copy()
    holed[2, 4] = np.nan  # a level: not refused
    strict.check(holed)
    holed[2, 0] = np.nan
    with pytest.raises(DataError, match="'age'"):
        strict.check(holed)
    fit(clean, np.arange(8)).check(holed)


def test_larger_than_memory_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make(2_000)
    np.save(tmp_path / "table.npy", raw)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 64 * 5)
    fitted = fit(mapped, np.arange(0, 2_000, 2), missing={"numeric": "median", "categorical": "own_level"})
    monkeypatch.undo()
    whole = fit(raw, np.arange(0, 2_000, 2))
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
def test_damaged_ones_are_refused(damage: dict[str, Any]) -> None:
    stored = fit(make(20), np.arange(20)).to_json()
    with pytest.raises(DataError, match=r"preprocess\.json"):
        preprocess_from_json({**stored, **damage})
