"""Splits: disjoint, deterministic, and of the requested sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.dataset import splits_to_table
from pipeline.data.sources import Dataset, DatasetPart, make_dataset
from pipeline.data.splits import allocate_proportionally, leave_one_each, make_splits, sample_stratified, split_warnings
from pipeline.errors import DataError


def make_job(splits: dict[str, Any], **more: Any) -> JobConfig:
    return build_job({"name": "t", "data": {"splits": splits}, **more}, "test")


def make_indexed_dataset(rows: int, *, test_rows: int = 0, classes: int = 3) -> Dataset:
    def arrays(count: int, start: int) -> DatasetPart:
        inputs = np.arange(start, start + count, dtype=np.float32)[:, None]
        return DatasetPart(inputs, np.arange(count, dtype=np.int64) ** 2 % classes)

    return make_dataset(arrays(rows, 0), arrays(test_rows, rows) if test_rows else None, ())


SPLIT_SIZE = st.one_of(st.floats(0, 0.99), st.integers(0, 150))


@given(
    rows=st.integers(1, 200),
    val=SPLIT_SIZE,
    test=SPLIT_SIZE,
    train=st.none() | SPLIT_SIZE.filter(bool),
    stratify=st.booleans(),
    has_test=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_random_splits_have_the_requested_sizes(
    rows: int, val: float, test: float, train: float | None, stratify: bool, has_test: bool
) -> None:
    data = make_indexed_dataset(rows, test_rows=7 if has_test else 0)
    sizes = {"val": val, "test": test, "train": train}
    job = make_job({"by": "random", "stratify": stratify, **sizes})
    counts = {name: round(v * rows) if v < 1 else int(v) for name, v in sizes.items() if v}
    rest = rows - sum(counts.values())
    counts.setdefault("train", rest)
    if rest < 0 or min(counts.values()) < 1:
        with pytest.raises(DataError) as error:
            make_splits(job, data)
        assert error.value.where.startswith("data.splits")
        assert error.value.fix
        return
    splits = make_splits(job, data)
    from_training_part = {name: part for name, part in splits.items() if part.part == "train"}
    assert {name: len(part) for name, part in from_training_part.items()} == counts
    joined = np.concatenate([part.indices for part in from_training_part.values()])
    assert len(np.unique(joined)) == len(joined)
    assert 0 <= joined.min() <= joined.max() < rows
    assert all((np.diff(part.indices) > 0).all() and part.indices.dtype == np.int64 for part in splits.values())
    if has_test and "test" not in from_training_part:
        assert splits["test"].part == "test"
        assert splits["test"].indices.tolist() == list(range(7))
    repeated = make_splits(job, data)
    assert all(np.array_equal(repeated[name].indices, splits[name].indices) for name in splits)


def test_random_split_depends_on_seed_and_data() -> None:
    splits = {"by": "random", "val": 0.5}

    def val(job: JobConfig, data: Dataset) -> list[int]:
        indices: list[int] = make_splits(job, data)["val"].indices.tolist()
        return indices

    first = val(make_job(splits), make_indexed_dataset(100))
    assert val(make_job(splits, seed={"all": 1, "init": 2}), make_indexed_dataset(100)) == first
    assert val(make_job(splits, seed={"all": 1, "split": 2}), make_indexed_dataset(100)) != first
    assert val(make_job(splits), make_indexed_dataset(100, classes=4)) != first


def test_adding_a_test_split_keeps_val() -> None:
    data = make_indexed_dataset(100)
    without, with_test = (make_splits(make_job({"val": 20, "test": test}), data) for test in (0, 30))
    assert np.array_equal(without["val"].indices, with_test["val"].indices)


@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=5), val=st.floats(0.05, 0.4))
@settings(deadline=None)
def test_stratified_splits_are_proportional(counts: list[int], val: float) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    num_rows = len(labels)
    data = make_dataset(DatasetPart(np.zeros((num_rows, 1), np.float32), labels.astype(np.int64)), None, ())
    if round(val * num_rows) == 0:
        return
    indices = make_splits(make_job({"val": val, "stratify": True}), data)["val"].indices
    taken = np.bincount(labels[indices], minlength=len(counts))
    assert (np.abs(taken - round(val * num_rows) * np.array(counts) / num_rows) < 1).all()


@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), st.integers(0, 30), st.integers(0, 20))
def test_one_row_of_each_class_is_left_for_training(sizes: list[int], count: int, large: int) -> None:
    sizes = [*sizes, large + 1]
    takes = allocate_proportionally(sizes, min(count, sum(sizes)))
    left = leave_one_each(takes, sizes)
    assert sum(left) == sum(takes)
    assert all(0 <= take <= size for take, size in zip(left, sizes, strict=True))
    if sum(takes) <= sum(sizes) - len(sizes):
        assert all(take < size for take, size in zip(left, sizes, strict=True))
    if all(take < size for take, size in zip(takes, sizes, strict=True)):
        assert left == takes, "otherwise splits are what they were"


def test_stratify_needs_classes() -> None:
    with pytest.raises(DataError, match="regression"):
        make_splits(make_job({"stratify": True}, task="regression"), make_indexed_dataset(10))


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=6), data=st.data())
def test_allocation_is_within_one_of_proportional(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, sum(sizes)))
    takes = allocate_proportionally(sizes, count)
    assert sum(takes) == count
    total = max(sum(sizes), 1)
    assert all(
        0 <= take <= size and abs(take - count * size / total) < 1 for take, size in zip(takes, sizes, strict=True)
    )


def test_range_splits_take_rows_by_position() -> None:
    splits = make_splits(
        make_job({"by": "range", "train": [0, 4], "val": [6, 9]}), make_indexed_dataset(10, test_rows=3)
    )
    assert splits["train"].indices.tolist() == [0, 1, 2, 3]
    assert splits["val"].indices.tolist() == [6, 7, 8]
    assert (splits["test"].part, splits["test"].indices.tolist()) == ("test", [0, 1, 2])


@pytest.mark.parametrize(
    ("splits", "where", "words"),
    [
        ({"by": "range", "train": [0, 11]}, "data.splits.train", ["[0, 11]", "10 rows"]),
        ({"by": "range", "train": [0, 5], "val": [4, 8]}, "data.splits", ["train [0, 5]", "val [4, 8]"]),
        ({"by": "range", "train": [3, 9], "val": [2, 10]}, "data.splits", ["train [3, 9]", "val [2, 10]"]),
        ({"by": "range", "train": [0, 9], "val": [9, 10], "test": [2, 4]}, "data.splits", ["train", "test"]),
        ({"val": 10}, "data.splits", ["val: 10", "no rows to train", "10"]),
        ({"val": 0.6, "test": 0.6}, "data.splits", ["val: 0.6 (6 rows)", "test: 0.6 (6 rows)"]),
        ({"val": 2, "train": 9}, "data.splits", ["val: 2", "train: 9", "10"]),
        ({"val": 0.01}, "data.splits.val", ["no rows", "10"]),
        ({"val": 2, "train": 0.01}, "data.splits.train", ["no rows", "10"]),
    ],
)
def test_invalid_splits_are_rejected(splits: dict[str, Any], where: str, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        make_splits(make_job(splits), make_indexed_dataset(10))
    assert error.value.where == where
    assert all(word in error.value.what for word in words)


def test_val_of_zero_makes_no_validation_split() -> None:
    assert list(make_splits(make_job({"val": 0}), make_indexed_dataset(10))) == ["train"]


def test_fewer_rows_than_a_batch_is_a_warning() -> None:
    for batch_size, count in ((100, 1), (8, 0), ("all", 0)):
        job = make_job({"val": 2}, train={"batch_size": batch_size})
        assert len(split_warnings(job, make_splits(job, make_indexed_dataset(10)))) == count


def test_table_of_splits_contains_every_row() -> None:
    splits = make_splits(make_job({"val": 3}), make_indexed_dataset(10, test_rows=4))
    table = splits_to_table(splits)
    assert table.schema.names == ["split", "part", "row"]
    assert [str(kind) for kind in table.schema.types] == ["string", "string", "int64"]
    stored = [(row["split"], row["part"], row["row"]) for row in table.to_pylist()]
    assert stored == [(name, rows.part, row) for name, rows in splits.items() for row in rows.indices.tolist()]


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    fraction=st.floats(0.01, 1.2),
    kind=st.sampled_from(["labels", "values", "columns"]),
)
@settings(deadline=None)
def test_limited_sample_is_representative(counts: list[int], fraction: float, kind: str) -> None:
    """Rows are sorted by class, which is the worst case."""
    labels = np.repeat(np.arange(len(counts)), counts)
    num_rows = len(labels)
    indices = 5 + 2 * np.arange(num_rows)
    targets = {"labels": labels, "values": labels / 3, "columns": np.stack([labels / 3, -labels], 1)}[kind]
    count = max(1, round(num_rows * fraction))
    sample = sample_stratified(indices, targets, count, 1, "val")
    assert len(sample) == min(count, num_rows)
    assert np.array_equal(sample, np.unique(sample))
    assert np.isin(sample, indices).all()
    class_counts = np.bincount(labels[(sample - 5) // 2], minlength=len(counts))
    assert (np.abs(class_counts - np.array(counts) * len(sample) / num_rows) < 1).all()
    assert np.array_equal(sample_stratified(indices, targets, count, 1, "val"), sample)


def test_sampled_rows_are_uniform() -> None:
    """This includes rows of classes that are too rare for each sample: different ones are left out."""
    labels = np.array([0] * 9 + [1] * 2 + list(range(2, 21)))
    taken = np.zeros(30)
    for seed in range(600):
        taken[sample_stratified(np.arange(30), labels, 6, seed, "val")] += 1
    assert (abs(taken / 600 - 6 / 30) < 0.08).all()
    assert len({tuple(sample_stratified(np.arange(30), labels, 6, 1, name)) for name in ("val", "train")}) == 2
