"""Splits that follow a column: whole groups, the newest rows, or what the data says itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sources import Arrays, Source
from pipeline.data.sources.arrays import SplitColumn
from pipeline.data.split import Rows, check_apart, make_splits
from pipeline.errors import DataError
from pipeline.job_file import build_job

DAY = 86_400 * 10**9
NAMES = ("val", "test")


def source(values: Any, names: tuple[str, ...] = (), *, is_time: bool = False, fingerprint: str = "f") -> Source:
    values = np.asarray(values)
    arrays = Arrays(np.zeros((len(values), 1), np.float32), np.zeros(len(values), np.int64))
    return Source(arrays, None, (), fingerprint, columns={"c": SplitColumn(values, names, is_time)})


def splits(by: str, data: Source, *, seed: int = 1, **spec: Any) -> dict[str, Rows]:
    job = build_job({"name": "t", "seed": seed, "data": {"splits": {"by": by, "column": "c", **spec}}}, "test")
    return make_splits(job, data)


def attempted(by: str, data: Source, **spec: Any) -> dict[str, Rows] | DataError:
    try:
        return splits(by, data, **spec)
    except DataError as refused:
        return refused


def ids(by: str, data: Source, **spec: Any) -> dict[str, list[int]]:
    return {name: rows.ids.tolist() for name, rows in splits(by, data, **spec).items()}


def check_whole(parts: dict[str, Rows], rows: int) -> None:
    together = np.concatenate([part.ids for part in parts.values()])
    assert sorted(together.tolist()) == list(range(rows))
    assert all(part.ids.dtype == np.int64 and (np.diff(part.ids) > 0).all() and len(part) for part in parts.values())


SHARE = st.just(0) | st.floats(0.01, 0.9)


@given(
    groups=st.lists(st.integers(-5, 20), min_size=1, max_size=80),
    val=SHARE | st.integers(1, 5),
    test=SHARE | st.integers(1, 5),
    as_text=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_no_group_on_two_sides(groups: list[int], val: float, test: float, as_text: bool) -> None:
    if as_text:
        data = source([group + 5 for group in groups], tuple(map(str, range(26))))
    else:
        data = source(np.array(groups, np.float64))
    parts = attempted("group", data, val=val, test=test)
    if isinstance(parts, DataError):
        assert parts.where in ("data.splits.val", "data.splits.test")
        assert parts.fix
        return
    check_whole(parts, len(groups))
    assert set(parts) == {"train", *(name for name, asked in zip(NAMES, (val, test), strict=True) if asked)}
    sides = {name: {groups[row] for row in part.ids} for name, part in parts.items()}
    assert sum(map(len, sides.values())) == len(set(groups))
    for name, asked in zip(NAMES, (val, test), strict=True):
        if asked >= 1:
            assert len(sides[name]) == asked
    again = splits("group", data, val=val, test=test)
    assert all(np.array_equal(again[name].ids, part.ids) for name, part in parts.items())


@given(sizes=st.lists(st.integers(1, 20), min_size=2, max_size=40), val=st.floats(0.05, 0.6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=200)
def test_groups_come_as_near_to_a_share_as_the_smallest_allows(sizes: list[int], val: float, seed: int) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected_size = round(len(group) * val)
    parts = attempted("group", source(group), seed=seed, val=val)
    if isinstance(parts, DataError):
        # Too little is asked for to take the smallest group, or so much that none is left.
        assert 2 * expected_size <= min(sizes) or 2 * (len(group) - expected_size) <= max(sizes)
        return
    part = parts["val"]
    passed_over = set(range(len(sizes))) - set(group[part.ids].tolist())
    assert abs(len(part) - expected_size) <= max(max(sizes) / 2, min(sizes[one] for one in passed_over) / 2)


def test_the_draw_of_groups_depends_on_the_seed_and_the_data() -> None:
    group = np.arange(200) % 50
    first = splits("group", source(group), val=0.5)["val"].ids.tolist()
    assert splits("group", source(group), val=0.5, test=0.2)["val"].ids.tolist() == first
    assert splits("group", source(group), seed=2, val=0.5)["val"].ids.tolist() != first
    assert splits("group", source(group, fingerprint="g"), val=0.5)["val"].ids.tolist() != first


@given(
    days=st.lists(st.integers(0, 40), min_size=1, max_size=80),
    val=SHARE | st.integers(1, 30),
    test=SHARE | st.integers(1, 30),
    is_time=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_the_newest_are_held_out_and_ties_stay_together(
    days: list[int], val: float, test: float, is_time: bool
) -> None:
    windows: dict[str, Any] = {
        name: f"{asked}d" if is_time and asked >= 1 else asked for name, asked in zip(NAMES, (val, test), strict=True)
    }
    values = np.array(days) * (DAY if is_time else 1)
    parts = attempted("time", source(values, is_time=is_time), **windows)
    if isinstance(parts, DataError):
        assert parts.where in ("data.splits.val", "data.splits.test")
        assert "goes from" in parts.fix
        return
    check_whole(parts, len(days))
    order = [[days[row] for row in parts[name].ids] for name in ("train", "val", "test") if name in parts]
    for older, newer in pairwise(order):
        assert max(older) < min(newer)
    newest = max(days)
    if test >= 1:
        assert set(order[-1]) == {day for day in days if day > newest - test}
        if val >= 1:
            assert set(order[-2]) == {day for day in days if newest - test >= day > newest - test - val}
    elif test > 0:
        expected_size = round(len(days) * test)
        taken = len(order[-1])
        tie = max(days.count(day) for day in days)
        assert abs(taken - expected_size) <= tie / 2


def test_lengths_of_time() -> None:
    hours = source(np.arange(100) * 3600 * 10**9, is_time=True)
    assert ids("time", hours, val="2d", test="12h")["test"] == list(range(88, 100))
    assert ids("time", hours, val="2d", test="12h")["val"] == list(range(40, 88))
    assert ids("time", hours, val="90m")["val"] == [98, 99]
    assert ids("time", hours, val="0.5w")["val"] == list(range(16, 100))
    assert ids("time", source(np.arange(10)), val=3.0, test=0.2)["val"] == [5, 6, 7]
    assert ids("time", source(np.array([0.5, 3.5, 1.5, 2.5])), val=1.0)["val"] == [1]


def test_the_later_of_two_that_are_as_near() -> None:
    assert ids("time", source([1, 2, 2, 3]), val=0.5)["val"] == [3]


@pytest.mark.parametrize(
    ("data", "spec", "where", "words"),
    [
        (source([1, 2]), {"val": "14d"}, "data.splits.val", ["14d", "number"]),
        (source([0, DAY], is_time=True), {"val": 14.0}, "data.splits.val", ["14", "timestamp"]),
        (source([0, 1], ("a", "b")), {"val": "14d"}, "data.splits.val", ["text"]),
        (source([0, DAY], is_time=True), {"val": "14d"}, "data.splits.val", ["all of the 2 rows"]),
        (
            source([0, 5 * DAY], is_time=True),
            {"val": "1d", "test": "1d"},
            "data.splits.val",
            ["nothing", "1 rows before"],
        ),
        (source([3, 3, 3]), {"val": 0.4}, "data.splits.val", ["nothing of the 3"]),
        (source([1.0, np.nan]), {"val": 0.5}, "data.splits.column", ["1 of 2", "row 1"]),
    ],
)
def test_windows_that_cannot_be(data: Source, spec: dict[str, Any], where: str, words: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        splits("time", data, **spec)
    assert refused.value.where == where
    assert all(word in refused.value.what for word in words), refused.value.what
    assert refused.value.fix


@given(told=st.lists(st.sampled_from(["train", "val", "test", "validation"]), min_size=1, max_size=30))
def test_what_the_data_says(told: list[str]) -> None:
    names = tuple(sorted(set(told)))
    data = source([names.index(one) for one in told], names)
    if "train" not in told:
        with pytest.raises(DataError, match="no rows"):
            splits("column", data)
        return
    parts = splits("column", data)
    check_whole(parts, len(told))
    for name, part in parts.items():
        assert {told[row].replace("validation", "val") for row in part.ids} == {name}


def test_numbers_that_say_it() -> None:
    for values in (np.array([0, 1, 2, 0]), np.array([0.0, 1.0, 2.0, 0.0])):
        values_by_part = ids("column", source(values), train=["0"], val=["2"], test=["1"])
        assert values_by_part == {"train": [0, 3], "val": [2], "test": [1]}
    assert ids("column", source(np.array([0.5, 1.5])), train=["0.5"], val=["1.5"])["val"] == [1]


@pytest.mark.parametrize(
    ("data", "by", "words"),
    [
        (source([0, 1, 1], ("train", "holdout")), "column", ["holdout", "2 of 3"]),
        (source([0, -1, 0], ("train",)), "column", ["1 of 3", "row 1"]),
        (source([1.0, np.nan, np.nan]), "group", ["2 of 3", "row 1"]),
    ],
)
def test_values_that_mean_nothing(data: Source, by: str, words: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        splits(by, data)
    assert refused.value.where == "data.splits.column"
    assert all(word in refused.value.what for word in words), refused.value.what
    assert refused.value.fix


@pytest.mark.parametrize(
    ("spec", "where", "words"),
    [
        ({"val": 3}, "data.splits.val", ["3 of 3 groups"]),
        ({"val": 1, "test": 2}, "data.splits.test", ["2 of 2 groups"]),
        ({"val": 0.01}, "data.splits.val", ["0 of 3 groups", "largest has 4 of 7"]),
    ],
)
def test_groups_that_cannot_be(spec: dict[str, Any], where: str, words: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        splits("group", source([1, 1, 2, 3, 3, 3, 3]), **spec)
    assert refused.value.where == where
    assert all(word in refused.value.what for word in words), refused.value.what


@pytest.mark.parametrize("by", ["group", "time", "column"])
def test_a_column_that_is_not_there(by: str) -> None:
    data = source([1, 2, 3])
    without = Source(data.train, None, (), "f")
    with pytest.raises(DataError, match="'c'"):
        splits(by, without)


def test_a_row_on_two_sides_is_refused() -> None:
    apart = {"train": np.array([0, 1]), "val": np.array([2])}
    check_apart(apart, 3)
    with pytest.raises(DataError, match="row 1 and 0 more"):
        check_apart({**apart, "val": np.array([1, 2])}, 3)
