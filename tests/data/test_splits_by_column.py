"""Splits by a column: whole groups, the newest rows, or a column that contains the split."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.files import build_job
from pipeline.data.dataset import SplitColumn, SplitIndices
from pipeline.data.sources import Dataset, DatasetPart
from pipeline.data.splits import check_disjoint, make_splits
from pipeline.errors import DataError

DAY_NS = 86_400 * 10**9
SPLIT_NAMES = ("val", "test")


def make_dataset(values: Any, names: tuple[str, ...] = (), *, is_time: bool = False, fingerprint: str = "f") -> Dataset:
    values = np.asarray(values)
    arrays = DatasetPart(np.zeros((len(values), 1), np.float32), np.zeros(len(values), np.int64))
    return Dataset(arrays, None, (), fingerprint, split_columns={"c": SplitColumn(values, names, is_time)})


def split_dataset(by: str, data: Dataset, *, seed: int = 1, **options: Any) -> dict[str, SplitIndices]:
    job = build_job({"name": "t", "seed": seed, "data": {"splits": {"by": by, "column": "c", **options}}}, "test")
    return make_splits(job, data)


def try_split(by: str, data: Dataset, **options: Any) -> dict[str, SplitIndices] | DataError:
    try:
        return split_dataset(by, data, **options)
    except DataError as error:
        return error


def split_values(by: str, data: Dataset, **options: Any) -> dict[str, list[int]]:
    return {name: rows.indices.tolist() for name, rows in split_dataset(by, data, **options).items()}


def check_partition(parts: dict[str, SplitIndices], rows: int) -> None:
    joined = np.concatenate([part.indices for part in parts.values()])
    assert sorted(joined.tolist()) == list(range(rows))
    assert all(
        part.indices.dtype == np.int64 and (np.diff(part.indices) > 0).all() and len(part) for part in parts.values()
    )


SPLIT_SIZE = st.just(0) | st.floats(0.01, 0.9)


@given(
    groups=st.lists(st.integers(-5, 20), min_size=1, max_size=80),
    val=SPLIT_SIZE | st.integers(1, 5),
    test=SPLIT_SIZE | st.integers(1, 5),
    as_text=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_groups_are_in_one_part(groups: list[int], val: float, test: float, as_text: bool) -> None:
    if as_text:
        data = make_dataset([group + 5 for group in groups], tuple(map(str, range(26))))
    else:
        data = make_dataset(np.array(groups, np.float64))
    parts = try_split("group", data, val=val, test=test)
    if isinstance(parts, DataError):
        assert parts.where in ("data.splits.val", "data.splits.test")
        assert parts.fix
        return
    check_partition(parts, len(groups))
    assert set(parts) == {"train", *(name for name, size in zip(SPLIT_NAMES, (val, test), strict=True) if size)}
    groups_by_part = {name: {groups[row] for row in part.indices} for name, part in parts.items()}
    assert sum(map(len, groups_by_part.values())) == len(set(groups))
    for name, size in zip(SPLIT_NAMES, (val, test), strict=True):
        if size >= 1:
            assert len(groups_by_part[name]) == size
    repeated = split_dataset("group", data, val=val, test=test)
    assert all(np.array_equal(repeated[name].indices, part.indices) for name, part in parts.items())


@given(sizes=st.lists(st.integers(1, 20), min_size=2, max_size=40), val=st.floats(0.05, 0.6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=200)
def test_group_splits_approximate_their_size(sizes: list[int], val: float, seed: int) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected_size = round(len(group) * val)
    parts = try_split("group", make_dataset(group), seed=seed, val=val)
    if isinstance(parts, DataError):
        # The fraction is too small to take the smallest group, or so large that no group is left.
        assert 2 * expected_size <= min(sizes) or 2 * (len(group) - expected_size) <= max(sizes)
        return
    part = parts["val"]
    skipped = set(range(len(sizes))) - set(group[part.indices].tolist())
    assert abs(len(part) - expected_size) <= max(
        max(sizes) / 2, min(sizes[skipped_group] for skipped_group in skipped) / 2
    )


def test_group_split_depends_on_seed_and_data() -> None:
    group = np.arange(200) % 50
    first = split_dataset("group", make_dataset(group), val=0.5)["val"].indices.tolist()
    assert split_dataset("group", make_dataset(group), val=0.5, test=0.2)["val"].indices.tolist() == first
    assert split_dataset("group", make_dataset(group), seed=2, val=0.5)["val"].indices.tolist() != first
    assert split_dataset("group", make_dataset(group, fingerprint="g"), val=0.5)["val"].indices.tolist() != first


@given(
    days=st.lists(st.integers(0, 40), min_size=1, max_size=80),
    val=SPLIT_SIZE | st.integers(1, 30),
    test=SPLIT_SIZE | st.integers(1, 30),
    is_time=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_newest_rows_are_held_out_and_ties_stay_together(
    days: list[int], val: float, test: float, is_time: bool
) -> None:
    windows: dict[str, Any] = {
        name: f"{size}d" if is_time and size >= 1 else size for name, size in zip(SPLIT_NAMES, (val, test), strict=True)
    }
    values = np.array(days) * (DAY_NS if is_time else 1)
    parts = try_split("time", make_dataset(values, is_time=is_time), **windows)
    if isinstance(parts, DataError):
        assert parts.where in ("data.splits.val", "data.splits.test")
        assert "goes from" in parts.fix
        return
    check_partition(parts, len(days))
    order = [[days[row] for row in parts[name].indices] for name in ("train", "val", "test") if name in parts]
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


def test_time_windows_contain_the_newest_rows() -> None:
    hours = make_dataset(np.arange(100) * 3600 * 10**9, is_time=True)
    assert split_values("time", hours, val="2d", test="12h")["test"] == list(range(88, 100))
    assert split_values("time", hours, val="2d", test="12h")["val"] == list(range(40, 88))
    assert split_values("time", hours, val="90m")["val"] == [98, 99]
    assert split_values("time", hours, val="0.5w")["val"] == list(range(16, 100))
    assert split_values("time", make_dataset(np.arange(10)), val=3.0, test=0.2)["val"] == [5, 6, 7]
    assert split_values("time", make_dataset(np.array([0.5, 3.5, 1.5, 2.5])), val=1.0)["val"] == [1]


def test_later_boundary_wins_a_tie() -> None:
    assert split_values("time", make_dataset([1, 2, 2, 3]), val=0.5)["val"] == [3]


@pytest.mark.parametrize(
    ("data", "options", "where", "words"),
    [
        (make_dataset([1, 2]), {"val": "14d"}, "data.splits.val", ["14d", "number"]),
        (make_dataset([0, DAY_NS], is_time=True), {"val": 14.0}, "data.splits.val", ["14", "timestamp"]),
        (make_dataset([0, 1], ("a", "b")), {"val": "14d"}, "data.splits.val", ["text"]),
        (make_dataset([0, DAY_NS], is_time=True), {"val": "14d"}, "data.splits.val", ["all of the 2 rows"]),
        (
            make_dataset([0, 5 * DAY_NS], is_time=True),
            {"val": "1d", "test": "1d"},
            "data.splits.val",
            ["nothing", "1 rows before"],
        ),
        (make_dataset([3, 3, 3]), {"val": 0.4}, "data.splits.val", ["nothing of the 3"]),
        (make_dataset([1.0, np.nan]), {"val": 0.5}, "data.splits.column", ["1 of 2", "row 1"]),
    ],
)
def test_invalid_windows_are_rejected(data: Dataset, options: dict[str, Any], where: str, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        split_dataset("time", data, **options)
    assert error.value.where == where
    assert all(word in error.value.what for word in words), error.value.what
    assert error.value.fix


@given(values=st.lists(st.sampled_from(["train", "val", "test", "validation"]), min_size=1, max_size=30))
def test_split_by_text_column(values: list[str]) -> None:
    names = tuple(sorted(set(values)))
    data = make_dataset([names.index(value) for value in values], names)
    if "train" not in values:
        with pytest.raises(DataError, match="no rows"):
            split_dataset("column", data)
        return
    parts = split_dataset("column", data)
    check_partition(parts, len(values))
    for name, part in parts.items():
        assert {values[row].replace("validation", "val") for row in part.indices} == {name}


def test_split_by_numeric_column() -> None:
    for values in (np.array([0, 1, 2, 0]), np.array([0.0, 1.0, 2.0, 0.0])):
        values_by_part = split_values("column", make_dataset(values), train=["0"], val=["2"], test=["1"])
        assert values_by_part == {"train": [0, 3], "val": [2], "test": [1]}
    assert split_values("column", make_dataset(np.array([0.5, 1.5])), train=["0.5"], val=["1.5"])["val"] == [1]


@pytest.mark.parametrize(
    ("data", "by", "words"),
    [
        (make_dataset([0, 1, 1], ("train", "holdout")), "column", ["holdout", "2 of 3"]),
        (make_dataset([0, -1, 0], ("train",)), "column", ["1 of 3", "row 1"]),
        (make_dataset([1.0, np.nan, np.nan]), "group", ["2 of 3", "row 1"]),
    ],
)
def test_unknown_split_values_are_rejected(data: Dataset, by: str, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        split_dataset(by, data)
    assert error.value.where == "data.splits.column"
    assert all(word in error.value.what for word in words), error.value.what
    assert error.value.fix


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"val": 3}, "data.splits.val", ["3 of 3 groups"]),
        ({"val": 1, "test": 2}, "data.splits.test", ["2 of 2 groups"]),
        ({"val": 0.01}, "data.splits.val", ["0 of 3 groups", "largest has 4 of 7"]),
    ],
)
def test_invalid_groups_are_rejected(options: dict[str, Any], where: str, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        split_dataset("group", make_dataset([1, 1, 2, 3, 3, 3, 3]), **options)
    assert error.value.where == where
    assert all(word in error.value.what for word in words), error.value.what


@pytest.mark.parametrize("by", ["group", "time", "column"])
def test_missing_column_is_rejected(by: str) -> None:
    data = make_dataset([1, 2, 3])
    without = Dataset(data.train, None, (), "f")
    with pytest.raises(DataError, match="'c'"):
        split_dataset(by, without)


def test_row_in_two_parts_is_rejected() -> None:
    disjoint = {"train": np.array([0, 1]), "val": np.array([2])}
    check_disjoint(disjoint, 3)
    with pytest.raises(DataError, match="row 1 and 0 more"):
        check_disjoint({**disjoint, "val": np.array([1, 2])}, 3)
