"""`data.features: auto` and `data.exclude`: which columns are left out, why, and what is stored of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.errors import DataError
from pipeline.setup import PreparedData, prepare_all_rows, prepare_data
from tests.data.parquet_jobs import write_parquet

ROWS = 2_000


def make_job(url: str | Path, **data: Any) -> JobConfig:
    task = data.pop("task", "binary")
    table = {"source": "parquet", "url": str(url), "label": "y", "features": "auto", **data}
    return build_job({"name": "t", "task": task, "data": table}, "test")


def make_columns(rows: int = ROWS) -> dict[str, Any]:
    """A label and columns that can be features: two of numbers, one of text, one of lists."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, rows)
    return {
        "x": draw.normal(size=rows) + y,
        "whole": draw.integers(0, 50, rows),
        "city": draw.choice(["Rom", "Ulm", "Bonn"], rows),
        "pair": pa.array(draw.normal(size=(rows, 2)).tolist(), pa.list_(pa.float64())),
        "y": y,
    }


def feature_names(prepared: PreparedData) -> list[str]:
    assert prepared.dataset.schema is not None
    return [column.name for column in prepared.dataset.schema.columns]


def make_unhelpful_columns(y: np.ndarray) -> dict[str, tuple[Any, str]]:
    rows = len(y)
    draw = np.random.default_rng(1)
    return {
        "remark": ([f"remark {i}" for i in range(rows)], "almost unique text (2,000 different values in 2,000 rows)"),
        "mail": ([None if i % 2 else f"{i}@x" for i in range(rows)], "almost unique text (1,000 different values in"),
        "nested": ([{"a": 1}] * rows, "neither numbers nor text"),
        "ragged": ([[1.0] * (1 + i % 2) for i in range(rows)], "1 to 2 elements"),
        "nothing": (pa.nulls(rows), "no value in any row"),
        "blank": (pa.array([None] * rows, pa.string()), "no value in any row"),
        "empty": (pa.array([None] * rows, pa.float32()), "no value in all training rows"),
        "same": ([7] * rows, "the same value in all training rows"),
        "one": (["a"] * rows, "the same value in all training rows"),
        "id": (draw.permutation(rows) + 1, "numbers the rows"),
        "copy": (np.where(y == 1, "yes", "no"), "alone predicts the label"),
        "score": (y + draw.random(rows) / 2, "alone predicts the label"),
    }


@pytest.mark.parametrize("in_memory_mb", [256.0, 0.0])
def test_each_unhelpful_column_is_left_out_with_its_reason(tmp_path: Path, in_memory_mb: float) -> None:
    columns = make_columns()
    unhelpful = make_unhelpful_columns(columns["y"])
    values_by_name = {name: values for name, (values, _) in unhelpful.items()}
    url = write_parquet(tmp_path / "t.parquet", {**columns, **values_by_name})
    cache = {"folder": str(tmp_path / "cache"), "in_memory_mb": in_memory_mb}
    job = make_job(url, cache=cache)
    for _ in range(2):  # the second time from the cache
        prepared = prepare_data(job)
        assert feature_names(prepared) == ["x", "whole", "city", "pair"]
        assert set(prepared.dataset.left_out) == set(unhelpful)
        for name, (_, text) in unhelpful.items():
            assert text in prepared.dataset.left_out[name]
            assert any(warning.startswith(f"column {name!r} is left out: it") for warning in prepared.warnings)
        assert any("to keep a left-out column" in warning for warning in prepared.warnings)
    stored = FittedTransforms.from_json(prepared.fitted.to_json())
    assert stored == prepared.fitted
    assert dict(stored.left_out) == dict(prepared.dataset.left_out)
    explicit = prepare_data(make_job(url, features=["x", "whole", "city", "pair"], cache=cache))
    np.testing.assert_array_equal(prepared.dataset.train.inputs, explicit.dataset.train.inputs)
    assert prepared.fitted.input_transform == explicit.fitted.input_transform


def test_a_resume_and_other_data_take_the_columns_that_were_fitted(tmp_path: Path) -> None:
    columns = make_columns()
    url = write_parquet(tmp_path / "t.parquet", {**columns, "same": [7] * ROWS})
    fitted = prepare_data(make_job(url)).fitted
    resumed = prepare_data(make_job(url), fitted=fitted)
    assert feature_names(resumed) == ["x", "whole", "city", "pair"]
    assert not [warning for warning in resumed.warnings if "left out" in warning]
    part = {name: values[:50] for name, values in columns.items()}  # here `whole` would not be left out ...
    part["whole"] = np.zeros(50, np.int64)  # ... nor is it now that it is constant
    other = prepare_all_rows(make_job(write_parquet(tmp_path / "other.parquet", part)), fitted, "data")
    assert feature_names(other) == ["x", "whole", "city", "pair"]


def test_numbers_that_need_float64_stay_so_without_left_out_columns(tmp_path: Path) -> None:
    columns = {**make_columns(), "same": [7] * ROWS}
    columns["seconds"] = 1_700_000_000 + np.random.default_rng(2).integers(0, 100, ROWS)
    for in_memory_mb in (256.0, 0.0):
        cache = {"folder": str(tmp_path / "cache"), "in_memory_mb": in_memory_mb}
        prepared = prepare_data(make_job(write_parquet(tmp_path / "t.parquet", columns), cache=cache))
        assert prepared.dataset.train.inputs.dtype == np.float64
        assert feature_names(prepared) == ["x", "whole", "city", "pair", "seconds"]
        assert list(prepared.dataset.left_out) == ["same"]


@pytest.mark.parametrize(("rows", "left_out"), [(150, []), (1_400, ["score"])])
def test_a_number_that_separates_the_classes_stays_in_a_small_table(
    tmp_path: Path, rows: int, left_out: list[str]
) -> None:
    columns = make_columns(rows)
    columns["score"] = columns["y"] + np.random.default_rng(1).random(rows) / 2
    prepared = prepare_data(make_job(write_parquet(tmp_path / "t.parquet", columns)))
    assert list(prepared.dataset.left_out) == left_out
    assert any("'score' alone predicts" in text or "'score' is left out" in text for text in prepared.warnings)


def test_a_column_that_differs_between_files_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    whole, text = np.arange(ROWS), np.array(["z"] * ROWS)
    for number, (name, values) in enumerate((("a", whole), ("a", text), ("b", whole))):
        write_parquet(tmp_path / f"t/{number}.parquet", {**make_columns(), name: values})
    prepared = prepare_data(make_job(tmp_path / "t"))
    assert feature_names(prepared) == ["x", "whole", "city", "pair"]
    assert set(prepared.dataset.left_out) == {"a", "b"}


def test_a_leak_of_a_regression_is_left_out(tmp_path: Path) -> None:
    columns = make_columns()
    columns["y"] = np.random.default_rng(3).normal(size=ROWS)
    columns["in_cents"] = 100 * columns["y"] + 3
    prepared = prepare_data(make_job(write_parquet(tmp_path / "t.parquet", columns), task="regression"))
    assert list(prepared.dataset.left_out) == ["in_cents"]


@pytest.mark.parametrize("only", ["leak", "constant"])
def test_at_least_one_column_stays(tmp_path: Path, only: str) -> None:
    y = np.arange(ROWS) % 2
    values = np.where(y == 1, "yes", "no") if only == "leak" else np.ones(ROWS)
    prepared = prepare_data(make_job(write_parquet(tmp_path / "t.parquet", {"x": values, "y": y})))
    assert feature_names(prepared) == ["x"]


def test_text_that_is_almost_unique_is_no_feature_alone(tmp_path: Path) -> None:
    columns = {"name": [f"n{i}" for i in range(ROWS)], "y": np.arange(ROWS) % 2}
    with pytest.raises(DataError, match=r"leaves out every column .*almost unique") as caught:
        prepare_data(make_job(write_parquet(tmp_path / "t.parquet", columns)))
    assert 'features: ["*"]' in caught.value.fix


def test_text_that_repeats_is_a_feature(tmp_path: Path) -> None:
    columns = {**make_columns(), "street": [f"s{i // 2}" for i in range(ROWS)]}
    prepared = prepare_data(make_job(write_parquet(tmp_path / "t.parquet", columns)))
    assert "street" in feature_names(prepared)


@pytest.mark.parametrize("features", ["auto", ["*"], ["x", "w*", "city"]])
def test_excluded_columns_are_no_features(tmp_path: Path, features: Any) -> None:
    columns = {**make_columns(), "tmp_a": np.zeros(ROWS), "tmp_b": np.zeros(ROWS)}
    url = write_parquet(tmp_path / "t.parquet", columns)
    prepared = prepare_data(make_job(url, features=features, exclude=["tmp_*", "pair", "whole"]))
    assert feature_names(prepared) == ["x", "city"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"exclude": ["tmp_*"]}, "no column matches 'tmp_*'"),
        ({"exclude": ["cty"]}, "no column matches 'cty'"),
        ({"exclude": ["y"]}, "no column matches 'y'"),
        ({"exclude": ["*"]}, "no column is left to be a feature"),
        ({"features": ["x", "city"], "exclude": ["x"]}, "'x' is excluded, and a feature"),
    ],
)
def test_excluded_columns_that_do_not_fit_are_rejected(tmp_path: Path, data: dict[str, Any], text: str) -> None:
    url = write_parquet(tmp_path / "t.parquet", make_columns())
    with pytest.raises(DataError) as caught:
        prepare_data(make_job(url, **data))
    assert text in caught.value.what


def test_a_table_of_a_label_alone_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [0, 1] * 20}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no column is left to be a feature"):
        prepare_data(make_job(tmp_path / "t.parquet"))


@pytest.mark.parametrize("in_memory_mb", [256.0, 0.0])
def test_dates_are_features_also_as_text_and_hashed_text_is_kept(tmp_path: Path, in_memory_mb: float) -> None:
    columns = make_columns()
    rows = len(columns["y"])
    days = np.datetime64("2010-01-01") + np.random.default_rng(1).permutation(rows)
    columns |= {"day": days, "text": [str(day) for day in days], "user": [f"user {i}" for i in range(rows)]}
    url = write_parquet(tmp_path / "t.parquet", columns)
    cache = {"folder": str(tmp_path / "cache"), "in_memory_mb": in_memory_mb}
    job = make_job(url, cache=cache, hashed={"us*": 16})
    prepared = prepare_data(job)
    assert prepared.dataset.schema is not None
    kinds = {column.name: column.kind for column in prepared.dataset.schema.columns}
    assert kinds == {
        "x": "number", "whole": "number", "city": "category", "pair": "number", "day": "time", "text": "time",
        "user": "category",
    }  # fmt: skip
    assert not prepared.dataset.left_out
    resumed = prepare_data(job, fitted=prepared.fitted)
    np.testing.assert_array_equal(resumed.dataset.train.inputs, prepared.dataset.train.inputs)
