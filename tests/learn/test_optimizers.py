"""Update rules against torch.optim, and the loss scale against torch.amp.GradScaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import job as spec
from pipeline.errors import JobError
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


SIZES = {"body.0.weight": 11, "body.0.bias": 3, "body.2.weight": 12, "body.2.bias": 4, "head.weight": 7}
"""37 numbers in all, as the vectors above."""

GROUPS: list[dict[str, Any]] = [
    {"match": "*.bias", "weight_decay": 0.0},
    {"match": "head.*", "lr_factor": 10.0, "weight_decay": 0.3},
    {"match": "body.0.*", "lr_factor": 0.1},
]


def parts(vector: Tensor) -> dict[str, Tensor]:
    return dict(zip(SIZES, vector.split(list(SIZES.values())), strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_groups_are_the_param_groups_of_torch_optim(rule: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    values = start(dtype)
    ours = Optimizer(spec.Optimizer.model_validate({**rule, "groups": GROUPS}), values, SIZES)
    members = {name: tensor.clone().requires_grad_() for name, tensor in parts(start(dtype)).items()}
    theirs = of_torch(rule, members["body.2.weight"])  # the one that is in no group
    decay = rule.get("weight_decay", 0.0)
    for names, factor, own_decay in (
        (["body.0.bias", "body.2.bias"], 1.0, 0.0),
        (["head.weight"], 10.0, 0.3),
        (["body.0.weight"], 0.1, decay),
    ):
        group = {"params": [members[name] for name in names], "weight_decay": own_decay, "factor": factor}
        theirs.add_param_group(group)
    for lr, gradient in zip(rates(), gradients(dtype), strict=True):
        ours.update(gradient.clone(), lr, torch.tensor(0.0))
        for name, piece in parts(gradient).items():
            members[name].grad = piece.clone()
        for group in theirs.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
        theirs.step()
    expected = torch.cat([member.detach() for member in members.values()])
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
    assert {name: tuple(tensor.shape) for name, tensor in ours.state.items() if name != "step"} == {
        name: (37,) for name in ours.state if name != "step"
    }, "a checkpoint holds whole vectors"


def test_a_group_that_matches_nothing_is_an_error_of_the_job() -> None:
    rule = spec.Optimizer.model_validate({"groups": [*GROUPS, {"match": "tail.*"}]})
    with pytest.raises(JobError, match=r"'tail\.\*' matches no parameter") as caught:
        Optimizer(rule, start(torch.float32), SIZES)
    assert caught.value.where == "train.optimizer.groups.3.match"
    assert "body.0.weight" in caught.value.fix


def test_a_group_that_stands_still_stays() -> None:
    values = start(torch.float32)
    rule = spec.Optimizer.model_validate(
        {"kind": "adamw", "weight_decay": 0.1, "groups": [{"match": "head.*", "lr_factor": 0}]}
    )
    Optimizer(rule, values, SIZES).update(gradients(torch.float32)[0], 0.1)
    before, after = parts(start(torch.float32)), parts(values)
    assert [name for name in SIZES if torch.equal(after[name], before[name])] == ["head.weight"]


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
        "skipped": 2,
    }
    again.load({name: tensor for name, tensor in scale.state.items() if name != "skipped"})  # of an earlier version
