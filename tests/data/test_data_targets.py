"""What a task makes of a source's labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.data.sources import Arrays, Source, make_source
from pipeline.data.targets import class_count, class_counts, class_names, prepare_targets
from pipeline.errors import DataError
from pipeline.job import Task


def source(targets: Any, test: Any = None, classes: tuple[str, ...] = ()) -> Source:
    def arrays(values: Any) -> Arrays:
        return Arrays(np.zeros((len(values), 1), np.float32), np.asarray(values))

    return make_source(arrays(targets), None if test is None else arrays(test), classes)


@pytest.mark.parametrize(
    "targets", [np.array([2, 0, 1]), np.array([2.0, 0.0, 1.0], np.float32), np.array([[2], [0], [1]])]
)
def test_multiclass(targets: np.ndarray) -> None:
    prepared = prepare_targets(targets, Task(kind="multiclass"))
    assert prepared.dtype == np.int64
    assert prepared.tolist() == [2, 0, 1]


def test_binary() -> None:
    prepared = prepare_targets(np.array([5, 2, 0, 5]), Task(kind="binary", positive=[0, 5]))
    assert prepared.dtype == np.float32
    assert prepared.tolist() == [1, 0, 1, 1]
    as_they_are = prepare_targets(np.array([0, 1]), Task(kind="binary"), np.float64)
    assert (as_they_are.dtype, as_they_are.tolist()) == (np.dtype("f8"), [0, 1])


def test_regression() -> None:
    for targets, shape in ((np.zeros(3, np.float32), (3, 1)), (np.zeros((3, 2), np.float32), (3, 2))):
        prepared = prepare_targets(targets, Task(kind="regression"))
        assert (prepared.shape, prepared.dtype) == (shape, np.dtype("f4"))
    assert prepare_targets(np.array([3, 4]), Task(kind="regression"), np.float64).dtype == np.float64


@pytest.mark.parametrize(
    ("targets", "task", "words"),
    [
        (np.array([0, -1, -1]), Task(kind="multiclass"), ["-1 at row 1", "2 of 3"]),
        (np.array([0.5, 1.0], np.float32), Task(kind="multiclass"), ["0.5 at row 0", "1 of 2"]),
        (np.zeros((2, 2), np.float32), Task(kind="multiclass"), ["(2, 2)"]),
        (np.array([0, 1, 7, 7]), Task(kind="binary"), ["7 at row 2", "2 of 4"]),
    ],
)
def test_labels_that_do_not_fit(targets: np.ndarray, task: Task, words: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        prepare_targets(targets, task)
    assert all(word in refused.value.what for word in words)
    assert refused.value.fix


def test_none_of_the_positive_labels_occurs() -> None:
    with pytest.raises(DataError, match=r"\[7\]"):
        class_names(source([0, 1]), Task(kind="binary", positive=[7]))


def test_class_names() -> None:
    multiclass = Task(kind="multiclass")
    assert class_names(source([0, 1], test=[3]), multiclass) == ("0", "1", "2", "3")
    assert class_names(source([0], classes=("a", "b")), multiclass) == ("a", "b")
    assert class_names(source([0, 1], classes=("no", "yes")), Task(kind="binary")) == ("no", "yes")
    assert class_names(source([0, 1]), Task(kind="binary")) == ("0", "1")
    assert class_names(source([0, 1, 2]), Task(kind="binary", positive=[2])) == ("negative", "positive")
    assert class_count(source([0.5]), Task(kind="regression")) == 0
    assert class_count(source([0, 4]), multiclass) == 5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (source([0, 2], classes=("a", "b")), ["2", "2 classes"]),
        (source([0], test=[5], classes=("a", "b")), ["5", "2 classes"]),
        (source([0, 1_000_000]), ["1000000", "2 rows"]),
    ],
)
def test_labels_beyond_the_classes(data: Source, words: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        class_count(data, Task(kind="multiclass"))
    assert all(word in refused.value.what for word in words)


def test_class_counts() -> None:
    assert class_counts(np.array([0, 2, 2]), 4) == [1, 0, 2, 0]
    assert class_counts(np.array([0.0, 1.0, 1.0], np.float32), 2) == [1, 2]
