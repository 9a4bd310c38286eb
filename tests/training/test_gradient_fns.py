"""Every gradient backend gives the gradient and the sums of plain autograd. On the CPU and on CUDA."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import JobConfig
from pipeline.training.gradient_fns import select_gradient_backend
from tests.training.factories import CPU, make_batch, make_engine, make_job, make_model, mean_gradient

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")  # on CUDA


def torch_gradient(job: JobConfig, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Compute the gradient (P,) of the mean loss, and the mean loss, by plain torch on the CPU."""
    model = make_model(job).to(dtype)
    outputs = model(inputs.to(dtype))
    if job.task.kind == "multiclass":
        loss = F.cross_entropy(outputs, targets)
    elif job.task.kind == "binary":
        loss = F.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(dtype))
    else:
        loss = F.mse_loss(outputs, targets.to(dtype))
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]), loss.item()


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [("fp64", torch.float64, 1e-12), ("fp32", None, 1e-5)])
@pytest.mark.parametrize("hidden", [[], [1], [7], [9, 5], [6, 6, 6, 6]], ids=str)
@pytest.mark.parametrize("kind", ["multiclass", "binary"])
def test_manual_mlp_backward_matches_autograd(
    kind: str, hidden: list[int], precision: str, dtype: torch.dtype | None, tolerance: float, device: torch.device
) -> None:
    job = make_job(model={"hidden": hidden}, task=kind, train={"precision": precision})
    assert select_gradient_backend(job, device) == "written"
    inputs, targets = make_batch(job, 13)
    expected, loss = torch_gradient(job, inputs, targets, dtype or torch.float32)
    engine = make_engine(job, device=device)
    inputs, targets = inputs.to(device), targets.to(device)
    for _ in range(2):  # the second step must not add to the first
        torch.testing.assert_close(mean_gradient(engine, inputs, targets), expected, rtol=tolerance, atol=tolerance)
    assert float(engine.flat.loss_sum / engine.flat.weight_sum) == pytest.approx(loss, rel=tolerance)
    assert float(engine.flat.weight_sum) == float(engine.flat.num_samples) == 13
    outputs = engine.predict_logits(inputs)
    predictions = outputs.argmax(1) if kind == "multiclass" else outputs[:, 0] > 0
    assert int(engine.flat.num_correct) == int((predictions == targets).sum())


@given(
    size=st.integers(1, 23),
    micro=st.none() | st.integers(1, 30),
    gradient_backend=st.sampled_from(["written", "eager"]),
    kind=st.sampled_from(["multiclass", "binary", "regression"]),
)
@settings(deadline=None, max_examples=60)
def test_micro_batches_add_up_to_the_batch(
    size: int, micro: int | None, gradient_backend: str, kind: str, device: torch.device
) -> None:
    if kind == "regression":
        gradient_backend = "eager"
    job = make_job(task=kind, train={"precision": "fp64", "micro_batch": micro})
    inputs, targets = make_batch(job, size)
    expected, loss = torch_gradient(job, inputs, targets, torch.float64)
    engine = make_engine(job, gradient_backend=gradient_backend, device=device)
    inputs, targets = inputs.to(device), targets.to(device)
    torch.testing.assert_close(mean_gradient(engine, inputs, targets), expected, rtol=1e-11, atol=1e-13)
    assert float(engine.flat.loss_sum / engine.flat.weight_sum) == pytest.approx(loss, rel=1e-12)
    assert float(engine.flat.num_samples) == size


@pytest.mark.parametrize("gradient_backend", ["written", "eager"])
def test_empty_rank_slice_adds_nothing(gradient_backend: str, device: torch.device) -> None:
    job = make_job()
    engine = make_engine(job, gradient_backend=gradient_backend, world_size=2, device=device)
    inputs, targets = make_batch(job, 3, device=device)
    engine.forward_backward(1, inputs, targets)
    assert engine.flat.all_reduce_buffer.any()
    engine.forward_backward(2, inputs[:0], targets[:0])
    assert not engine.flat.all_reduce_buffer.any()


def test_changing_batch_sizes(device: torch.device) -> None:
    job = make_job(train={"precision": "fp64"})
    engine = make_engine(job, device=device)
    for size in (8, 3, 8, 1, 2, 5, 6, 8, 3):
        inputs, targets = make_batch(job, size, seed=size)
        expected, _ = torch_gradient(job, inputs, targets, torch.float64)
        gradient = mean_gradient(engine, inputs.to(device), targets.to(device))
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("tree", "gradient_backend"),
    [
        ({}, "written"),
        ({"model": {"hidden": "doubling", "layers": 2}}, "written"),
        ({"task": "binary"}, "written"),
        ({"task": "regression"}, "eager"),
        ({"task": {"class_weights": "balanced"}}, "eager"),
        ({"model": {"activation": "tanh"}}, "eager"),
        ({"model": {"dropout": 0.5}}, "eager"),
        ({"model": {"batch_norm": True}}, "eager"),
        ({"model": {"kind": "cnn"}}, "eager"),
        ({"train": {"precision": "bf16"}}, "eager"),
        ({"train": {"compile": "on"}}, "compiled"),
        ({"train": {"compile": "off"}}, "written"),
    ],
)
def test_gradient_backend_depends_on_the_job(tree: dict[str, Any], gradient_backend: str) -> None:
    assert select_gradient_backend(make_job(**tree), CPU) == gradient_backend


def test_compiled_gradient_matches_autograd_on_cpu() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    job = make_job(train={"precision": "fp64", "compile": "on"}, model={"hidden": [3]})
    engine = make_engine(job)
    inputs, targets = make_batch(job, 4)
    expected, _ = torch_gradient(job, inputs, targets, torch.float64)
    torch.testing.assert_close(mean_gradient(engine, inputs, targets), expected, rtol=1e-10, atol=1e-12)
