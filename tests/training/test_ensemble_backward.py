"""The manual gradient of ensembles gives the gradient and the sums of autograd, with the same dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import JobConfig
from pipeline.models import build_model
from pipeline.training.engine import TrainEngine
from pipeline.training.gradient_fns import select_gradient_backend
from tests.training.factories import CPU, NUM_CLASSES, make_batch, make_engine, make_job, mean_gradient

NUM_INPUTS = 6
OUTPUTS = {"multiclass": NUM_CLASSES, "binary": 1, "regression": 3}


def build_engine(job: JobConfig, gradient_backend: str, code_sizes: tuple[int, ...], num_numbers: int) -> TrainEngine:
    model = build_model(job, (NUM_INPUTS,), OUTPUTS[job.task.kind], 11, code_sizes, num_numbers)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():  # so that no scale is 1
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return make_engine(job, gradient_backend=gradient_backend, model=model, counts=[1, 2, 3, 4])


def make_rows(job: JobConfig, rows: int, code_sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    inputs, targets = make_batch(job, rows * job.members, shape=(NUM_INPUTS,), seed=rows)
    for column, size in enumerate(code_sizes, NUM_INPUTS - len(code_sizes)):
        inputs[:, column] = torch.randint(size, (len(inputs),), generator=torch.Generator().manual_seed(rows)).float()
    return inputs, targets


@given(
    kind=st.sampled_from(["multiclass", "binary", "regression"]),
    members=st.integers(2, 4),
    hidden=st.lists(st.integers(1, 9), max_size=3),
    embedding=st.sampled_from(["none", "periodic"]),
    code_sizes=st.sampled_from([(), (5,), (3, 4)]),
    num_numbers=st.integers(0, 4),
    dropout=st.sampled_from([0.0, 0.4]),
    micro=st.none() | st.integers(1, 7),
    balanced=st.booleans(),
)
@settings(deadline=None, max_examples=120)
def test_manual_gradient_equals_autograd(
    kind: str,
    members: int,
    hidden: list[int],
    embedding: str,
    code_sizes: tuple[int, ...],
    num_numbers: int,
    dropout: float,
    micro: int | None,
    balanced: bool,
) -> None:
    """In float64; several batch sizes one after the other, whose buffers are reused."""
    model = {"hidden": hidden, "ensemble": members, "numeric_embedding": embedding, "dropout": dropout}
    task = {"kind": kind, "class_weights": "balanced" if balanced and kind == "multiclass" else None}
    job = make_job(model=model, task=task, train={"precision": "fp64", "micro_batch": micro})
    assert select_gradient_backend(job, CPU, code_sizes) == "written"
    written, eager = (build_engine(job, backend, code_sizes, num_numbers) for backend in ("written", "eager"))
    for step, rows in enumerate((5, 2, 5, 1, 3, 4, 5), 1):
        inputs, targets = make_rows(job, rows, code_sizes)
        ours, theirs = (mean_gradient(engine, inputs, targets, step) for engine in (written, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(written.flat.loss_sums, eager.flat.loss_sums, rtol=1e-11, atol=0, equal_nan=True)
        for engine in (written, eager):
            engine.optimizer_step(0.1)


def test_manual_gradient_equals_autograd_in_float32() -> None:
    job = make_job(model={"hidden": [32, 16], "ensemble": 8, "numeric_embedding": "periodic", "dropout": 0.1})
    written, eager = (build_engine(job, backend, (), NUM_INPUTS) for backend in ("written", "eager"))
    inputs, targets = make_rows(job, 64, ())
    expected = mean_gradient(eager, inputs, targets)
    assert float((mean_gradient(written, inputs, targets) - expected).norm() / expected.norm()) < 1e-5


def test_mixup_and_a_custom_loss_are_supported() -> None:
    job = make_job(model={"hidden": [5], "ensemble": 2}, train={"precision": "fp64"})
    inputs, targets = make_rows(job, 4, ())
    mixed = 0.7 * torch.nn.functional.one_hot(targets, NUM_CLASSES) + 0.3 / NUM_CLASSES
    written, eager = (build_engine(job, backend, (), NUM_INPUTS) for backend in ("written", "eager"))
    torch.testing.assert_close(mean_gradient(written, inputs, mixed), mean_gradient(eager, inputs, mixed))


@pytest.mark.parametrize(
    ("tree", "gradient_backend"),
    [
        ({}, "written"),
        ({"model": {"ensemble": 2, "dropout": 0.2, "numeric_embedding": "periodic"}}, "written"),
        ({"task": "regression"}, "written"),
        ({"train": {"precision": "bf16"}}, "eager"),
        ({"train": {"compile": "on"}}, "compiled"),
        ({"model": {"ensemble": 2, "activation": "silu"}}, "eager"),
        ({"model": {"ensemble": 2, "batch_norm": True}}, "eager"),
        ({"model": {"ensemble": 2, "freeze": ["0.r"]}}, "eager"),
        ({"model": {"ensemble": 1, "numeric_embedding": "periodic"}}, "eager"),
        ({"model": {"ensemble": 1, "numeric_embedding": "piecewise"}}, "written"),
    ],
)
def test_gradient_backend_depends_on_the_job(tree: dict[str, Any], gradient_backend: str) -> None:
    job = make_job(**{"model": {"ensemble": 3}, **tree})
    assert select_gradient_backend(job, CPU) == gradient_backend


@pytest.mark.parametrize("gradient_backend", ["written", "eager"])
def test_empty_rank_slice_adds_nothing(gradient_backend: str) -> None:
    job = make_job(model={"hidden": [5], "ensemble": 3})
    engine = build_engine(job, gradient_backend, (), NUM_INPUTS)
    inputs, targets = make_rows(job, 3, ())
    engine.forward_backward(1, inputs, targets)
    assert engine.flat.all_reduce_buffer.any()
    engine.forward_backward(2, inputs[:0], targets[:0])
    assert not engine.flat.all_reduce_buffer.any()


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_ensembles_learn_in_every_precision(precision: str) -> None:
    model = {"hidden": [32], "ensemble": 4, "numeric_embedding": "periodic"}
    train = {"precision": precision, "optimizer": {"kind": "adamw", "decay": "weights"}, "clip_norm": 1.0}
    job = make_job(model=model, train=train)
    engine = make_engine(job, shape=(NUM_INPUTS,))
    inputs, targets = make_rows(job, 16, ())
    for step in range(1, 151):
        engine.forward_backward(step, inputs, targets)
        engine.optimizer_step(0.02)
    assert float(engine.flat.loss_sum / engine.flat.weight_sum) < 0.05
    outputs = engine.predict_logits(inputs)
    assert outputs.shape == (64, NUM_CLASSES)
    torch.testing.assert_close(outputs.float().exp().sum(1), torch.ones(64), rtol=0, atol=1e-3)
