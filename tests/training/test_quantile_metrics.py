"""Quantile regression: its loss and metrics against scikit-learn, and the columns of its metrics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.config.quantiles import quantile_name
from pipeline.context import SingleProcessContext
from pipeline.errors import JobError
from pipeline.training.metric_accumulator import MetricAccumulator
from pipeline.training.task import TargetScale, Task, build_task
from tests.training.distributed_helpers import eval_batches, on_ranks

CPU = torch.device("cpu")


def make_job(quantiles: list[float], **task: Any) -> JobConfig:
    return build_job({"name": "t", "task": {"kind": "regression", "quantiles": quantiles, **task}}, "here")


def measure(task: Task, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    accumulator = MetricAccumulator(task, CPU)
    for first in range(0, len(targets), 7):
        rows = slice(first, first + 7)
        accumulator.update(torch.from_numpy(outputs[rows]), torch.from_numpy(targets[rows]))
    return accumulator.compute(SingleProcessContext())


@given(
    quantiles=st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True).map(
        lambda percents: [percent / 100 for percent in sorted(percents)]
    ),
    rows=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    unit=st.sampled_from([(0.0, 1.0), (-3.0, 250.0)]),
    has_ties=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_metrics_match_scikit_learn(
    quantiles: list[float], rows: int, seed: int, unit: tuple[float, float], has_ties: bool
) -> None:
    (mean, std), generator = unit, np.random.default_rng(seed)
    outputs, targets = generator.normal(size=(rows, len(quantiles))), generator.normal(size=(rows, 1))
    if has_ties:
        outputs, targets = np.round(outputs), np.round(targets)
    job = make_job(quantiles)
    task = build_task(job, 0, 1, target_mean=[0.1], target_std=[1.0], target_scale=TargetScale((mean,), (std,)))
    assert task.num_outputs == len(quantiles)
    metrics = measure(task, outputs, targets)
    assert list(metrics) == [*job.metric_columns(1), "samples"]
    assert metrics["samples"] == rows
    raw_losses = [
        sk.mean_pinball_loss(targets[:, 0], outputs[:, k], alpha=quantile) for k, quantile in enumerate(quantiles)
    ]
    assert metrics["loss"] == pytest.approx(np.mean(raw_losses))
    predictions, truth = np.sort(outputs, 1) * std + mean, targets[:, 0] * std + mean
    losses = [sk.mean_pinball_loss(truth, predictions[:, k], alpha=quantile) for k, quantile in enumerate(quantiles)]
    assert metrics["pinball"] == pytest.approx(np.mean(losses))
    assert metrics["pinball"] <= metrics["loss"] * std + 1e-9, "sorted outputs are never worse"
    for k, quantile in enumerate(quantiles):
        assert metrics[f"coverage_{quantile_name(quantile)}"] == (targets[:, 0] <= np.sort(outputs, 1)[:, k]).mean()
    if len(quantiles) > 1:
        lowest, highest = outputs.min(1), outputs.max(1)
        assert metrics["coverage"] == ((targets[:, 0] >= lowest) & (targets[:, 0] <= highest)).mean()
        assert metrics["interval_width"] == pytest.approx((predictions[:, -1] - predictions[:, 0]).mean())
    if 0.5 in quantiles:
        median = predictions[:, quantiles.index(0.5)]
        assert metrics["mae"] == pytest.approx(sk.mean_absolute_error(truth, median))
        assert metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, median))


def test_metrics_are_independent_of_the_number_of_ranks() -> None:
    job = make_job([0.1, 0.5, 0.9])
    job = job.model_copy(update={"metrics": ["tests.training.custom_metrics:order"]})
    task = build_task(job, 0, 1, target_mean=[0.0])
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(23, 3, generator=generator).double(), torch.randn(23, 1, generator=generator).double()

    def measure_rank(context: Any) -> dict[str, float]:
        accumulator = MetricAccumulator(task, CPU)
        for outputs, targets in eval_batches(data, context.rank, context.world_size):
            accumulator.update(outputs, targets)
        return accumulator.compute(context)

    single = measure_rank(SingleProcessContext())
    for rank in on_ranks(3, measure_rank):
        assert rank == pytest.approx(single, rel=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_gradient_of_the_loss_is_the_share_on_each_side(seed: int) -> None:
    """At the empirical quantile, the loss is at its minimum."""
    generator = torch.Generator().manual_seed(seed)
    targets, quantiles = torch.randn(101, 1, generator=generator, dtype=torch.float64), [0.1, 0.5, 0.9]
    task = build_task(make_job(quantiles), 0, 1)
    levels = torch.quantile(targets[:, 0], torch.tensor(quantiles, dtype=torch.float64))
    at_quantiles = task.loss_fn(levels.expand(101, 3), targets, "sum")
    for shift in (-0.05, 0.05):
        assert task.loss_fn((levels + shift).expand(101, 3), targets, "sum") >= at_quantiles
    outputs = (levels + 1e-3).expand(101, 3).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.loss_fn(outputs, targets, "sum"), outputs)
    below = (targets < outputs).double().mean(0)
    assert torch.allclose(gradient.mean(0) * 3, below - torch.tensor(quantiles, dtype=torch.float64))


def test_no_samples_have_no_metrics() -> None:
    metrics = MetricAccumulator(build_task(make_job([0.5, 0.9]), 0, 1), CPU).compute(SingleProcessContext())
    assert metrics.pop("samples") == 0
    assert all(map(math.isnan, metrics.values()))


def test_names_of_quantiles() -> None:
    names = [quantile_name(quantile) for quantile in (0.1, 0.07, 0.29, 0.025, 0.999, 1e-7)]
    assert names == ["q10", "q7", "q29", "q2_5", "q99_9", "q0_00001"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"kind": "binary"}, "quantiles goes with kind: regression"),
        ({"loss": "mae"}, "leave loss out"),
        ({"quantiles": [0.9, 0.1]}, "must ascend"),
        ({"quantiles": [0.1, 0.1]}, "must ascend"),
        ({"quantiles": [0.0]}, "task.quantiles.0: must be greater than 0"),
        ({"quantiles": []}, "task.quantiles"),
    ],
)
def test_quantiles_that_cannot_be_used_are_refused(task: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as refused:
        build_job({"name": "t", "task": {"kind": "regression", "quantiles": [0.5], **task}}, "here")
    assert words in str(refused.value)


def test_several_labels_are_refused() -> None:
    data = {"source": "parquet", "url": "x", "label": ["a", "b"]}
    with pytest.raises(JobError, match=r"task.quantiles: takes one label, not 2"):
        build_job({"name": "t", "data": data, "task": {"kind": "regression", "quantiles": [0.5]}}, "here")
