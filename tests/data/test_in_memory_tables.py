"""Tables in memory: what each library's data becomes, what is refused, and the digest of the content."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CacheConfig
from pipeline.data.sources.tables.parquet import ParquetFiles
from pipeline.data.stored_tables import store_table
from pipeline.data.tabular.digest import digest_table
from pipeline.data.tabular.in_memory import to_labeled_table
from pipeline.errors import DataError

COLUMNS: dict[str, list[Any]] = {
    "age": [31, None, 54],
    "plan": ["basic", "pro", None],
    "paid": [1.5, 2.25, None],
    "active": [True, False, True],
    "churned": ["no", "yes", "no"],
}
INPUTS = np.array([[1.0, 2.0], [3.0, math.nan], [5.0, 6.0]])


def pandas_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "age": pd.array(COLUMNS["age"], "Int64"),
            "plan": pd.Categorical(COLUMNS["plan"]),
            "paid": COLUMNS["paid"],
            "active": pd.array(COLUMNS["active"], "boolean"),
            "churned": pd.Series(COLUMNS["churned"], dtype="string"),
        }
    )


@pytest.mark.parametrize(
    "data",
    [
        pandas_frame(),
        pandas_frame().set_index(pd.Index([7, 3, 5])),
        pandas_frame().convert_dtypes(dtype_backend="pyarrow"),
        pl.DataFrame(COLUMNS),
        pl.DataFrame(COLUMNS).with_columns(pl.col("plan").cast(pl.Categorical)),
        pa.table(COLUMNS),
        pa.concat_tables([pa.table(COLUMNS).slice(0, 1), pa.table(COLUMNS).slice(1)]),
        COLUMNS,
        [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)],
    ],
    ids=["pandas", "index", "pyarrow types", "polars", "categorical", "arrow", "chunks", "dict", "rows"],
)
def test_same_content_is_the_same_table_whatever_the_library(data: Any) -> None:
    converted = to_labeled_table(data, label="churned")
    assert converted.labels == ("churned",)
    assert converted.table.to_pydict() == COLUMNS
    assert digest_table(converted.table) == digest_table(pa.table(COLUMNS))


def test_labels_apart_are_the_last_columns() -> None:
    frame = pandas_frame()
    inputs, target = frame.drop(columns="churned"), frame["churned"]
    expected = to_labeled_table(frame, label="churned")
    for converted in (to_labeled_table(inputs, target), to_labeled_table((inputs, target))):
        assert (converted.labels, converted.table) == (expected.labels, expected.table)


@pytest.mark.parametrize(
    ("target", "label", "names", "values"),
    [
        ([0, 1, 0], None, ("y",), [[0, 1, 0]]),
        ([True, False, True], None, ("y",), [[True, False, True]]),
        (np.array([[0.5], [1.5], [2.5]]), None, ("y",), [[0.5, 1.5, 2.5]]),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), None, ("y0", "y1"), [[1, 3, 5], [2, 4, 6]]),
        (pd.DataFrame({"p": [1, 2, 3], "q": [4, 5, 6]}), None, ("p", "q"), [[1, 2, 3], [4, 5, 6]]),
        (pd.Series([1, 2, 3], name="x1"), None, ("x1_",), [[1, 2, 3]]),
        (pl.Series("kind", ["a", "b", "a"]), None, ("kind",), [["a", "b", "a"]]),
        (pa.array(["a", "b", None]), "kind", ("kind",), [["a", "b", None]]),
        (pd.Categorical(["a", "b", "a"]), None, ("y",), [["a", "b", "a"]]),
    ],
)
def test_labels_of_arrays(target: Any, label: str | None, names: tuple[str, ...], values: list[list[Any]]) -> None:
    converted = to_labeled_table(INPUTS, target, label)
    assert converted.labels == names
    assert converted.table.column_names == ["x0", "x1", *names]
    assert [converted.table[name].to_pylist() for name in names] == values
    assert converted.table["x1"].to_pylist() == [2.0, None, 6.0]


def test_text_beside_numbers_in_rows_stays_what_it_is() -> None:
    converted = to_labeled_table([[1, "a"], [2, "b"]], [0.5, 1.5])
    assert converted.table.to_pydict() == {"x0": [1, 2], "x1": ["a", "b"], "y": [0.5, 1.5]}


def test_numbers_that_pandas_marks_as_categories_are_categorical() -> None:
    frame = pd.DataFrame({"zip": pd.Categorical([1, 2, 1]), "text": pd.Categorical(["a", "b", "a"]), "y": [0, 1, 0]})
    converted = to_labeled_table(frame, label="y")
    assert converted.categorical == ("zip",)
    assert converted.table["zip"].to_pylist() == [1, 2, 1]


def test_unused_and_reordered_categories_do_not_matter() -> None:
    frames = [
        pd.DataFrame({"a": pd.Categorical(["u", "v"], categories=categories), "y": [0, 1]})
        for categories in (["u", "v"], ["v", "w", "u"])
    ]
    first, second = (digest_table(to_labeled_table(frame, label="y").table) for frame in frames)
    assert first == second


def test_names_that_are_whole_numbers_become_text() -> None:
    converted = to_labeled_table(pd.DataFrame(INPUTS), [0, 1, 0])
    assert converted.table.column_names == ["0", "1", "y"]
    assert to_labeled_table(pd.DataFrame(INPUTS), label=1).labels == ("1",)  # type: ignore[arg-type]


def test_a_named_index_is_left_out_and_said() -> None:
    frame = pandas_frame().assign(customer=[8, 9, 10]).set_index("customer")
    converted = to_labeled_table(frame, label="churned")
    assert "customer" not in converted.table.column_names
    (note,) = converted.notes
    assert "customer" in note
    assert "reset_index" in note
    assert not to_labeled_table(pandas_frame(), label="churned").notes


def two_levels() -> pd.DataFrame:
    return pd.DataFrame(INPUTS, columns=pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")]))


def sparse_matrix() -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix(np.eye(3))


@pytest.mark.parametrize(
    ("data", "target", "label", "parts"),
    [
        (pd.DataFrame({"a": [1, "x"], "y": [0, 1]}), None, "y", ("'a'", "'x'", "astype(str)")),
        (pd.DataFrame({"a": [1 + 2j, 3], "y": [0, 1]}), None, "y", ("'a'",)),
        (pd.DataFrame({"a": [object(), 1], "y": [0, 1]}), None, "y", ("'a'",)),
        (pd.DataFrame({"a": pd.arrays.SparseArray([0, 1]), "y": [0, 1]}), None, "y", ("'a'", "to_dense")),
        (pd.DataFrame({"a": pd.period_range("2020", periods=2), "y": [0, 1]}), None, "y", ("'a'", "to_timestamp")),
        (two_levels(), [0, 1, 0], None, ("MultiIndex", "2 levels")),
        (pd.DataFrame(INPUTS, columns=["a", "a"]), [0, 1, 0], None, ("two columns", "'a'")),
        (pd.DataFrame(INPUTS, columns=[1, "1"]), [0, 1, 0], None, ("two columns", "'1'")),
        (pd.DataFrame(INPUTS, columns=[None, "a"]), [0, 1, 0], None, ("column name nan",)),
        (pd.DataFrame(INPUTS, columns=["a", ("b", 1)]), [0, 1, 0], None, ("('b', 1)", "rename")),
        (pa.table([[1], [2]], names=["a", "a"]), None, "a", ("two columns", "'a'")),
        (pandas_frame(), None, None, ("not named", "label=", "churned")),
        (pandas_frame(), None, "churn", ("'churn'", "did you mean churned")),
        (pandas_frame(), None, ["churned", "left"], ("'left'",)),
        (pandas_frame(), [0, 1], None, ("3 rows", "2 labels")),
        (pandas_frame(), [0, 1, 0], "churned", ("'churned'", "another name")),
        (INPUTS, [0, 1, 0], ["p", "q"], ("1 columns of labels",)),
        (INPUTS, np.zeros((3, 2, 2)), None, ("(3, 2, 2)",)),
        (np.zeros((3, 4, 4)), [0, 1, 0], None, ("(3, 4, 4)", "source: {call")),
        (np.zeros(3), [0, 1, 0], None, ("(3,)", "(N, F)")),
        (np.zeros((3, 1), complex), [0, 1, 0], None, ("complex",)),
        (sparse_matrix(), [0, 1, 0], None, ("sparse", "toarray")),
        (pl.DataFrame(COLUMNS).lazy(), None, "churned", ("LazyFrame", "collect")),
        (pandas_frame()[:0], None, "churned", ("no rows",)),
        (pandas_frame()[["churned"]], None, "churned", ("no columns but",)),
        (5, None, "churned", ("a int is not a table",)),
        ({"a": [1, 2], "b": [1]}, None, "b", ("equal length",)),
        ([[1, 2], [3]], [0, 1], None, ("equal length",)),
        (INPUTS, [0, "x", None], None, ("labels",)),
    ],
)
def test_what_cannot_be_a_table_is_said(data: Any, target: Any, label: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        to_labeled_table(data, target, label)
    for part in parts:
        assert part in str(caught.value)


VALUES = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), min_size=1),
    st.lists(st.one_of(st.none(), st.floats(allow_nan=False)), min_size=1),
    st.lists(st.one_of(st.none(), st.booleans()), min_size=1),
    st.lists(st.one_of(st.none(), st.text()), min_size=1),
    st.lists(st.one_of(st.none(), st.binary()), min_size=1),
    st.lists(st.one_of(st.none(), st.datetimes()), min_size=1),
    st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.floats(allow_nan=False)))), min_size=1),
)


@given(VALUES, st.data())
def test_digest_depends_on_values_alone(values: list[Any], data: st.DataObject) -> None:
    column = pa.array(values)
    table = pa.table({"a": column})
    cut = data.draw(st.integers(0, len(values)))
    padded = pa.chunked_array([pa.array([*values[:1], *values, *values[:1]], column.type).slice(1, len(values))])
    chunks = pa.chunked_array([column.slice(0, cut), column.slice(cut)])
    for same in (padded, chunks):
        assert digest_table(pa.table({"a": same})) == digest_table(table)
    assert digest_table(pa.table({"b": column})) != digest_table(table)
    assert digest_table(table.slice(1)) != digest_table(table)
    position = data.draw(st.integers(0, len(values) - 1))
    flipped = [*values]
    flipped[position] = None if values[position] is not None else next((v for v in values if v is not None), None)
    if flipped != values:
        assert digest_table(pa.table({"a": pa.array(flipped, column.type)})) != digest_table(table)


def test_bytes_under_nulls_do_not_count() -> None:
    valid = np.packbits([True, False, True], bitorder="little").tobytes()
    arrays = [
        pa.Array.from_buffers(pa.int64(), 3, [pa.py_buffer(valid), pa.py_buffer(np.array(values).tobytes())])
        for values in ([1, 99, 3], [1, -5, 3])
    ]
    first, second = (digest_table(pa.table({"a": array})) for array in arrays)
    assert first == second


def test_values_and_types_count() -> None:
    tables = [
        pa.table({"a": [1, 2]}),
        pa.table({"a": [2, 1]}),
        pa.table({"a": [1.0, 2.0]}),
        pa.table({"a": ["1", "2"]}),
        pa.table({"a": ["12", ""]}),
        pa.table({"a": [True, True]}),
        pa.table({"a": [[1], [2]]}),
        pa.table({"a": [[1, 2], []]}),
        pa.table({"a": [{"b": 1}, {"b": 2}]}),
        pa.table({"a": pa.nulls(2)}),
        pa.table({"a": pa.nulls(2, pa.int64())}),
    ]
    assert len({digest_table(table) for table in tables}) == len(tables)


def test_a_table_is_stored_once_and_named_by_its_content(tmp_path: Path) -> None:
    cache, table = CacheConfig(folder=str(tmp_path)), pa.table(COLUMNS)
    path, _entry = store_table(table, cache)
    written = path.stat().st_mtime_ns
    again, _ = store_table(pa.concat_tables([table.slice(0, 2), table.slice(2)]), cache)
    assert (again, path.stat().st_mtime_ns) == (path, written)
    assert pq.read_table(path).equals(table)
    assert store_table(table.slice(1), cache)[0] != path


def test_a_stored_table_that_is_gone_is_explained(tmp_path: Path) -> None:
    path, entry = store_table(pa.table(COLUMNS), CacheConfig(folder=str(tmp_path)))
    del entry
    path.unlink()
    with pytest.raises(DataError, match="passed in Python"), ParquetFiles(str(path), CacheConfig()):
        pass


def test_a_type_that_parquet_does_not_have_is_refused(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with pytest.raises(DataError, match="cannot be written as Parquet"):
        store_table(table, CacheConfig(folder=str(tmp_path)))
    assert not any(path.name.startswith("table-") for path in tmp_path.iterdir())
