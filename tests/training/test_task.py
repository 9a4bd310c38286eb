"""Tasks: sums against plain torch, and balanced weights against scikit-learn's definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config.files import build_job
from pipeline.context import SingleProcessContext
from pipeline.errors import JobError
from pipeline.training.metric_accumulator import MetricAccumulator
from pipeline.training.task import Task, build_task

NUM_CLASSES = 4


def make_batch(kind: str, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "multiclass":
        return torch.randn(size, NUM_CLASSES, generator=generator, dtype=torch.float64), torch.randint(
            NUM_CLASSES, (size,), generator=generator
        )
    if kind == "binary":
        targets = torch.randint(2, (size,), generator=generator).float()
        return torch.randn(size, 1, generator=generator, dtype=torch.float64), targets
    return torch.randn(size, 3, generator=generator, dtype=torch.float64), torch.randn(size, 3, generator=generator)


def make_task(kind: str, *, label_index: Callable[[int | str], int] | None = None, **options: Any) -> Task:
    counts = options.pop("counts", ())
    job = build_job({"name": "task", "task": {"kind": kind, **options}}, "here")
    task = build_task(job, NUM_CLASSES, 3, class_counts=counts, label_index=label_index)
    return task.to(torch.device("cpu"), torch.float64)


class FakeContext(SingleProcessContext):
    def all_reduce(self, vector: Tensor) -> None:
        raise AssertionError("a single rank does not all-reduce")


def evaluate_outputs(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    accumulator = MetricAccumulator(task, torch.device("cpu"))
    accumulator.update(outputs, targets)
    return accumulator.compute(FakeContext())


def torch_mean_loss(kind: str, outputs: Tensor, targets: Tensor, weights: list[float] | None) -> Tensor:
    if kind == "multiclass":
        return F.cross_entropy(outputs, targets, torch.tensor(weights, dtype=torch.float64) if weights else None)
    if kind == "binary":
        each = None if weights is None else torch.tensor(weights, dtype=torch.float64)[targets.long()]
        losses = F.binary_cross_entropy_with_logits(outputs[:, 0], targets.double(), each, reduction="sum")
        return losses / (len(targets) if each is None else each.sum())
    return F.mse_loss(outputs, targets.double())


CASES: list[tuple[str, list[float] | None]] = [
    ("multiclass", None),
    ("multiclass", [0.5, 2.0, 1.0, 3.0]),
    ("binary", None),
    ("binary", [0.25, 4.0]),
    ("regression", None),
]


@pytest.mark.parametrize(("kind", "weights"), CASES)
@given(cuts=st.lists(st.integers(0, 29), max_size=4))
@settings(deadline=None, max_examples=40)
def test_uneven_micro_batches_match_torchs_mean(kind: str, weights: list[float] | None, cuts: list[int]) -> None:
    task = make_task(kind, class_weights=dict(enumerate(weights)) if weights else None)
    outputs, targets = make_batch(kind, 29)
    accumulator, loss, weight = MetricAccumulator(task, torch.device("cpu")), 0.0, 0.0
    for first, end in itertools.pairwise([0, *sorted(cuts), 29]):
        accumulator.update(outputs[first:end], targets[first:end])
        sums = task.compute_loss_sums(outputs[first:end], targets[first:end])
        loss, weight = loss + float(sums.loss_sum), weight + float(sums.weight_sum)
    expected = float(torch_mean_loss(kind, outputs, targets, weights))
    exact = accumulator.compute(FakeContext())
    assert exact["loss"] == pytest.approx(expected, rel=1e-13)
    assert loss / weight == pytest.approx(expected, rel=1e-13)
    if kind != "regression":
        predictions = outputs.argmax(1) if kind == "multiclass" else (outputs[:, 0] > 0).long()
        assert exact["correct"] == int((predictions == targets.long()).sum())


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_gradient_of_the_sum_matches_torch(kind: str, weights: list[float] | None) -> None:
    task = make_task(kind, class_weights=dict(enumerate(weights)) if weights else None)
    outputs, targets = make_batch(kind, 17)
    outputs.requires_grad_()
    sums = task.compute_loss_sums(outputs, targets)
    (gradient,) = torch.autograd.grad(sums.loss_sum, outputs)
    (reference,) = torch.autograd.grad(torch_mean_loss(kind, outputs, targets, weights), outputs)
    torch.testing.assert_close(gradient / sums.weight_sum, reference, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_balanced_class_weights_match_scikit_learn(kind: str) -> None:
    counts = [1, 5, 2, 12] if kind == "multiclass" else [3, 17]
    built = make_task(kind, class_weights="balanced", counts=counts).class_weights
    assert built is not None
    assert built.tolist() == [sum(counts) / (len(counts) * count) for count in counts]


def test_class_without_samples_and_class_without_weight() -> None:
    absent = make_task("multiclass", class_weights="balanced", counts=[2, 0, 1, 1]).class_weights
    assert absent is not None
    assert absent.tolist() == [0.5, 0.0, 1.0, 1.0]
    unnamed = make_task("multiclass", class_weights={1: 5.0}).class_weights
    assert unnamed is not None
    assert unnamed.tolist() == [1.0, 5.0, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "label"), [("multiclass", 4), ("multiclass", -1), ("binary", 2)])
def test_weight_of_an_unknown_class_is_an_error(kind: str, label: int) -> None:
    with pytest.raises(JobError, match="not a class") as caught:
        make_task(kind, class_weights={label: 1.0})
    assert caught.value.where == f"task.class_weights.{label}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_fp32(dtype: torch.dtype) -> None:
    task = make_task("multiclass")
    outputs, targets = torch.full((4000, NUM_CLASSES), 3.0, dtype=dtype), torch.zeros(4000, dtype=torch.int64)
    expected = 4000 * float(torch.tensor(4.0).log())
    assert float(task.compute_loss_sums(outputs, targets).loss_sum) == pytest.approx(expected, rel=1e-5)
    assert evaluate_outputs(task, outputs, targets)["loss"] == pytest.approx(expected / 4000, rel=1e-6)


def test_exact_sums_are_float64_even_for_float32_losses() -> None:
    task = make_task("regression")
    outputs, targets = torch.zeros(30_000, 3), torch.full((30_000, 3), 0.1)
    single = float(torch.tensor(0.1) * torch.tensor(0.1))
    assert evaluate_outputs(task, outputs, targets)["loss"] == pytest.approx(single, rel=1e-14)


def test_class_weights_are_given_by_name() -> None:
    indices: dict[int | str, int] = {"cat": 2, "dog": 0}
    named = make_task(
        "multiclass", class_weights={"cat": 3.0, "dog": 2.0}, label_index=indices.__getitem__
    ).class_weights
    assert named is not None
    assert named.tolist() == [2.0, 1.0, 3.0, 1.0]


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 3.0]])
def test_mixed_sample_counts_for_both_classes(weights: list[float] | None) -> None:
    task = make_task("multiclass", class_weights=dict(enumerate(weights)) if weights else None)
    outputs, targets = make_batch("multiclass", 11)
    lam = torch.linspace(0.1, 0.9, 11, dtype=torch.float64)
    whole, other = (F.one_hot(labels, NUM_CLASSES).double() for labels in (targets, targets.flip(0)))
    mixed = lam[:, None] * whole + (1 - lam[:, None]) * other
    sums = task.compute_loss_sums(outputs, mixed)
    each = (
        torch.ones(NUM_CLASSES, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    )
    mixed_loss = lam * each[targets] + (1 - lam) * each[targets.flip(0)]
    losses = -(mixed * outputs.log_softmax(1)).sum(1)
    assert float(sums.weight_sum) == pytest.approx(float(mixed_loss.sum()), rel=1e-13)
    assert float(sums.loss_sum) == pytest.approx(float((losses * mixed_loss).sum()), rel=1e-13)
    assert float(sums.num_correct) == int((outputs.argmax(1) == mixed.argmax(1)).sum())


def test_mixed_binary_sample_interpolates_class_weights() -> None:
    task = make_task("binary", class_weights={0: 0.25, 1: 4.0})
    sums = task.compute_loss_sums(torch.zeros(2, 1, dtype=torch.float64), torch.tensor([0.0, 0.6], dtype=torch.float64))
    assert float(sums.weight_sum) == pytest.approx(0.25 + 0.4 * 0.25 + 0.6 * 4.0, rel=1e-13)
