"""Metrics against scikit-learn, on random outputs with ties, missing classes and columns far from zero."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pipeline.config import METRICS
from pipeline.config.files import build_job
from pipeline.config.metrics import make_part_columns, make_part_names
from pipeline.context import SingleProcessContext
from pipeline.errors import JobError, WorkError
from pipeline.training import metric_accumulator
from pipeline.training.metric_accumulator import (
    MAX_GATHERED_VALUES,
    MetricAccumulator,
    check_best_metric_gathered,
    describe_oversized_splits,
)
from pipeline.training.task import TargetScale, Task, build_task
from pipeline.user_code import import_user_function
from tests.training.factories import make_job

CPU = torch.device("cpu")
CUSTOM_METRICS = "tests.training.custom_metrics"
FLOAT32_TOLERANCE = 1e-6
"""Per-sample losses are computed in the dtype of training, here float32."""


class FakeContext(SingleProcessContext):
    def all_reduce(self, vector: torch.Tensor) -> None:
        raise AssertionError("a single rank does not all-reduce")


def make_task(kind: str, classes: int = 3, *, metrics: tuple[str, ...] = (), task: Any = None, **options: Any) -> Task:
    job = build_job({"name": "metrics", "task": {"kind": kind, **(task or {})}, "metrics": list(metrics)}, "here")
    return build_task(job, classes, classes, **options)


def evaluate_outputs(task: Task, outputs: np.ndarray, targets: np.ndarray, size: int = 7) -> dict[str, float]:
    accumulator = MetricAccumulator(task, CPU)
    for first in range(0, len(targets), size):
        batch = slice(first, first + size)
        accumulator.update(torch.from_numpy(outputs[batch]), torch.from_numpy(targets[batch]))
    return accumulator.compute(FakeContext())


def approximately(value: float, at_least: float = 1e-9) -> Any:
    return pytest.approx(value, rel=1e-6, abs=at_least, nan_ok=True)


@st.composite
def outputs_and_labels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Draw outputs (N, C) float32, often with ties, labels (N,), in which some classes may not occur, and C."""
    rows, classes, seed = draw(st.integers(1, 40)), draw(st.integers(2, 5)), draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    outputs = generator.normal(0, 2, (rows, classes))
    if draw(st.booleans()):
        outputs = np.round(outputs)
    labels = generator.integers(0, draw(st.integers(1, classes)), rows)
    return outputs.astype(np.float32), labels, classes


@given(outputs_and_labels())
@settings(deadline=None, max_examples=80)
def test_multiclass_metrics_match_scikit_learn(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    outputs, labels, classes = case
    counts = list(range(classes))
    names = [f"class {label}" for label in range(classes)]
    task = make_task("multiclass", classes, class_counts=counts, class_names=names)
    metrics = evaluate_outputs(task, outputs, labels)
    parts = [f"{metric}_class_{label}" for metric in ("recall", "precision") for label in range(classes)]
    assert list(metrics) == [*METRICS["multiclass"], *parts, "samples"]
    exponentials = np.exp(outputs.astype(np.float64) - outputs.max(1, keepdims=True))
    probabilities, predictions = exponentials / exponentials.sum(1, keepdims=True), outputs.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert metrics["accuracy"] == approximately(sk.accuracy_score(labels, predictions))
        assert metrics["correct"] == (labels == predictions).sum()
        assert metrics["balanced_accuracy"] == approximately(sk.balanced_accuracy_score(labels, predictions))
        assert metrics["f1"] == approximately(sk.f1_score(labels, predictions, average="macro"))
        assert metrics["log_loss"] == approximately(
            sk.log_loss(labels, probabilities, labels=range(classes)), FLOAT32_TOLERANCE
        )
        occurring = np.unique(labels)
        aucs = [sk.roc_auc_score(labels == k, probabilities[:, k]) for k in occurring] if len(occurring) > 1 else []
        assert metrics["auc"] == approximately(float(np.mean(aucs)) if aucs else math.nan)
        average_precisions = [sk.average_precision_score(labels == k, probabilities[:, k]) for k in occurring]
        assert metrics["average_precision"] == approximately(float(np.mean(average_precisions)))
        options: Any = {"average": None, "labels": range(classes)}
        assert [metrics[f"recall_class_{k}"] for k in range(classes)] == approximately(
            sk.recall_score(labels, predictions, **options, zero_division=np.nan).tolist()
        )
        assert [metrics[f"precision_class_{k}"] for k in range(classes)] == approximately(
            sk.precision_score(labels, predictions, **options).tolist()
        )
        if len(occurring) == classes:
            one_hot = np.eye(classes)[labels]
            assert metrics["average_precision"] == approximately(sk.average_precision_score(one_hot, probabilities))
        if classes > 2 and len(occurring) == classes:
            assert metrics["auc"] == approximately(sk.roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert metrics["loss"] == metrics["log_loss"]
    assert metrics["baseline_accuracy"] == approximately(float((labels == classes - 1).mean()))
    assert metrics["samples"] == len(labels)


@given(outputs_and_labels())
@settings(deadline=None, max_examples=80)
def test_binary_metrics_match_scikit_learn(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    outputs, labels = case[0][:, :1], (case[1] > 0).astype(np.float32)
    metrics = evaluate_outputs(make_task("binary", class_counts=[7, 7]), outputs, labels)
    assert list(metrics) == [*METRICS["binary"], "samples"]
    probabilities, predictions = 1 / (1 + np.exp(-outputs[:, 0].astype(np.float64))), outputs[:, 0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert metrics["accuracy"] == approximately(sk.accuracy_score(labels, predictions))
        assert metrics["balanced_accuracy"] == approximately(sk.balanced_accuracy_score(labels, predictions))
        assert metrics["f1"] == approximately(sk.f1_score(labels, predictions))
        assert metrics["log_loss"] == approximately(
            sk.log_loss(labels, probabilities, labels=[0, 1]), FLOAT32_TOLERANCE
        )
        one_class = len(np.unique(labels)) == 1
        assert metrics["auc"] == approximately(math.nan if one_class else sk.roc_auc_score(labels, probabilities))
        average_precision = sk.average_precision_score(labels, outputs[:, 0]) if labels.any() else math.nan
        assert metrics["average_precision"] == approximately(average_precision)
        assert metrics["precision"] == approximately(sk.precision_score(labels, predictions))
        for name, label in (("recall", 1), ("specificity", 0)):
            expected = sk.recall_score(labels, predictions, pos_label=label, zero_division=np.nan)
            assert metrics[name] == approximately(expected)
    assert metrics["baseline_accuracy"] == approximately(float((labels == 0).mean())), (
        "the lower of equally frequent classes"
    )


@given(
    rows=st.integers(2, 40),
    columns=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    unit_of=st.sampled_from([(0.0, 1.0), (0.0, 1e-3), (-3.0, 250.0), (1e6, 250.0)]),
    scaled=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_regression_metrics_match_scikit_learn_in_user_units(
    rows: int, columns: int, seed: int, unit_of: tuple[float, float], scaled: bool
) -> None:
    """The differences of the targets have far more digits in float64 than are compared."""
    mean, std = unit_of
    generator = np.random.default_rng(seed)
    outputs, targets = generator.normal(0.2, 1, (rows, columns)), generator.normal(0.4, 1, (rows, columns))
    values, truth = mean + std * outputs, mean + std * targets
    target_scale = TargetScale((mean,) * columns, (std,) * columns)
    train_mean = (truth + std).mean(0)  # the training rows are different ones
    train_std = std * np.arange(1, columns + 1)
    if scaled:
        options = {"target_mean": ((train_mean - mean) / std).tolist(), "target_std": (train_std / std).tolist()}
        task = make_task("regression", columns, target_scale=target_scale, **options)
        metrics = evaluate_outputs(task, outputs, targets)
    else:
        task = make_task("regression", columns, target_mean=train_mean.tolist(), target_std=train_std.tolist())
        metrics = evaluate_outputs(task, values, truth)
    constant = np.broadcast_to(train_mean, truth.shape)
    measures: dict[str, Any] = {
        "rmse": (sk.root_mean_squared_error, values),
        "mae": (sk.mean_absolute_error, values),
        "r2": (sk.r2_score, values),
        "baseline_rmse": (sk.root_mean_squared_error, constant),
        "baseline_mae": (sk.mean_absolute_error, constant),
    }
    if columns == 1:
        assert list(metrics) == [*METRICS["regression"], "samples"]
        for name, (measure, predictions) in measures.items():
            assert metrics[name] == approximately(measure(truth, predictions))
    else:
        per_target = [f"{name}_{column}" for name in measures for column in range(columns)]
        assert list(metrics) == [*METRICS["regression"], *per_target, "samples"]
        for name, (measure, predictions) in measures.items():
            values_by_column = [measure(truth[:, column], predictions[:, column]) for column in range(columns)]
            assert all(
                metrics[f"{name}_{column}"] == approximately(values_by_column[column]) for column in range(columns)
            )
            unit_free = np.array(values_by_column) if name == "r2" else np.array(values_by_column) / train_std
            assert metrics[name] == approximately(float(unit_free.mean()))
    assert metrics["loss"] == approximately(float(((outputs - targets) ** 2).mean() * (1 if scaled else std**2)))


def test_targets_are_weighted_equally_whatever_their_units() -> None:
    """Degrees and hectopascals: per target in its unit; together in standard deviations of the training rows."""
    job = build_job(
        {
            "name": "t",
            "task": "regression",
            "data": {"source": "parquet", "url": "x", "label": ["temp (°C)", "air_hPa"]},
        },
        "here",
    )
    task = build_task(
        job, 0, 2, target_mean=[0.0, 0.0], target_std=[1.0, 1.0], target_scale=TargetScale((10.0, 1000.0), (8.0, 400.0))
    )
    metrics = evaluate_outputs(task, np.array([[0.5, 0.0], [0.5, 0.0]]), np.zeros((2, 2)))
    assert (metrics["rmse_temp_C"], metrics["rmse_air_hPa"]) == (4.0, 0.0)
    assert (metrics["rmse"], metrics["mae"]) == (0.25, 0.25)
    huge = dataclasses.replace(task, target_scale=TargetScale((10.0, 1000.0), (8.0, 4e9)))
    assert evaluate_outputs(huge, np.array([[0.5, 0.0]]), np.zeros((1, 2)))["rmse"] == 0.25


def test_names_of_targets_and_classes_are_metric_columns() -> None:
    assert make_part_names(["a b", "a-b", "°", "x"], 4) == ("a_b", "a_b_1", "2", "x")
    assert make_part_names([], 3) == ("0", "1", "2")
    assert make_part_names(["x"], 1) == make_part_names([], 65) == ()
    assert make_part_columns("multiclass", ("a", "b")) == ["recall_a", "recall_b", "precision_a", "precision_b"]
    assert make_part_columns("binary", ("a", "b")) == []


def test_undefined_metrics_are_nan() -> None:
    regression = make_task("regression", 1, target_mean=[0.0])
    constant = evaluate_outputs(regression, np.arange(3.0)[:, None], np.full((3, 1), 0.1))
    single = evaluate_outputs(regression, np.zeros((1, 1)), np.ones((1, 1)))
    assert math.isnan(constant["r2"])
    assert math.isnan(single["r2"])
    assert constant["baseline_mae"] == pytest.approx(0.1)
    unknown = evaluate_outputs(make_task("regression", 1), np.zeros((2, 1)), np.array([[1.0], [2.0]]))
    assert math.isnan(unknown["baseline_rmse"])
    assert unknown["rmse"] == pytest.approx(math.sqrt(2.5))
    assert math.isnan(evaluate_outputs(make_task("binary"), np.zeros((2, 1)), np.zeros(2))["baseline_accuracy"])


@pytest.mark.parametrize("kind", METRICS)
def test_empty_data_has_no_metrics(kind: str) -> None:
    task = make_task(kind, 3 if kind == "multiclass" else 1, class_counts=[1, 1, 1], target_mean=[0.0])
    metrics = MetricAccumulator(task, CPU).compute(FakeContext())
    assert list(metrics) == [*METRICS[kind], "samples"]
    counted = {"samples": 0, "correct": 0}
    assert all(value == counted[name] if name in counted else math.isnan(value) for name, value in metrics.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_nonfinite_outputs_have_no_auc(kind: str, bad: float) -> None:
    outputs = np.zeros((4, 3 if kind == "multiclass" else 1))
    outputs[1, 0] = bad
    targets = np.array([0, 1, 0, 1]) if kind == "multiclass" else np.array([0.0, 1.0, 0.0, 1.0])
    metrics = evaluate_outputs(make_task(kind), outputs, targets)
    assert math.isnan(metrics["auc"])
    assert math.isnan(metrics["average_precision"])


def test_collapsed_model_is_visible_next_to_its_baseline() -> None:
    labels = np.array([0.0] * 88 + [1.0] * 12)
    metrics = evaluate_outputs(make_task("binary", class_counts=[880, 120]), np.full((100, 1), -5.0), labels)
    assert (metrics["accuracy"], metrics["baseline_accuracy"]) == (0.88, 0.88)
    assert (metrics["balanced_accuracy"], metrics["f1"], metrics["auc"]) == (0.5, 0.0, 0.5)


def test_log_loss_ignores_class_weights_and_custom_loss() -> None:
    outputs, labels = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([1, 0])
    expected = (math.log(1 + math.exp(2)) + math.log(2)) / 2
    weighted = make_task("multiclass", 2, task={"class_weights": {0: 9.0}})
    with_custom_loss = make_task("multiclass", 2, task={"loss": f"{CUSTOM_METRICS}:sum_of_outputs"})
    for task in (weighted, with_custom_loss):
        assert evaluate_outputs(task, outputs, labels)["log_loss"] == pytest.approx(expected)
    assert evaluate_outputs(weighted, outputs, labels)["loss"] == pytest.approx(
        (math.log(1 + math.exp(2)) + 9 * math.log(2)) / 10
    )
    assert evaluate_outputs(with_custom_loss, outputs, labels)["loss"] == 2.0


# -------------------------------------------------------------------------------------------- custom metrics


@pytest.mark.parametrize("size", [2, 5])
def test_custom_metric_receives_the_whole_split_in_order_and_user_units(size: int) -> None:
    name = f"{CUSTOM_METRICS}:remembers"
    calls = import_user_function(name, where="here", error=JobError).__globals__["CALLS"]
    calls.clear()
    logits = np.array([[0.0, 1.0, -1.0]] * 3 + [[800.0, 0.0, -800.0]] * 2, dtype=np.float32)
    metrics = evaluate_outputs(make_task("multiclass", metrics=(name,)), logits, np.array([2, 1, 0, 2, 1]), size)
    assert list(metrics)[-2:] == ["remembers", "samples"]
    assert metrics["remembers"] == 5.0
    evaluate_outputs(make_task("binary", metrics=(name,)), logits[:, :1], np.array([1.0, 0.0, 1.0, 0.0, 1.0]), size)
    single = make_task("regression", 1, metrics=(name,), target_scale=TargetScale((10.0,), (2.0,)))
    evaluate_outputs(single, logits[:, 1:2], logits[:, :1], size)
    double = make_task("regression", 2, metrics=(name,), target_scale=TargetScale((10.0, 0.0), (2.0, 1.0)))
    evaluate_outputs(double, logits[:, 1:], logits[:, :2], size)
    (probabilities, labels), (positive, ones), (values, truth), (pairs, _) = calls
    assert probabilities.dtype == positive.dtype == values.dtype == np.float64
    assert labels.tolist() == [2, 1, 0, 2, 1]
    np.testing.assert_allclose(probabilities[0], torch.tensor([0.0, 1.0, -1.0]).softmax(0), rtol=1e-6)
    assert probabilities[4].tolist() == [1.0, 0.0, 0.0]
    assert positive.tolist() == [0.5] * 3 + [1.0] * 2
    assert ones.tolist() == [1, 0, 1, 0, 1]
    assert values.tolist() == [12.0] * 3 + [10.0] * 2
    assert truth.tolist() == [10.0] * 3 + [1610.0] * 2
    assert pairs.tolist() == [[12.0, -1.0]] * 3 + [[10.0, -800.0]] * 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", r"no cost of 2 rows, at .*custom_metrics\.py"),
        ("changes", "read-only"),
        ("gives_many", "TypeError"),
    ],
)
def test_failing_custom_metric_is_named(name: str, words: str) -> None:
    with pytest.raises(WorkError, match=words) as caught:
        evaluate_outputs(make_task("binary", metrics=(f"{CUSTOM_METRICS}:{name}",)), np.zeros((2, 1)), np.zeros(2))
    assert caught.value.where == f"metrics: {CUSTOM_METRICS}:{name}"


def test_missing_custom_metric() -> None:
    with pytest.raises(JobError, match="no function") as caught:
        make_task("binary", metrics=(f"{CUSTOM_METRICS}:nothing",))
    assert caught.value.where == f"metrics: {CUSTOM_METRICS}:nothing"


# -------------------------------------------------------------------------------------- too large to gather


@pytest.mark.parametrize("limit", [12, 13])
@pytest.mark.parametrize("flush_outputs", [1, 4, 100])
def test_split_too_large_to_gather_omits_metrics_that_need_all_samples(
    monkeypatch: pytest.MonkeyPatch, limit: int, flush_outputs: int
) -> None:
    monkeypatch.setattr(metric_accumulator, "MAX_GATHERED_VALUES", limit)
    monkeypatch.setattr(metric_accumulator, "FLUSH_OUTPUTS", flush_outputs)
    task = make_task("binary", class_counts=[1, 1], metrics=(f"{CUSTOM_METRICS}:remembers",))
    for rows in (6, 7):
        outputs, targets = np.linspace(-1, 1, rows)[:, None], np.arange(rows) % 2.0
        metrics = evaluate_outputs(task, outputs, targets, 2)
        assert math.isnan(metrics["auc"]) == math.isnan(metrics["remembers"]) == (2 * rows > limit)
        assert metrics["accuracy"] == approximately(sk.accuracy_score(targets, outputs[:, 0] > 0))
        assert metrics["log_loss"] == approximately(sk.log_loss(targets, 1 / (1 + np.exp(-outputs[:, 0]))))


def test_too_large_split_is_reported_before_training() -> None:
    job = make_job(metrics=[f"{CUSTOM_METRICS}:remembers"], best={"metric": "val/auc"})
    limit = MAX_GATHERED_VALUES // 11
    assert describe_oversized_splits(job, 10, {"val": limit}) == {}
    check_best_metric_gathered(job, 10, {"val": limit, "train": limit + 1})
    ((split, text),) = describe_oversized_splits(job, 10, {"val": 9, "train": limit + 1}).items()
    assert split == "train"
    assert f"train has {limit + 1:,} samples, too many for auc, average_precision and remembers" in text
    with pytest.raises(JobError, match="auc needs all samples at once") as caught:
        check_best_metric_gathered(job, 10, {"val": limit + 1})
    assert caught.value.where == "best.metric: val/auc"
    check_best_metric_gathered(make_job(best={"metric": "val/f1"}), 10, {"val": limit + 1})
    assert describe_oversized_splits(make_job(task="regression"), 10, {"val": 10**9}) == {}
    assert describe_oversized_splits(
        make_job(task="regression", metrics=[f"{CUSTOM_METRICS}:remembers"]), 10, {"val": 10**9}
    )
