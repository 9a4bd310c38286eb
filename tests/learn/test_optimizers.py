"""Update rules against torch.optim, and the loss scale against torch.amp.GradScaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import job as spec
from pipeline.learn.optimizers import Optimizer
from pipeline.learn.scaling import GROWTH_INTERVAL, INITIAL_SCALE, LossScale

RULES: list[dict[str, Any]] = [
    {"kind": "sgd"},
    {"kind": "sgd", "weight_decay": 0.01},
    {"kind": "sgd", "momentum": 0.9},
    {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"kind": "adam"},
    {"kind": "adam", "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.01},
    {"kind": "adamw", "weight_decay": 0.1},
]
STEPS = 60


def rates() -> list[float]:
    return [0.1 / (1 + step) for step in range(STEPS)]


def gradients(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(37, generator=generator, dtype=dtype) for _ in range(STEPS)]


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(37, generator=torch.Generator().manual_seed(1), dtype=dtype)


def of_torch(rule: dict[str, Any], parameter: Tensor) -> torch.optim.Optimizer:
    options = {key: value for key, value in rule.items() if key != "kind"}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options.setdefault("weight_decay", 0.0)
    optimizer: torch.optim.Optimizer = kinds[rule["kind"]]([parameter], lr=1.0, foreach=False, **options)
    return optimizer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_many_steps_are_those_of_torch_optim(rule: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    values, reference = start(dtype), start(dtype).requires_grad_()
    ours, theirs = Optimizer(spec.Optimizer.model_validate(rule), values), of_torch(rule, reference)
    for lr, gradient in zip(rates(), gradients(dtype), strict=True):
        ours.update(gradient.clone(), lr)
        theirs.param_groups[0]["lr"] = lr
        reference.grad = gradient.clone()
        theirs.step()
        torch.testing.assert_close(values, reference.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_going_on_from_saved_state_gives_the_same_bits(rule: dict[str, Any]) -> None:
    whole, cut = start(torch.float32), start(torch.float32)
    first = Optimizer(spec.Optimizer.model_validate(rule), whole)
    second = Optimizer(spec.Optimizer.model_validate(rule), cut)
    for number, (lr, gradient) in enumerate(zip(rates(), gradients(torch.float32), strict=True)):
        if number == STEPS // 2:
            saved = {name: tensor.clone() for name, tensor in second.state.items()}
            second = Optimizer(spec.Optimizer.model_validate(rule), cut)
            second.load(saved)
        first.update(gradient, lr)
        second.update(gradient, lr)
    assert torch.equal(whole, cut)
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_reset_is_a_fresh_start(rule: dict[str, Any]) -> None:
    used, fresh = start(torch.float64), start(torch.float64)
    first = Optimizer(spec.Optimizer.model_validate(rule), used)
    for gradient in gradients(torch.float64)[:5]:
        first.update(gradient, 0.1)
    used.copy_(fresh)
    first.reset()
    second = Optimizer(spec.Optimizer.model_validate(rule), fresh)
    for gradient in gradients(torch.float64)[5:9]:
        first.update(gradient, 0.1)
        second.update(gradient, 0.1)
    assert torch.equal(used, fresh)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_overflow_changes_nothing(rule: dict[str, Any]) -> None:
    values = start(torch.float32)
    ours = Optimizer(spec.Optimizer.model_validate(rule), values)
    for gradient in gradients(torch.float32)[:3]:
        ours.update(gradient, 0.1, torch.tensor(0.0))
    before, state = values.clone(), {name: tensor.clone() for name, tensor in ours.state.items()}
    ours.update(torch.full((37,), float("inf")), 0.1, torch.tensor(1.0))
    assert torch.equal(values, before)
    assert all(torch.equal(ours.state[name], state[name]) for name in state)
    if "step" in state:
        assert float(state["step"]) == 3


def test_the_scale_moves_as_grad_scaler_does() -> None:
    scale, device = LossScale(torch.device("cpu")), torch.device("cpu")
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert float(scale.factor) == INITIAL_SCALE
    assert float(scale.found_inf(good)) == 0
    for gradient in (bad, torch.tensor([float("-inf")])):
        assert float(scale.found_inf(gradient)) == 1
        scale.update(scale.found_inf(gradient))
    assert float(scale.factor) == INITIAL_SCALE / 4
    for _ in range(GROWTH_INTERVAL):
        assert float(scale.factor) == INITIAL_SCALE / 4
        scale.update(scale.found_inf(good))
    assert float(scale.factor) == INITIAL_SCALE / 2
    scale.update(torch.tensor(0.0))
    again = LossScale(device)
    again.load({name: tensor.clone() for name, tensor in scale.state.items()})
    assert {name: float(tensor) for name, tensor in again.state.items()} == {
        "factor": INITIAL_SCALE / 2,
        "good_steps": 1,
    }
