"""Losses: those of regression against plain torch, and valid and invalid custom losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import TaskConfig
from pipeline.errors import JobError, WorkError
from pipeline.training.losses import CustomLoss, build_loss, check_custom_loss
from tests.training.factories import CPU, make_batch, make_engine, make_job, mean_gradient

MODULE_NAME = "custom_losses_to_try"
LOSS_MODULE = """
import torch
from torch.nn import functional as F

def focal(outputs, targets):
    log_probabilities = F.log_softmax(outputs, 1)
    hard = targets if targets.ndim > 1 else F.one_hot(targets, outputs.shape[1])
    return -((1 - log_probabilities.exp()) ** 2 * log_probabilities * hard).sum(1)

def hard_only(outputs, targets):
    return F.cross_entropy(outputs, targets.long(), reduction="none") if targets.ndim == 1 else fail_here

def mean(outputs, targets):
    return F.cross_entropy(outputs, targets)

def number(outputs, targets):
    return 1.0

def raises(outputs, targets):
    raise ValueError("no such thing")

def detached(outputs, targets):
    return outputs.detach().sum(1)

def infinite(outputs, targets):
    return outputs.sum(1) / 0.0

def steep(outputs, targets):
    return (outputs - outputs.detach()).abs().sqrt().sum(1)
"""


@pytest.fixture
def loss_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write an importable module of losses, and return its name."""
    (tmp_path / f"{MODULE_NAME}.py").write_text(LOSS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return MODULE_NAME


def test_regression_losses_match_torch() -> None:
    outputs, targets = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 3)
    for tree, expected in (
        ({}, F.mse_loss(outputs, targets.double())),
        ({"loss": "mse"}, F.mse_loss(outputs, targets.double())),
        ({"loss": "mae"}, F.l1_loss(outputs, targets.double())),
        ({"loss": "huber", "huber_delta": 0.3}, F.huber_loss(outputs, targets.double(), delta=0.3)),
    ):
        loss = build_loss(TaskConfig.model_validate({"kind": "regression", **tree}))
        assert loss(outputs, targets).shape == (9,)
        assert float(loss(outputs, targets).mean()) == pytest.approx(float(expected), rel=1e-13)
        assert float(loss(outputs, targets, "sum")) == pytest.approx(9 * float(expected), rel=1e-13)


def test_custom_loss_trains_by_its_gradient(loss_module: str) -> None:
    job = make_job(task={"loss": f"{loss_module}:focal"}, train={"precision": "fp64"})
    engine = make_engine(job)
    inputs, targets = make_batch(job, 13)
    outputs = engine.flat.model(inputs.double())
    log_probabilities = outputs.log_softmax(1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad(
        (-((1 - log_probabilities.exp()) ** 2) * log_probabilities).mean(), engine.flat.parameters
    )
    gradient = mean_gradient(engine, inputs, targets)
    torch.testing.assert_close(gradient, torch.cat([grad.reshape(-1) for grad in expected]), rtol=1e-11, atol=1e-13)


def try_loss(name: str, *, has_mixup: bool = False, outputs: Tensor | None = None) -> None:
    targets = torch.tensor([0, 2, 1])
    outputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) if outputs is None else outputs
    check_custom_loss(CustomLoss(name), outputs, targets, has_mixup=has_mixup)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mean", r"returns \(\) for 3 samples.*shape \(3,\)"),
        ("number", "returns float for 3 samples"),
        ("raises", r"ValueError: no such thing, at .*custom_losses_to_try\.py:20"),
        ("detached", "is not differentiable"),
        ("infinite", "its loss is (-inf|inf|nan)"),
        ("steep", "its gradient is (-inf|inf|nan)"),
    ],
)
def test_invalid_custom_loss_is_rejected_before_training(loss_module: str, name: str, words: str) -> None:
    with pytest.raises(JobError, match=words) as caught:
        try_loss(f"{loss_module}:{name}")
    assert caught.value.where == f"task.loss: {loss_module}:{name}"
    assert caught.value.fix


def test_custom_loss_that_fails_later_is_a_work_error(loss_module: str) -> None:
    with pytest.raises(WorkError, match="no such thing"):
        CustomLoss(f"{loss_module}:raises")(torch.zeros(1, 2), torch.zeros(1))


def test_valid_loss_passes_and_mixup_targets_are_tested_if_used(loss_module: str) -> None:
    for has_mixup in (False, True):
        try_loss(f"{loss_module}:focal", has_mixup=has_mixup)
    try_loss(f"{loss_module}:hard_only")
    with pytest.raises(JobError, match="fail_here"):
        try_loss(f"{loss_module}:hard_only", has_mixup=True)


def test_nonfinite_model_output_is_not_blamed_on_the_loss(loss_module: str) -> None:
    try_loss(f"{loss_module}:focal", outputs=torch.full((3, 4), math.nan))


@pytest.mark.parametrize(("name", "words"), [(f"{MODULE_NAME}:nothing", "no function"), ("not_there:f", "no module")])
def test_missing_loss(loss_module: str, name: str, words: str) -> None:
    with pytest.raises(JobError, match=words) as caught:
        build_loss(TaskConfig.model_validate({"loss": name}))
    assert caught.value.where == "task.loss"


@pytest.mark.parametrize("tree", [{"task": {"loss": f"{MODULE_NAME}:focal"}}, {"data": {"augment": {"mixup": 0.2}}}])
def test_manual_backward_excludes_other_losses_and_mixed_targets(loss_module: str, tree: dict[str, Any]) -> None:
    from pipeline.training.gradient_fns import select_gradient_backend

    assert select_gradient_backend(make_job(**tree), CPU) == "eager"
