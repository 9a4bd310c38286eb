"""Encoding of tables as matrices, for training and for prediction."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tabular.encoder import encode_to_matrix, to_arrow_table
from pipeline.data.tabular.schema import Column, Schema
from pipeline.errors import DataError
from tests.data.parquet_jobs import open_parquet, write_parquet

SCHEMA = Schema(
    (
        Column("age", "number"),
        Column("plan", "category", categories=("a", "b")),
        Column("pair", "number", 2),
        Column("zip", "category", categories=("10", "9")),
    )
)
VALID_TABLE: dict[str, Any] = {"zip": [9, 10], "pair": [[1.0, 2.0], [3.0, 4.0]], "plan": ["b", "a"], "age": [30, 40]}
ENCODED = [[30, 1, 1, 2, 1], [40, 0, 3, 4, 0]]


def encode_rows(data: Any) -> np.ndarray:
    return encode_to_matrix(to_arrow_table(data), SCHEMA, dtype=np.float64, where="new data")


@pytest.mark.parametrize(
    "data",
    [
        VALID_TABLE,
        {**VALID_TABLE, "pair": np.array(VALID_TABLE["pair"]), "age": np.array([30.0, 40.0]), "more": ["x", "y"]},
        pd.DataFrame(VALID_TABLE),
        pd.DataFrame(VALID_TABLE, index=["i", "j"]).astype({"plan": "category"}),
        pl.DataFrame(VALID_TABLE),
        pl.DataFrame(VALID_TABLE, schema_overrides={"plan": pl.Categorical, "pair": pl.Array(pl.Float32, 2)}),
        pa.table(VALID_TABLE),
        pa.RecordBatch.from_pydict(VALID_TABLE),
        pa.table({**VALID_TABLE, "zip": ["9", "10"], "pair": pa.array(VALID_TABLE["pair"], pa.list_(pa.float16(), 2))}),
        pa.concat_tables([pa.table(VALID_TABLE).slice(0, 1), pa.table(VALID_TABLE).slice(1)]),
    ],
    ids=["dict", "numpy", "pandas", "categories", "polars", "polars types", "arrow", "batch", "arrow types", "chunks"],
)
def test_supported_table_types(data: Any) -> None:
    np.testing.assert_array_equal(encode_rows(data), np.array(ENCODED, np.float64), strict=True)


def test_slice_of_a_table_is_encoded_without_its_other_rows() -> None:
    table = pa.table({**VALID_TABLE, "pair": pa.array(VALID_TABLE["pair"], pa.list_(pa.float32(), 2))}).slice(1)
    np.testing.assert_array_equal(encode_rows(table), np.array(ENCODED[1:], np.float64))


def test_missing_and_unseen_values_have_codes() -> None:
    data = {"age": [None, math.nan], "plan": ["never seen", None], "pair": [None, [1.0, None]], "zip": [7.0, None]}
    nan = math.nan
    np.testing.assert_array_equal(encode_rows(data), [[nan, 2, nan, nan, 2], [nan, nan, 1, nan, nan]])
    np.testing.assert_array_equal(encode_rows(pd.DataFrame(data))[0], [nan, 2, nan, nan, 2])
    nulls = pa.table({name: pa.nulls(1) for name in data})
    assert np.isnan(encode_rows(nulls)).all()
    assert encode_rows(pa.table(VALID_TABLE).slice(0, 0)).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"age": ["x", "y"]}, "'age' holds text"),
        ({"age": [[1.0], [2.0]], "pair": [[1], [2]]}, "'pair' has lists whose length is not 2 in 2 of 2 rows"),
        ({"plan": [[1], [2]]}, "'plan' holds lists of numbers"),
        ({"zip": [1.5, 2]}, "'zip' has numbers that are not whole in 1 of 2 rows, first in row 0"),
        ({"age": [1, -math.inf]}, "new data: the column 'age' has infinite values in 1 of 2 rows, first in row 1"),
        ({"pair": pa.array([b"abc", b"abc"], pa.binary(3))}, "'pair' holds bytes"),
        ({"pair": [1, 2]}, "'pair' holds whole numbers .*; expected: 2 numbers"),
    ],
)
def test_invalid_columns_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_rows({**VALID_TABLE, **change})


def test_missing_column_is_named() -> None:
    table = pa.table({"agee": [1], **{name: VALID_TABLE[name][:1] for name in ("plan", "pair", "zip")}})
    with pytest.raises(DataError, match=r"there is no column 'age' \(1 rows\)\n.*did you mean agee\?"):
        encode_rows(table)


@pytest.mark.parametrize(
    "data", [3, [1, 2], {"a": [1, "x"]}, {"a": [1], "b": [1, 2]}, pd.DataFrame({"a": [1, "x"]})], ids=repr
)
def test_unsupported_objects_are_rejected(data: Any) -> None:
    with pytest.raises(DataError, match="table: "):
        to_arrow_table(data)


def nullable(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


COLUMN_TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "whole": (pa.int32(), st.integers(-(2**31), 2**31 - 1)),
    "real": (pa.float64(), st.floats(allow_nan=False, allow_infinity=False)),
    "truth": (pa.bool_(), st.booleans()),
    "text": (pa.string(), st.text(max_size=3)),
    "categories": (pa.dictionary(pa.int32(), pa.large_string()), st.sampled_from(["", "a", "B", "ä", "\0"])),
    "pair": (
        pa.list_(pa.float32(), 2),
        st.tuples(*[nullable(st.floats(width=32, allow_nan=False, allow_infinity=False))] * 2),
    ),
    "bytes": (pa.binary(3), st.binary(min_size=3, max_size=3)),
}


@st.composite
def arrow_columns(draw: st.DrawFn) -> dict[str, pa.Array]:
    rows = draw(st.integers(1, 12))
    names = draw(st.lists(st.sampled_from(sorted(COLUMN_TYPES)), min_size=1, unique=True))
    return {
        name: pa.array(
            draw(st.lists(nullable(COLUMN_TYPES[name][1]), min_size=rows, max_size=rows)), COLUMN_TYPES[name][0]
        )
        for name in names
    }


def decode_matrix(matrix: np.ndarray, schema: Schema) -> dict[str, list[Any]]:
    """Decode the matrix by its schema to the Python values that Arrow returns."""
    decoded_columns: dict[str, list[Any]] = {}
    for column, offset in zip(schema.columns, schema.offsets, strict=True):
        rows = [
            [None if math.isnan(value) else value for value in row] for row in matrix[:, offset : offset + column.width]
        ]
        if column.kind == "category":
            decoded_columns[column.name] = [None if row[0] is None else column.categories[int(row[0])] for row in rows]
        elif column.width == 1:
            decoded_columns[column.name] = [row[0] for row in rows]
        else:
            decoded_columns[column.name] = [None if row == [None] * column.width else row for row in rows]
    return decoded_columns


@settings(max_examples=60, deadline=None)
@given(table=arrow_columns(), group=st.integers(1, 5))
def test_matrix_round_trips_the_table(table: dict[str, pa.Array], group: int) -> None:
    with TemporaryDirectory() as folder:
        num_rows = len(next(iter(table.values())))
        label = {"y": [0] * num_rows}
        columns = {**table, "z": [1.5] * num_rows, **label}
        path = write_parquet(Path(folder) / "t.parquet", columns, row_group_size=group)
        dataset = open_parquet(path, precision="fp64")
    assert dataset.schema is not None
    columns = {name: array.to_pylist() for name, array in table.items()} | {"z": [1.5] * num_rows}
    columns = {
        name: [
            list(value) if isinstance(value, bytes) else None if value == [None, None] else value for value in values
        ]
        for name, values in columns.items()
    }
    assert decode_matrix(dataset.train.inputs, dataset.schema) == columns
    np.testing.assert_array_equal(
        encode_to_matrix(pa.table({**table, "z": [1.5] * num_rows}), dataset.schema, dtype=np.float64, where="t"),
        dataset.train.inputs,
    )
