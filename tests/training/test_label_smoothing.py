"""`task.label_smoothing`: compared with torch, in training only, on every gradient backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import compute_identity
from pipeline.context import SingleProcessContext
from pipeline.errors import JobError
from pipeline.training.gradient_fns import select_gradient_backend
from pipeline.training.metric_accumulator import MetricAccumulator
from pipeline.training.task import build_task
from tests.training.factories import CPU, NUM_CLASSES, make_batch, make_engine, make_job, make_model, mean_gradient


def reference_losses(kind: str, outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the losses (B,) by torch; a logit z of binary is the two logits 0 and z."""
    if kind == "multiclass":
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing, reduction="none")
    logits = torch.cat([torch.zeros_like(outputs), outputs], 1)
    probabilities = torch.stack([1 - targets, targets], 1).to(outputs.dtype)
    return F.cross_entropy(logits, probabilities, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
@pytest.mark.parametrize("gradient_backend", ["written", "eager"])
@given(smoothing=st.floats(0, 0.99), size=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_gradient_and_loss_match_torch(kind: str, gradient_backend: str, smoothing: float, size: int) -> None:
    job = make_job(task={"kind": kind, "label_smoothing": smoothing}, train={"precision": "fp64"})
    assert select_gradient_backend(job, CPU) == "written"
    inputs, targets = make_batch(job, size)
    model = make_model(job).double()
    loss = reference_losses(kind, model(inputs.double()), targets, smoothing).mean()
    loss.backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    engine = make_engine(job, gradient_backend=gradient_backend)
    torch.testing.assert_close(mean_gradient(engine, inputs, targets), expected, rtol=1e-11, atol=1e-13)
    assert float(engine.flat.loss_sum / engine.flat.weight_sum) == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_mixed_labels_are_smoothed(kind: str) -> None:
    job = make_job(task={"kind": kind, "label_smoothing": 0.2})
    outputs = torch.randn(6, NUM_CLASSES if kind == "multiclass" else 1, dtype=torch.float64)
    shares = torch.rand(6, 1, dtype=torch.float64)
    if kind == "multiclass":
        one_hot = torch.eye(NUM_CLASSES, dtype=torch.float64)
        mixed = shares * one_hot[torch.arange(6) % 4] + (1 - shares) * one_hot[torch.arange(1, 7) % 4]
    else:
        mixed = shares[:, 0]
    sums = build_task(job, NUM_CLASSES, 1).compute_loss_sums(outputs, mixed)
    torch.testing.assert_close(sums.loss_sum, reference_losses(kind, outputs, mixed, 0.2).sum())


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
@pytest.mark.parametrize("class_weights", [None, {0: 1, 1: 5}])
def test_evaluations_are_without_it(kind: str, class_weights: Any) -> None:
    jobs = [
        make_job(task={"kind": kind, "label_smoothing": smoothing, "class_weights": class_weights})
        for smoothing in (0.0, 0.3)
    ]
    inputs, targets = make_batch(jobs[0], 20)
    plain, smoothed = (make_engine(job) for job in jobs)
    measured = []
    for engine in (plain, smoothed):
        accumulator = MetricAccumulator(engine.task, CPU)
        accumulator.update(engine.predict_logits(inputs), targets)
        measured.append(accumulator.compute(SingleProcessContext()))
    assert measured[0] == measured[1]
    losses = []
    for engine in (plain, smoothed):
        engine.forward_backward(1, inputs, targets)
        losses.append(float(engine.flat.loss_sum / engine.flat.weight_sum))
    assert losses[0] != losses[1]


def test_class_weights_weight_the_smoothed_loss_of_a_row() -> None:
    job = make_job(task={"kind": "multiclass", "label_smoothing": 0.1, "class_weights": {0: 1, 1: 5}})
    task = build_task(job, NUM_CLASSES, 1).to(CPU, torch.float64)
    outputs, targets = torch.randn(7, NUM_CLASSES, dtype=torch.float64), torch.arange(7) % 4
    weights = torch.tensor([1.0, 5, 1, 1], dtype=torch.float64)[targets]
    expected = (reference_losses("multiclass", outputs, targets, 0.1) * weights).sum()
    torch.testing.assert_close(task.compute_loss_sums(outputs, targets).loss_sum, expected)


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "regression", "label_smoothing": 0.1},
        {"kind": "binary", "label_smoothing": 0.1, "loss": "m:f"},
        {"kind": "multiclass", "label_smoothing": 1.0},
        {"kind": "multiclass", "label_smoothing": -0.1},
    ],
)
def test_it_is_refused_elsewhere(task: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="label_smoothing"):
        make_job(task=task)


def test_without_it_a_run_keeps_its_identity() -> None:
    identities = [compute_identity(make_job(task=task), fingerprint="f") for task in ({}, {"label_smoothing": 0.1})]
    assert "label_smoothing" not in identities[0]["task"]
    assert identities[1]["task"]["label_smoothing"] == 0.1
