"""The Parquet dataset: selection of columns, conversion of each type, and tables that are rejected."""

from __future__ import annotations

import datetime
import decimal
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.tabular.schema import Column
from pipeline.data.transforms import DataReport
from pipeline.errors import DataError
from pipeline.inference.inputs import to_raw_inputs
from pipeline.setup import prepare_data
from tests.data.parquet_jobs import make_parquet_job, open_parquet, write_parquet

NAN = math.nan


def test_each_type_is_encoded_in_its_column(tmp_path: Path) -> None:
    columns = {
        "whole": pa.array([1, None, 3], pa.int16()),
        "real": pa.array([0.5, NAN, None], pa.float64()),
        "half": pa.array([0.5, 1, None], pa.float16()),
        "money": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-2")]),
        "yes": pa.array([True, False, None]),
        "plan": pa.array(["b", None, "a"]),
        "city": pa.array(["Rom", "Ulm", None]).dictionary_encode(),
        "pair": pa.array([[1, 2], None, [3, None]], pa.list_(pa.float32(), 2)),
        "loose": pa.array([[1, 2, 3], [4, 5, 6], None], pa.list_(pa.int64())),
        "code": pa.array([b"\x00\xff", b"\x01\x02", None], pa.binary(2)),
        "zip": pa.array([10, 9, None]),
        "y": [2, 0, 1],
    }
    dataset = open_parquet(write_parquet(tmp_path / "t.parquet", columns), categorical=["zip"])
    assert dataset.schema is not None
    assert dataset.schema.columns == (
        *(Column(name, "number") for name in ("whole", "real", "half", "money", "yes")),
        Column("plan", "category", categories=("a", "b")),
        Column("city", "category", categories=("Rom", "Ulm")),
        Column("pair", "number", 2),
        Column("loose", "number", 3),
        Column("code", "number", 2),
        Column("zip", "category", categories=("10", "9")),
    )
    expected = [
        [1, 0.5, 0.5, 1.25, 1, 1, 0, 1, 2, 1, 2, 3, 0, 255, 0],
        [NAN, NAN, 1, NAN, 0, NAN, 1, NAN, NAN, 4, 5, 6, 1, 2, 1],
        [3, NAN, NAN, -2, NAN, 0, NAN, 3, NAN, NAN, NAN, NAN, NAN, NAN, NAN],
    ]
    np.testing.assert_array_equal(dataset.train.inputs, np.array(expected, np.float32), strict=True)
    np.testing.assert_array_equal(dataset.train.targets, np.array([2, 0, 1], np.int64), strict=True)
    assert dataset.test is None
    assert dataset.label_names == ()


def test_feature_patterns_exclude_label_keys_and_split_column(tmp_path: Path) -> None:
    columns = {name: [0, 1] for name in ("id", "num_b", "y", "num_a", "day", "other", "__index_level_0__")}
    path = write_parquet(tmp_path / "t.parquet", columns)

    def names(**data: Any) -> list[str]:
        schema = open_parquet(path, **data).schema
        assert schema is not None
        return [column.name for column in schema.columns]

    assert names() == ["id", "num_b", "num_a", "day", "other"]
    assert names(keys=["id"], splits={"by": "time", "column": "day"}) == ["num_b", "num_a", "other"]
    assert names(features=["other", "num_*"]) == ["num_b", "num_a", "other"]
    assert names(features=["__index_level_0__"]) == ["__index_level_0__"]


def test_fp64_keeps_digits_that_float32_loses(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"x": [2**40 + 1, 1], "y": [0, 1]})
    assert open_parquet(path, precision="fp64").train.inputs[0, 0] == 2**40 + 1
    assert open_parquet(path).train.inputs.dtype == np.float32


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_text_labels_are_class_indices(tmp_path: Path, kind: pa.DataType) -> None:
    labels = pa.array(["no", "yes", "no", "maybe"]).cast(kind)
    dataset = open_parquet(write_parquet(tmp_path / "t.parquet", {"x": [1, 2, 3, 4], "y": labels}))
    assert dataset.label_names == ("maybe", "no", "yes")
    np.testing.assert_array_equal(dataset.train.targets, np.array([1, 2, 1, 0], np.int64), strict=True)


def test_unused_dictionary_entries_are_not_classes(tmp_path: Path) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([2, 0], pa.int8()), ["a", "b", "c"])
    assert open_parquet(write_parquet(tmp_path / "t.parquet", {"x": [1, 2], "y": labels})).label_names == ("a", "c")


@pytest.mark.parametrize(
    ("values", "classes", "numbers"),
    [([3, 0], [3, 0], [3.0, 0.0]), ([True, False], [1, 0], [1.0, 0.0]), ([2.0, -1.0], [2, -1], [2.0, -1.0])],
)
def test_numeric_labels(tmp_path: Path, values: list[Any], classes: list[int], numbers: list[float]) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"x": [1, 2], "y": values})
    np.testing.assert_array_equal(open_parquet(path).train.targets, np.array(classes, np.int64), strict=True)
    np.testing.assert_array_equal(open_parquet(path, task="regression").train.targets, np.array(numbers), strict=True)


def test_several_label_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"a": [1, 2], "x": [0, 0], "b": [0.5, 3.0]})
    dataset = open_parquet(path, task="regression", label=["b", "a"])
    np.testing.assert_array_equal(dataset.train.targets, np.array([[0.5, 1], [3, 2]]), strict=True)
    assert dataset.train.inputs.shape == (2, 1)


@pytest.mark.parametrize("kind", [pa.binary(6), pa.list_(pa.uint8(), 6)], ids=str)
def test_raw_bytes_column_is_the_sample(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [bytes(range(6)), bytes(range(6, 12)), bytes([255] * 6)]
    pixels = pa.array(rows if pa.types.is_fixed_size_binary(kind) else [list(row) for row in rows], kind)
    path = write_parquet(tmp_path / "t.parquet", {"pixels": pixels, "y": [0, 1, 0]})
    dataset = open_parquet(path, shape=[1, 2, 3])
    assert dataset.schema is None
    expected = np.array([list(row) for row in rows], np.uint8)
    np.testing.assert_array_equal(dataset.train.inputs, expected.reshape(3, 1, 2, 3), strict=True)
    np.testing.assert_array_equal(open_parquet(path).train.inputs, expected, strict=True)


def test_shape_of_a_list_column(tmp_path: Path) -> None:
    values = pa.array([[1, 2, 3, 4], [5, 6, 7, 8]], pa.list_(pa.float32(), 4))
    path = write_parquet(tmp_path / "t.parquet", {"x": values, "y": [0, 1]})
    dataset = open_parquet(path, shape=[2, 2])
    assert dataset.schema is None
    np.testing.assert_array_equal(dataset.train.inputs[1], np.array([[5, 6], [7, 8]], np.float32), strict=True)
    with pytest.raises(DataError, match=r"\[3\] has 3 numbers, but a row of 'x' has 4"):
        open_parquet(path, shape=[3])


def to_nanoseconds(text: str) -> int:
    return int(np.datetime64(text, "ns").astype(np.int64))


@pytest.mark.parametrize(
    ("splits", "values", "expected", "names"),
    [
        ({"by": "group"}, ["v", "u"], [1, 0], ("u", "v")),
        ({"by": "group"}, [7, 5], [7, 5], ()),
        ({"by": "column"}, [True, False], [1, 0], ("false", "true")),
        ({"by": "time"}, [0.5, 1.5], [0.5, 1.5], ()),
        (
            {"by": "time"},
            [datetime.date(2024, 1, 2), datetime.date(2024, 1, 3)],
            [to_nanoseconds("2024-01-02"), to_nanoseconds("2024-01-03")],
            (),
        ),
        (
            {"by": "time"},
            pa.array([1, 2], pa.timestamp("s", "Europe/Rome")),
            [10**9, 2 * 10**9],
            (),
        ),
        (
            {"by": "time"},
            ["2024-01-03", "2024-01-02"],
            [to_nanoseconds("2024-01-03"), to_nanoseconds("2024-01-02")],
            (),
        ),
        (
            {"by": "time"},
            ["2024-01-03T01:00:00+01:00", "2024-01-02T00:00:00Z"],
            [to_nanoseconds("2024-01-03"), to_nanoseconds("2024-01-02")],
            (),
        ),
    ],
)
def test_split_columns(
    tmp_path: Path, splits: dict[str, str], values: Any, expected: list[float], names: tuple[str, ...]
) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"x": [1, 2], "s": values, "y": [0, 1]})
    column = open_parquet(path, splits={**splits, "column": "s"}).split_columns["s"]
    np.testing.assert_array_equal(column.values, np.array(expected), strict=True)
    assert column.value_names == names
    assert column.is_time == (splits["by"] == "time" and column.values.dtype == np.int64)


FEATURE_VALUES, LABEL_VALUES = [1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"churn": FEATURE_VALUES, "y": LABEL_VALUES},
            {"features": ["chrun"]},
            r"data\.features: no column matches 'chrun'\n.*churn",
        ),
        (
            {"x": FEATURE_VALUES, "y": LABEL_VALUES},
            {"features": ["num_*"]},
            r"no column matches 'num_\*'\n.*columns here: x",
        ),
        ({"x": FEATURE_VALUES, "y": LABEL_VALUES}, {"categorical": ["z*"]}, r"data\.categorical: no column"),
        (
            {"x": FEATURE_VALUES, "z": LABEL_VALUES},
            {},
            r"data\.label: there is no column 'y' in .*t\.parquet \(4 rows\)",
        ),
        ({"x": FEATURE_VALUES, "y": LABEL_VALUES}, {"keys": ["id"]}, r"data\.keys: there is no column 'id'"),
        (
            {"x": FEATURE_VALUES, "y": LABEL_VALUES},
            {"splits": {"by": "group", "column": "g"}},
            r"data\.splits\.column: there is no column 'g'",
        ),
        ({"x": FEATURE_VALUES, "y": LABEL_VALUES}, {"features": ["x", "y"]}, "the label 'y' is among the features"),
        ({"x": FEATURE_VALUES, "y": LABEL_VALUES}, {"features": ["x"], "keys": ["x"]}, "'x' is a key, and a feature"),
        ({"y": LABEL_VALUES}, {}, r"no column matches '\*'"),
        (
            {"x": [1.0, math.inf, -math.inf, NAN], "y": LABEL_VALUES},
            {},
            "'x' has infinite values in 2 of 4 rows, first in row 1",
        ),
        ({"x": [1.0, 1e39, 1, 1], "y": LABEL_VALUES}, {}, "'x' has infinite values in 1 of 4 rows, first in row 1"),
        (
            {"x": FEATURE_VALUES, "y": [0, 1, None, None]},
            {},
            r"t\.parquet: the column 'y' has nulls .* in 2 of 4 rows, first in row 2",
        ),
        ({"x": FEATURE_VALUES, "y": [0, 1, NAN, 1.0]}, {}, "'y' has nulls .* in 1 of 4 rows, first in row 2"),
        ({"x": FEATURE_VALUES, "y": ["a", None, "b", "a"]}, {}, "'y' has nulls .* in 1 of 4 rows, first in row 1"),
        (
            {"x": FEATURE_VALUES, "y": [0.0, 1.0, NAN, 1]},
            {"task": "regression"},
            "'y' has nulls .* in 1 of 4 rows, first in row 2",
        ),
        (
            {"x": FEATURE_VALUES, "y": [0.0, 1.0, math.inf, 1]},
            {"task": "regression"},
            "'y' has infinite values in 1 of 4",
        ),
        (
            {"x": FEATURE_VALUES, "y": [0, 1.5, 2, 1]},
            {},
            "'y' has labels that are not whole in 1 of 4 rows, first in row 1",
        ),
        (
            {"x": FEATURE_VALUES, "y": pa.array([0, 2**63, 0, 0], pa.uint64())},
            {},
            "'y' has numbers beyond int64 in 1 of 4 rows",
        ),
        (
            {"x": FEATURE_VALUES, "y": ["a"] * 4},
            {"task": "regression"},
            r"the label 'y' has text \(string\), which regression cannot use",
        ),
        ({"x": FEATURE_VALUES, "y": [datetime.date(2024, 1, 1)] * 4}, {}, "the label 'y' has times"),
        (
            {"x": FEATURE_VALUES, "y": LABEL_VALUES, "z": LABEL_VALUES},
            {"label": ["y", "z"]},
            "multiclass takes one label, not 2",
        ),
        (
            {"x": ["2024-01-01", "2024-05-31T12:00", "May", "2024"], "y": LABEL_VALUES},
            {"dates": ["x"]},
            r"'x' has text that is not a date or time \(.*'2024'.*\)\n.*2024-05-31T12:00:00Z",
        ),
        ({"x": FEATURE_VALUES, "y": LABEL_VALUES}, {"dates": ["x"]}, "'x' has .*, not dates"),
        ({"x": FEATURE_VALUES, "y": LABEL_VALUES}, {"hashed": {"x": 4}}, "'x' has .*, not text"),
        ({"x": FEATURE_VALUES, "y": LABEL_VALUES}, {"hashed": {"z*": 4}}, r"no column matches 'z\*'"),
        ({"x": [{"a": 1}] * 4, "y": LABEL_VALUES}, {}, "'x' has neither numbers nor text"),
        ({"x": [b"a"] * 4, "y": LABEL_VALUES}, {}, "'x' has neither numbers nor text"),
        ({"x": [[[1]]] * 4, "y": LABEL_VALUES}, {}, "'x' has neither numbers nor text"),
        (
            {"x": [[1, 2], [3, 4], [5], [6]], "y": LABEL_VALUES},
            {},
            "'x' has lists whose length is not 2 in 2 of 4 rows, first in row 2",
        ),
        (
            {"x": pa.nulls(4, pa.list_(pa.int8())), "y": LABEL_VALUES},
            {},
            "'x' has no list, so that their length is unknown",
        ),
        (
            {"x": [1, 2.5, 3, 4], "y": LABEL_VALUES},
            {"categorical": ["x"]},
            "'x' has numbers that are not whole in 1 of 4 rows",
        ),
        ({"x": [[1, 2]] * 4, "y": LABEL_VALUES}, {"categorical": ["x"]}, "'x' has lists of numbers .*, not categories"),
        (
            {"x": pa.array([b"a", None] * 2, pa.binary(1)), "y": LABEL_VALUES},
            {},
            "'x' has nulls in 2 of 4 rows, first in row 1",
        ),
        (
            {"x": pa.array([[1, 2], [3, None], None, [None, 4]], pa.list_(pa.uint8(), 2)), "y": LABEL_VALUES},
            {},
            "'x' has nulls in 1 of 4 rows, first in row 2",
        ),
        (
            {"x": pa.array([[1, 2], [3, None], [5, 6], [None, 4]], pa.list_(pa.uint8(), 2)), "y": LABEL_VALUES},
            {"shape": [1, 2]},
            "'x' has nulls inside its lists in 2 of 4 rows, first in row 1",
        ),
        (
            {"x": pa.array([[1, 2], [3, 4], [5, NAN], [None, 4]], pa.list_(pa.float32(), 2)), "y": LABEL_VALUES},
            {"shape": [2]},
            r"'x' has nulls \(or NaN\) inside its lists in 2 of 4 rows, first in row 2",
        ),
        (
            {"x": FEATURE_VALUES, "z": FEATURE_VALUES, "y": LABEL_VALUES},
            {"shape": [2]},
            "a shape needs a single feature",
        ),
        (
            {"x": FEATURE_VALUES, "s": ["a", None, "b", None], "y": LABEL_VALUES},
            {"splits": {"by": "group", "column": "s"}},
            "'s' has nulls .* in 2 of 4 rows, first in row 1",
        ),
        (
            {"x": FEATURE_VALUES, "s": ["a"] * 4, "y": LABEL_VALUES},
            {"splits": {"by": "time", "column": "s"}},
            "'s' has text that is not a time",
        ),
        (
            {"x": FEATURE_VALUES, "s": [datetime.datetime(2900, 1, 1)] * 4, "y": LABEL_VALUES},
            {"splits": {"by": "time", "column": "s"}},
            "'s' has times before 1677 or after 2262",
        ),
        ({"x": [], "y": []}, {}, "no rows in 1 files"),
    ],
)
def test_invalid_tables_are_rejected(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = write_parquet(tmp_path / "t.parquet", columns)
    with pytest.raises(DataError, match=message) as raised:
        open_parquet(path, **options)
    assert raised.value.where
    assert raised.value.fix
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "empty", [pa.nulls(20), pa.nulls(20, pa.string()), pa.nulls(20, pa.float64()), [NAN] * 20], ids=str
)
def test_column_without_values_gives_a_warning(tmp_path: Path, empty: Any) -> None:
    path = write_parquet(
        tmp_path / "t.parquet", {"x": [float(row) for row in range(20)], "none": empty, "y": [0, 1] * 10}
    )
    prepared = prepare_data(make_parquet_job(path))
    (warning,) = [text for text in prepared.warnings if "'none'" in text]
    assert "has no value in all training rows" in warning
    preprocess = prepared.fitted.input_transform
    raw = to_raw_inputs(pq.read_table(path), preprocess, prepared.job, DataReport(preprocess))
    np.testing.assert_array_equal(raw, prepared.dataset.train.inputs)
    with pytest.raises(DataError, match="20 of 20 rows have no value in column 'none'"):
        prepare_data(make_parquet_job(path, missing={"numeric": "fail", "categorical": "fail"}))


def test_too_many_categories_are_reported_as_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.tables.decode.MAX_CATEGORIES", 3)
    path = write_parquet(tmp_path / "t.parquet", {"x": list("abcd"), "y": LABEL_VALUES})
    with pytest.raises(DataError, match=r"'x' has more than 3 categories in 4 rows: it looks like a key\n.*data\.keys"):
        open_parquet(path)


def test_wide_table_is_read_in_column_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 300)).astype(np.float32)
    columns: dict[str, Any] = {f"x{number:03d}": values[:, number] for number in range(300)}
    columns |= {"category": [f"l{number % 3}" for number in range(50)], "y": np.arange(50) % 2}
    write_parquet(tmp_path / "a.parquet", {name: values[:20] for name, values in columns.items()})
    write_parquet(tmp_path / "b.parquet", {name: values[20:] for name, values in columns.items()})
    dataset = open_parquet(tmp_path, label="y")
    np.testing.assert_array_equal(dataset.train.inputs[:, :300], values)
    np.testing.assert_array_equal(dataset.train.inputs[:, 300], np.arange(50) % 3)
    np.testing.assert_array_equal(dataset.train.targets, np.arange(50) % 2)
