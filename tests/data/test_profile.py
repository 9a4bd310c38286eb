"""The profile of a table's columns: equal to what NumPy and Python count, whatever the batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tabular import profile as profile_module
from pipeline.data.tabular.arrow_types import arrow_kind
from pipeline.data.tabular.profile import ColumnProfile, profile_columns


def profile_array(array: pa.Array, batch_rows: int = 1000) -> ColumnProfile:
    table = pa.table({"x": array})
    return profile_columns({"x": arrow_kind(array.type)}, table.to_batches(batch_rows))["x"]


VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int64(): st.integers(-(2**62), 2**62) | st.integers(-3, 3),
    pa.uint8(): st.integers(0, 255),
    pa.float64(): st.floats() | st.integers(-3, 3).map(float),
    pa.float32(): st.floats(width=32),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(max_size=5) | st.sampled_from(["a", "b"]),
    pa.dictionary(pa.int32(), pa.string()): st.sampled_from(["a", "b", "c"]),
}


@given(st.data(), st.sampled_from(list(VALUES)), st.integers(1, 7))
def test_counts_are_those_of_a_plain_count(data: st.DataObject, kind: pa.DataType, batch_rows: int) -> None:
    values = data.draw(st.lists(st.none() | VALUES[kind], min_size=1, max_size=20))
    profile = profile_array(pa.array(values, kind), batch_rows)
    present = [value for value in values if value is not None and value == value]
    assert (profile.num_rows, profile.num_nulls) == (len(values), len(values) - len(present))
    expected = {value: present.count(value) for value in present}
    assert (profile.num_distinct, dict(profile.counts)) == (len(expected), expected)
    assert [count for _, count in profile.counts] == sorted(expected.values(), reverse=True)
    assert profile.is_constant == ((len(set(map(repr, expected))) == 1 and not profile.num_nulls) or not present)
    finite = [value for value in present if not isinstance(value, str) and math.isfinite(value)]
    if profile.kind.kind != "text":
        assert (profile.low, profile.high) == ((min(finite), max(finite)) if finite else (None, None))
        assert profile.has_infinite == (len(finite) < len(present))
        assert profile.is_whole == all(value == int(value) for value in finite)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=30), st.integers(0, 1), st.booleans(), st.integers(1, 9))
def test_row_numbers_are_each_number_once(values: list[int], first: int, permuted: bool, batch_rows: int) -> None:
    if permuted:
        values = [first + index for index in np.argsort(values, kind="stable").tolist()]
    expected = sorted(values) in (list(range(len(values))), list(range(1, len(values) + 1)))
    assert profile_array(pa.array(values), batch_rows).is_row_number == expected


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(1, 40))
def test_beyond_the_limit_only_that_there_are_more_is_known(distinct: int, batch_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_module, "MAX_DISTINCT_TEXTS", 30)
        patch.setattr(profile_module, "MAX_DISTINCT_NUMBERS", 20)
        patch.setattr(profile_module, "MAX_COUNTED_VALUES", 10)
        for values, limit in (([f"t{i}" for i in range(distinct)], 30), (list(range(distinct)), 20)):
            profile = profile_array(pa.array(values), batch_rows)
            assert (profile.num_distinct, profile.has_more_distinct) == (min(distinct, limit), distinct > limit)
            assert len(profile.counts) == (distinct if distinct <= 10 else 0)


def test_times_and_lists_have_their_range() -> None:
    days = pa.array(["2024-03-01", None, "2023-01-31"]).cast(pa.date32())
    assert (profile_array(days).low, profile_array(days).high) == ("2023-01-31", "2024-03-01")
    zoned = pa.array([1_700_000_000, 1_700_000_060], pa.int64()).cast(pa.timestamp("s", "Europe/Berlin"))
    assert profile_array(zoned).low == "2023-11-14T22:13:20"
    exact = pa.array([1_700_000_000_000_000_001], pa.int64()).cast(pa.timestamp("ns"))
    assert profile_array(exact).high == "2023-11-14T22:13:20"
    lists = pa.array([[1.0], None, [1.0, 2.0, 3.0]], pa.list_(pa.float64()))
    assert (profile_array(lists).length, profile_array(lists).num_nulls) == ((1, 3), 1)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["2024-01-31", "2023-12-01"], True),
        (["2024-01-31T10:00:00Z", "2024-01-31 10:00+02:00", None], True),
        (["2024-01-31", "soon"], False),
        ([None, None], False),
        (["20240131"], False),
    ],
)
def test_texts_that_are_times_are_told(texts: list[str | None], expected: bool) -> None:
    assert profile_array(pa.array(texts, pa.string())).is_time_text == expected


def test_an_empty_batch_and_a_column_of_nulls_are_counted() -> None:
    batches = [pa.record_batch({"x": pa.array([], pa.int8())}), pa.record_batch({"x": pa.nulls(3)})]
    profile = profile_columns({"x": arrow_kind(pa.int8())}, batches)["x"]
    assert (profile.num_rows, profile.num_nulls, profile.is_constant) == (3, 3, True)
