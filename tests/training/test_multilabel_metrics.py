"""The loss and the metrics of multilabel tasks, against torch and scikit-learn."""

from __future__ import annotations

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
from pipeline.context import SingleProcessContext
from pipeline.errors import JobError
from pipeline.training.metric_accumulator import MetricAccumulator
from pipeline.training.task import Task, build_task
from tests.training.distributed_helpers import eval_batches, on_ranks

CPU = torch.device("cpu")


def make_task(labels: int, **options: Any) -> Task:
    return build_task(build_job({"name": "t", "task": "multilabel"}, "here"), 0, labels, **options)


def measure(task: Task, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    accumulator = MetricAccumulator(task, CPU)
    for first in range(0, len(targets), 7):
        rows = slice(first, first + 7)
        accumulator.update(torch.from_numpy(outputs[rows]), torch.from_numpy(targets[rows]))
    return accumulator.compute(SingleProcessContext())


@given(
    rows=st.integers(1, 30),
    labels=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
    rate=st.sampled_from([0.05, 0.5, 0.95]),
    has_ties=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_metrics_match_scikit_learn(rows: int, labels: int, seed: int, rate: float, has_ties: bool) -> None:
    generator = np.random.default_rng(seed)
    outputs = generator.normal(size=(rows, labels))
    outputs = np.round(outputs) if has_ties else outputs
    targets = (generator.random((rows, labels)) < rate).astype(np.float64)
    means = generator.random(labels)
    metrics = measure(make_task(labels, target_mean=means.tolist()), outputs, targets)
    parts = [f"{metric}_{label}" for metric in ("recall", "precision", "auc") for label in range(labels)]
    assert list(metrics) == [*METRICS["multilabel"], *parts, "samples"]
    truth, predicted = targets.astype(int), (outputs > 0).astype(int)
    expected_loss = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(outputs), torch.from_numpy(targets)
    )
    assert metrics["loss"] == pytest.approx(float(expected_loss))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert metrics["accuracy"] == pytest.approx(1 - sk.hamming_loss(truth, predicted))
        assert metrics["exact_match"] == pytest.approx(sk.accuracy_score(truth, predicted))
        assert metrics["f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
        assert metrics["f1_micro"] == pytest.approx(sk.f1_score(truth, predicted, average="micro"))
        recall = sk.recall_score(truth, predicted, average=None, zero_division=np.nan)
        precision = sk.precision_score(truth, predicted, average=None)
    aucs, average_precisions = [math.nan] * labels, [math.nan] * labels
    for label in range(labels):
        if 0 < truth[:, label].sum() < rows:
            aucs[label] = sk.roc_auc_score(truth[:, label], outputs[:, label])
        if truth[:, label].any():
            average_precisions[label] = sk.average_precision_score(truth[:, label], outputs[:, label])
        assert metrics[f"recall_{label}"] == pytest.approx(recall[label], nan_ok=True)
        assert metrics[f"precision_{label}"] == pytest.approx(precision[label])
        assert metrics[f"auc_{label}"] == pytest.approx(aucs[label], nan_ok=True)
    for name, values in (("auc", aucs), ("average_precision", average_precisions)):
        defined = [value for value in values if not math.isnan(value)]
        assert metrics[name] == pytest.approx(np.mean(defined) if defined else math.nan, nan_ok=True)
    majority = np.broadcast_to(means > 0.5, truth.shape)
    assert metrics["baseline_accuracy"] == pytest.approx((majority == truth).mean())


def test_metrics_are_independent_of_the_number_of_ranks() -> None:
    job = build_job({"name": "t", "task": "multilabel", "metrics": ["tests.training.custom_metrics:order"]}, "here")
    task, generator = build_task(job, 0, 3, target_mean=[0.1, 0.2, 0.9]), torch.Generator().manual_seed(1)
    targets = (torch.rand(23, 3, generator=generator) < 0.5).double()
    data = torch.randn(23, 3, generator=generator).double(), targets

    def measure_rank(context: Any) -> dict[str, float]:
        accumulator = MetricAccumulator(task, CPU)
        for outputs, rows in eval_batches(data, context.rank, context.world_size):
            accumulator.update(outputs, rows)
        return accumulator.compute(context)

    single = measure_rank(SingleProcessContext())
    assert not any(map(math.isnan, single.values()))
    for rank in on_ranks(3, measure_rank):
        assert rank == pytest.approx(single, rel=1e-12)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"task": {"kind": "multilabel", "class_weights": "balanced"}}, "class_weights goes with"),
        ({"task": {"kind": "multilabel", "positive": [1]}}, "positive goes with kind: binary"),
        ({"task": {"kind": "multilabel", "threshold": "f1"}}, "threshold goes with kind: binary"),
        ({"task": {"kind": "multilabel", "label_smoothing": 0.1}}, "label_smoothing goes with"),
        ({"task": {"kind": "multilabel", "loss": "mse"}}, "loss: mse goes with kind: regression"),
        (
            {"task": "multilabel", "data": {"source": "parquet", "url": "x", "label": "a"}},
            "multilabel needs several columns in data.label",
        ),
        (
            {"task": "multilabel", "data": {"source": "image_folder", "url": "x"}},
            "multilabel needs several columns in data.label",
        ),
    ],
)
def test_settings_that_do_not_go_with_multilabel_are_refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as refused:
        build_job({"name": "t", **tree}, "here")
    assert words in str(refused.value)
