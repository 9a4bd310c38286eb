"""A table is the same dataset in every file format."""

from __future__ import annotations

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import given, settings

from pipeline.config.data import NULL_VALUES
from tests.data.table_files import assert_same_dataset, open_table, write_csv, write_stream, write_table

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12).filter(
    lambda text: text not in NULL_VALUES
)
numbers = st.floats(-1e6, 1e6).map(lambda value: value + 0.0)


@st.composite
def tables(draw: st.DrawFn, with_nulls: bool = True) -> pa.Table:
    """Tables of whole numbers, numbers, text and booleans. A text that is no number comes first, as a file of text
    without types holds numbers if all of its values are such."""
    rows = draw(st.integers(1, 40))

    def column(values: st.SearchStrategy[object]) -> list[object]:
        one = st.none() | values if with_nulls else values
        return draw(st.lists(one, min_size=rows, max_size=rows))

    return pa.table(
        {
            "whole": pa.array([0, *column(st.integers(-(2**20), 2**20))], pa.int64()),
            "real": pa.array([0.5, *column(numbers)], pa.float64()),
            'odd "name", ;|': pa.array(['a\n"b",;\t|', *column(texts)], pa.string()),
            "truth": pa.array([True, *column(st.booleans())], pa.bool_()),
            "y": pa.array(["x\r\ny", *draw(st.lists(texts, min_size=rows, max_size=rows))], pa.string()),
        }
    )


@settings(max_examples=60, deadline=None)
@given(
    table=tables(),
    delimiter=st.sampled_from(",;\t|"),
    line_end=st.sampled_from(["\n", "\r\n"]),
    null=st.sampled_from(["", "NA", "?", "NULL"]),
    quote_all=st.booleans(),
    final_line_end=st.booleans(),
    block_bytes=st.integers(20, 1000),
    in_memory_mb=st.sampled_from([0, 256]),
    decimal=st.sampled_from(".,"),
)
def test_csv_is_the_same_dataset_as_parquet(
    table: pa.Table,
    delimiter: str,
    line_end: str,
    null: str,
    quote_all: bool,
    final_line_end: bool,
    block_bytes: int,
    in_memory_mb: int,
    decimal: str,
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        cache = {"folder": f"{folder}/cache"}
        expected = open_table(write_table(Path(folder, "t.parquet"), table, "parquet"), "parquet", cache=cache)
        path = write_csv(
            Path(folder, "t.csv"),
            table,
            delimiter=delimiter,
            line_end=line_end,
            null=null,
            quote_all=quote_all,
            final_line_end=final_line_end,
            decimal=decimal,
        )
        patch.setattr("pipeline.data.sources.tables.text.blocks.BLOCK_BYTES", block_bytes)
        dataset = open_table(path, cache=cache | {"in_memory_mb": in_memory_mb}, delimiter=delimiter, decimal=decimal)
        assert_same_dataset(dataset, expected)
        path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
        packed = open_table(path.with_suffix(".gz"), cache=cache, delimiter=delimiter, decimal=decimal)
        assert_same_dataset(packed, expected)


@settings(max_examples=25, deadline=None)
@given(table=tables(), block_bytes=st.integers(20, 1000))
def test_other_formats_are_the_same_dataset_as_parquet(table: pa.Table, block_bytes: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.sources.tables.text.blocks.BLOCK_BYTES", block_bytes)
        expected = open_table(write_table(Path(folder, "t.parquet"), table, "parquet"), "parquet")
        for source in ("arrow", "jsonl"):
            assert_same_dataset(open_table(write_table(Path(folder, source), table, source), source), expected)
        assert_same_dataset(open_table(write_stream(Path(folder, "stream"), table), "arrow"), expected)


@settings(max_examples=25, deadline=None)
@given(table=tables(with_nulls=False))
def test_npz_is_the_same_dataset_as_parquet(table: pa.Table) -> None:
    with TemporaryDirectory() as folder:
        texts = [text.rstrip("\0") for text in table.column("y").to_pylist()]
        table = table.set_column(4, "y", pa.array(texts)).rename_columns(["whole", "real", "text", "truth", "y"])
        expected = open_table(write_table(Path(folder, "t.parquet"), table, "parquet"), "parquet")
        assert_same_dataset(open_table(write_table(Path(folder, "t.npz"), table, "numpy"), "numpy"), expected)
