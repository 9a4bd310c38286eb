"""Targets: classes and scales fitted on training rows, and the conversion of labels to training targets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.config.files import build_job
from pipeline.config.files.yaml_io import parse_yaml
from pipeline.data.dataset import SplitIndices
from pipeline.data.sources import Dataset, DatasetPart
from pipeline.data.splits import make_splits
from pipeline.data.targets import TargetTransform, count_classes, fit_target_transform, label_warnings
from pipeline.errors import DataError, JobError


def make_dataset(targets: Any, test: Any = None, classes: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> Dataset:
    def arrays(values: Any) -> DatasetPart:
        return DatasetPart(np.zeros((len(values), 1), np.float32), np.asarray(values))

    return Dataset(arrays(targets), None if test is None else arrays(test), classes, "fingerprint", label_names=names)


def split_indices(data: Dataset, train: int | None = None) -> dict[str, SplitIndices]:
    """Return splits: the first `train` rows for training, the others for validation."""
    indices = np.arange(len(data.train))
    splits = {"train": SplitIndices("train", indices[:train])}
    if train is not None and train < len(indices):
        splits["val"] = SplitIndices("train", indices[train:])
    if data.test is not None:
        splits["test"] = SplitIndices("test", np.arange(len(data.test)))
    return splits


def fit_dataset_targets(data: Dataset, task: Any, train: int | None = None) -> TargetTransform:
    table = {"data": {"source": "parquet", "url": "some/table", "label": "color"}} if data.label_names else {}
    return fit_target_transform(
        build_job({"name": "t", "task": task, **table}, "test"), data, split_indices(data, train)
    )


def expect_data_error(data: Dataset, task: Any, train: int | None = None) -> DataError:
    with pytest.raises(DataError) as error:
        fit_dataset_targets(data, task, train)
    assert error.value.fix
    return error.value


@pytest.mark.parametrize(
    "targets", [np.array([2, 0, 1]), np.array([2.0, 0.0, 1.0], np.float32), np.array([[2], [0], [1]])]
)
def test_multiclass_targets_are_class_indices(targets: np.ndarray) -> None:
    transformed = fit_dataset_targets(make_dataset(targets), "multiclass").transform(targets)
    assert transformed.dtype == np.int64
    assert transformed.tolist() == [2, 0, 1]


def test_binary_targets_are_zero_and_one() -> None:
    data = make_dataset([5, 2, 0, 5])
    transformed = fit_dataset_targets(data, {"kind": "binary", "positive": [0, 5]}).transform(data.train.targets)
    assert transformed.dtype == np.float32
    assert transformed.tolist() == [1, 0, 1, 1]
    unchanged = fit_dataset_targets(make_dataset([0, 1]), "binary").transform(np.array([0, 1]), dtype=np.float64)
    assert (unchanged.dtype, unchanged.tolist()) == (np.dtype("f8"), [0, 1])
    assert fit_dataset_targets(make_dataset([0, 1]), {"kind": "binary", "positive": [False]}).transform(
        np.array([0, 1])
    ).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("targets", "task", "words"),
    [
        (np.array([0.5, 1.0], np.float32), "multiclass", ["0.5 at row 0", "1 of 2"]),
        (np.zeros((2, 2), np.float32), "multiclass", ["(2, 2)"]),
        ([0, 1, 2, 2], "binary", ["3 different labels (0, 1, 2)", "binary needs two"]),
        ([1, 1, 1], "binary", ["3 training rows", "'1'"]),
        ([4, 4], "multiclass", ["2 training rows", "'4'"]),
        ([3, 3], {"kind": "binary", "positive": [3]}, ["2 training rows", "'positive'"]),
        ([0, 1], {"kind": "binary", "positive": [7]}, ["[7]"]),
        ([0, 1], {"kind": "binary", "positive": ["yes"]}, ["['yes']"]),
    ],
)
def test_labels_that_do_not_fit_the_task_are_rejected(targets: Any, task: Any, words: list[str]) -> None:
    error = expect_data_error(make_dataset(targets), task)
    assert all(word in error.what for word in words), error.what


def test_class_names_come_from_the_source_or_the_labels() -> None:
    assert fit_dataset_targets(make_dataset([0, 1], classes=("a", "b", "c")), "multiclass").classes == ("a", "b", "c")
    assert fit_dataset_targets(make_dataset([0, 1], classes=("no", "yes")), "binary").classes == ("no", "yes")
    assert fit_dataset_targets(make_dataset([0, 1]), "binary").classes == ("0", "1")
    assert fit_dataset_targets(make_dataset([0, 1, 2]), {"kind": "binary", "positive": [2]}).classes == (
        "negative",
        "positive",
    )
    assert fit_dataset_targets(make_dataset([0, 1]), {"kind": "binary", "positive": [0]}).classes == ("1", "0")
    assert fit_dataset_targets(
        make_dataset([0, 1], classes=("no", "yes")), {"kind": "binary", "positive": [0]}
    ).classes == ("yes", "no")
    assert fit_dataset_targets(make_dataset([0.5, 1.0]), "regression").classes == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (make_dataset([0, 2], classes=("a", "b")), ["2", "2 classes"]),
        (make_dataset([0], test=[5], classes=("a", "b")), ["5", "2 classes"]),
    ],
)
def test_labels_beyond_the_declared_classes_are_rejected(data: Dataset, words: list[str]) -> None:
    assert all(word in expect_data_error(data, "multiclass").what for word in words)


CLASS_NAMES = ("blue", "green", "red")


@pytest.mark.parametrize("labels", [[2021, 2019, 2020, 2021], [3, 1, 2, 3], [-7, 5, -9, -7], [10**12, 0, -(10**12), 0]])
def test_numeric_classes_are_the_observed_values(labels: list[int]) -> None:
    data = make_dataset(labels)
    fitted = fit_dataset_targets(data, "multiclass")
    assert fitted.classes == tuple(str(label) for label in sorted(set(labels)))
    class_indices = fitted.transform(data.train.targets)
    assert class_indices.tolist() == [sorted(set(labels)).index(label) for label in labels]
    decoded = fitted.decode_labels(class_indices)
    assert (decoded.dtype, decoded.tolist()) == (np.dtype("i8"), labels)
    from_text = fitted.transform(np.array([1, 0]), (str(labels[0]), str(labels[1])))
    assert from_text.tolist() == class_indices[[1, 0]].tolist()
    message = rf"{labels[0] + 1000} at row 1 is not a class of the training data \(1 of 2 rows\)"
    with pytest.raises(DataError, match=message):
        fitted.transform(np.array([labels[0], labels[0] + 1000]))


@pytest.mark.parametrize("labels", [[-1, 1], [1, 2], [0, 1], [-3, 2019]])
def test_later_of_two_numbers_is_positive(labels: list[int]) -> None:
    data = make_dataset([labels[1], labels[0], labels[1]])
    fitted = fit_dataset_targets(data, "binary")
    assert fitted.classes == tuple(map(str, labels))
    assert fitted.transform(data.train.targets).tolist() == [1, 0, 1]
    assert fitted.decode_labels(np.array([1, 0])).tolist() == labels[::-1]
    messages = label_warnings(fitted)
    assert len(messages) == (0 if labels == [0, 1] else 1)
    assert all(f"{labels[1]} counts as positive" in text for text in messages)
    other = fit_dataset_targets(data, {"kind": "binary", "positive": [labels[0]]})
    assert other.transform(data.train.targets).tolist() == [0, 1, 0]
    assert other.decode_labels(np.array([1, 0])).tolist() == labels
    assert label_warnings(other) == []


@pytest.mark.parametrize("names", [("no", "yes"), ("1", "2"), ("false", "true"), ("a b", "\u00e4")])
def test_later_of_two_texts_is_positive(names: tuple[str, str]) -> None:
    data = make_dataset([1, 0, 1], names=names)
    fitted = fit_dataset_targets(data, "binary")
    assert fitted.classes == names
    assert fitted.transform(data.train.targets, names).tolist() == [1, 0, 1]
    assert fitted.transform(np.array([0, 1]), names[::-1]).tolist() == [1, 0]
    assert fitted.decode_labels(np.array([1, 0])).tolist() == [names[1], names[0]]
    (message,) = label_warnings(fitted)
    assert f"of the labels {names[0]} and {names[1]}, {names[1]} counts as positive" in message
    advice = parse_yaml(message.partition("use task: ")[2], "message")
    opposite = fit_dataset_targets(data, advice)
    assert opposite.classes == names[::-1]
    assert opposite.transform(data.train.targets, names).tolist() == [0, 1, 0]
    assert label_warnings(opposite) == []
    with pytest.raises(DataError, match="'maybe' at row 1 is not a class of the training data"):
        fitted.transform(np.array([0, 1]), (names[0], "maybe"))
    assert TargetTransform.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


@pytest.mark.parametrize("task", ["binary", "multiclass", {"kind": "binary", "positive": [False]}])
def test_booleans_stay_booleans(task: Any) -> None:
    labels = [True, False, True]
    data = replace(make_dataset(np.array(labels, np.int64)), has_boolean_labels=True)
    fitted = fit_dataset_targets(data, task)
    is_reversed = isinstance(task, dict)
    assert fitted.classes == (("true", "false") if is_reversed else ("false", "true"))
    class_indices = fitted.transform(data.train.targets)
    assert class_indices.tolist() == [label != is_reversed for label in labels]
    decoded = fitted.decode_labels(class_indices.astype(np.int64))
    assert (decoded.dtype.kind, decoded.tolist()) == ("b", labels)
    assert len(label_warnings(fitted)) == (task == "binary")
    assert [fitted.label_index(label) for label in ("true", 1, "false")] == ([0, 0, 1] if is_reversed else [1, 1, 0])
    restored = TargetTransform.from_json(json.loads(json.dumps(fitted.to_json())))
    assert restored == fitted
    stored = {name: value for name, value in fitted.to_json().items() if name != "boolean"}
    assert TargetTransform.from_json(stored).is_boolean is False, "a checkpoint of an earlier version"


def test_numeric_label_without_training_rows_is_rejected() -> None:
    for task in ("multiclass", "binary"):
        error = expect_data_error(make_dataset([1, 3, 2, 3, 2]), task, train=2)
        assert all(word in error.what for word in ("the label 2", "val", "2 of 3"))
        assert "stratify" in error.fix
    assert "test" in expect_data_error(make_dataset([1, 3], test=[3, 4, 4]), "multiclass").what
    named = make_dataset([1, 0, 2], classes=("a", "b", "c"))
    assert fit_dataset_targets(named, "multiclass", train=2).transform(np.array([2])).tolist() == [2], (
        "a class that the source declares needs no training row"
    )
    used = {"train": SplitIndices("train", np.array([0, 1]))}
    fitted = fit_target_transform(build_job({"name": "t"}, "test"), make_dataset([3, 1, 2]), used)
    assert fitted.transform(np.array([3, 1, 2]), indices=np.array([0, 1])).tolist() == [1, 0, -1]


@pytest.mark.parametrize("names", [(), tuple(f"key {number:03d}" for number in range(200))])
def test_values_that_are_not_labels_are_rejected(names: tuple[str, ...]) -> None:
    values = np.arange(200) if names else np.arange(200) * 10_000
    error = expect_data_error(make_dataset(values, names=names), "multiclass", train=180)
    assert all(word in error.what for word in ("180 different labels in 180 training rows", "too many"))
    assert "data.label" in error.fix
    assert ("regression" in error.fix) == (not names)
    fit_dataset_targets(make_dataset(np.arange(200) % 100), "multiclass")
    fit_dataset_targets(make_dataset(np.arange(90)), "multiclass")


def test_text_labels_become_class_indices() -> None:
    data = make_dataset([2, 0, 2, 0], names=CLASS_NAMES)
    fitted = fit_dataset_targets(data, "multiclass")
    assert fitted.classes == ("blue", "red")  # no row is green
    assert fitted.transform(data.train.targets, CLASS_NAMES).tolist() == [1, 0, 1, 0]
    # New data may have other label names.
    assert fitted.transform(np.array([0, 0]), ("red",)).tolist() == [1, 1]
    with pytest.raises(DataError, match="'pink' at row 1"):
        fitted.transform(np.array([1, 0, 1]), ("pink", "red"))
    with pytest.raises(DataError, match="labels are numbers"):
        fitted.transform(np.array([0, 1]))
    by_number = fit_dataset_targets(make_dataset([0, 1], classes=("no", "yes")), "binary")
    assert by_number.transform(np.array([0, 1]), ("yes", "no")).tolist() == [1, 0]


def test_text_label_without_training_rows_is_rejected() -> None:
    error = expect_data_error(make_dataset([0, 2, 1, 1, 0], names=CLASS_NAMES), "multiclass", train=2)
    assert all(word in error.what for word in ("'green'", "val", "2 of 3"))
    assert error.where == "some/table: color"
    assert "stratify" in error.fix
    # A row that is in no split may have any label.
    data = make_dataset([0, 2, 1], names=CLASS_NAMES)
    used = {"train": SplitIndices("train", np.array([0, 1]))}
    fitted = fit_target_transform(build_job({"name": "t"}, "test"), data, used)
    assert fitted.transform(data.train.targets, CLASS_NAMES, indices=np.array([0, 1])).tolist() == [0, 1, -1]


def test_positive_text_labels_become_one() -> None:
    data = make_dataset([1, 0, 1], names=("no", "yes"))
    fitted = fit_dataset_targets(data, {"kind": "binary", "positive": ["yes"]})
    assert fitted.classes == ("no", "yes")
    assert fitted.transform(data.train.targets, data.label_names).tolist() == [1, 0, 1]
    assert fitted.transform(np.array([0, 1]), ("yes", "maybe")).tolist() == [1, 0]
    three = fit_dataset_targets(
        make_dataset([2, 0, 1], names=CLASS_NAMES), {"kind": "binary", "positive": ["red", "blue"]}
    )
    assert three.classes == ("negative", "positive")
    error = expect_data_error(make_dataset([0, 2, 1], names=CLASS_NAMES), "binary")
    assert "3 different labels (blue, green, red)" in error.what
    assert 'positive: ["red"]' in error.fix
    assert "no, yes" in expect_data_error(data, {"kind": "binary", "positive": ["Yes"]}).fix
    numbers = make_dataset([0, 1], names=("3", "8"))
    assert fit_dataset_targets(numbers, {"kind": "binary", "positive": [8]}).transform(
        np.array([0, 1]), ("3", "8")
    ).tolist() == [0, 1]


def test_single_class_is_rejected() -> None:
    data = make_dataset([0, 0, 2], names=CLASS_NAMES)
    error = expect_data_error(data, {"kind": "binary", "positive": ["red"]}, train=2)
    assert "2 training rows" in error.what
    assert "'blue'" in expect_data_error(make_dataset([0, 0], names=CLASS_NAMES), "multiclass").what


@given(
    values=st.lists(st.lists(st.floats(-1000, 1000, width=32), min_size=2, max_size=2), min_size=4, max_size=12),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(deadline=None)
def test_regression_targets_are_scaled(values: list[list[float]], dtype: Any) -> None:
    data = make_dataset(np.array(values, np.float32))
    raw = np.array(values)
    mean, std = raw[:3].mean(0), raw[:3].std(0)
    assume(std.min() > 1e-30)  # another row is at most 1e33 deviations away, which float32 can hold
    fitted = fit_dataset_targets(data, "regression", train=3)
    transformed = fitted.transform(data.train.targets, dtype=dtype)
    assert transformed.dtype == dtype
    np.testing.assert_allclose(transformed * fitted.std + fitted.mean, raw, atol=1e-3)
    for column in np.flatnonzero(std > 1e-3):
        expected = (raw[:, column] - mean[column]) / std[column]
        np.testing.assert_allclose(transformed[:, column], expected, rtol=1e-4, atol=1e-4)
    plain = fit_dataset_targets(data, {"kind": "regression", "scale_targets": False}, train=3)
    assert (plain.mean, plain.std) == ((), ())
    assert np.array_equal(plain.transform(data.train.targets, dtype=dtype), raw.astype(np.float32).astype(dtype))


def test_regression_shapes_and_invalid_targets() -> None:
    fitted = fit_dataset_targets(make_dataset(np.array([3, 4, 5])), "regression")
    assert fitted.transform(np.array([3, 4])).shape == (2, 1)
    with pytest.raises(DataError, match="2 numbers per row, but the model was trained on 1"):
        fitted.transform(np.zeros((2, 2)))
    assert "blue, green, red" in expect_data_error(make_dataset([0, 1], names=CLASS_NAMES), "regression").what


@pytest.mark.parametrize("scale", [True, False])
def test_constant_target_is_rejected(scale: bool) -> None:
    task = {"kind": "regression", "scale_targets": scale}
    error = expect_data_error(make_dataset(np.array([0.1, 0.1, 3.0], np.float32)), task, train=2)
    assert error.what == "the target is 0.1 in all 2 training rows: there is nothing to learn"
    both = expect_data_error(make_dataset(np.array([[1.0, 5.0], [2.0, 5.0]])), task)
    assert "the target column 1 (from 0) is 5 in all 2 training rows" in both.what


@given(train=st.lists(st.integers(0, 2), min_size=2, max_size=9), others=st.data())
@settings(deadline=None)
def test_targets_are_fitted_on_training_rows_only(train: list[int], others: st.DataObject) -> None:
    if len(set(train)) == 1:
        return
    stored = []
    for _ in range(2):
        rest = others.draw(st.lists(st.sampled_from(sorted(set(train))), max_size=5))
        data = make_dataset(np.array([*train, *rest]), names=CLASS_NAMES)
        fitted = fit_dataset_targets(data, "multiclass", train=len(train))
        scaled = fit_dataset_targets(
            make_dataset(np.array([*train, *rest], np.float32)), "regression", train=len(train)
        )
        stored.append(json.dumps([fitted.to_json(), scaled.to_json()]))
        assert TargetTransform.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
        assert TargetTransform.from_json(json.loads(json.dumps(scaled.to_json()))) == scaled
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    "damage",
    [{"version": 1}, {"kind": "x"}, {"classes": None}, {"positive": [0.5]}, {"mean": 1}, {"values": [1, 1]}],
)
def test_damaged_targets_are_rejected(damage: dict[str, Any]) -> None:
    stored = fit_dataset_targets(make_dataset([0, 1, 2]), {"kind": "binary", "positive": [2]}).to_json()
    assert TargetTransform.from_json(stored).positive == (2,)
    with pytest.raises(DataError, match=r"preprocess\.json"):
        TargetTransform.from_json({**stored, **damage})


def test_label_index_accepts_names_and_labels() -> None:
    named = fit_dataset_targets(make_dataset([2, 0, 1], names=CLASS_NAMES), "multiclass")
    assert named.label_index("green") == 1
    numbers = fit_dataset_targets(make_dataset([1, 0, 1], names=("5", "0")), "multiclass")
    assert [numbers.label_index(label) for label in ("5", 5, 0)] == [0, 0, 1]
    years = fit_dataset_targets(make_dataset([2020, 2019]), "multiclass")
    assert [years.label_index(label) for label in (2020, "2019")] == [1, 0]
    declared = fit_dataset_targets(make_dataset([0, 1], classes=("no", "yes")), {"kind": "binary", "positive": [0]})
    assert [declared.label_index(label) for label in ("no", 0, 1)] == [1, 1, 0], "by the label, not by position"
    merged = fit_dataset_targets(make_dataset([0, 1, 2]), {"kind": "binary", "positive": [1, 2]})
    assert merged.label_index("positive") == 1
    with pytest.raises(JobError) as error:
        named.label_index("gren")
    assert error.value.where == "task.class_weights.gren"
    assert "green" in error.value.fix
    for fitted, label in ((named, 2), (years, 1), (merged, 1)):
        with pytest.raises(JobError, match=f"{label} is not one of the {len(fitted.classes)} classes"):
            fitted.label_index(label)


def test_count_classes() -> None:
    assert count_classes(np.array([0, 2, 2]), 4) == [1, 0, 2, 0]
    assert count_classes(np.array([0.0, 1.0, 1.0], np.float32), 2) == [1, 2]


def test_stratified_split_of_text_labels() -> None:
    data = make_dataset([0] * 40 + [1] * 20 + [2] * 40, names=CLASS_NAMES)
    for task, sizes in (("multiclass", [8, 4, 8]), ({"kind": "binary", "positive": ["green"]}, None)):
        job = build_job(
            {"name": "t", "task": task, "data": {"splits": {"by": "random", "val": 0.2, "stratify": True}}}, "test"
        )
        counts = np.bincount(data.train.targets[make_splits(job, data)["val"].indices])
        assert counts[1] == 4
        assert sizes is None or counts.tolist() == sizes
