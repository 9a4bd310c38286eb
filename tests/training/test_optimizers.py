"""Optimizers against torch.optim, and the loss scale against the rules of torch.amp.GradScaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import OptimizerConfig
from pipeline.errors import JobError
from pipeline.training.optimizers import GROWTH_INTERVAL, INITIAL_SCALE, GradScaler, Optimizer

OPTIMIZER_CONFIGS: list[dict[str, Any]] = [
    {"kind": "sgd"},
    {"kind": "sgd", "weight_decay": 0.01},
    {"kind": "sgd", "momentum": 0.9},
    {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"kind": "adam"},
    {"kind": "adam", "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.01},
    {"kind": "adamw", "weight_decay": 0.1},
]
NUM_STEPS = 60


def learning_rates() -> list[float]:
    return [0.1 / (1 + step) for step in range(NUM_STEPS)]


def make_gradients(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(37, generator=generator, dtype=dtype) for _ in range(NUM_STEPS)]


def initial_parameters(dtype: torch.dtype) -> Tensor:
    return torch.randn(37, generator=torch.Generator().manual_seed(1), dtype=dtype)


def make_torch_optimizer(config: dict[str, Any], parameter: Tensor) -> torch.optim.Optimizer:
    options = {key: value for key, value in config.items() if key != "kind"}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options.setdefault("weight_decay", 0.0)
    optimizer: torch.optim.Optimizer = kinds[config["kind"]]([parameter], lr=1.0, foreach=False, **options)
    return optimizer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("config", OPTIMIZER_CONFIGS, ids=str)
def test_many_steps_match_torch_optim(config: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    values, reference = initial_parameters(dtype), initial_parameters(dtype).requires_grad_()
    ours, theirs = Optimizer(OptimizerConfig.model_validate(config), values), make_torch_optimizer(config, reference)
    for lr, gradient in zip(learning_rates(), make_gradients(dtype), strict=True):
        ours.step(gradient.clone(), lr)
        theirs.param_groups[0]["lr"] = lr
        reference.grad = gradient.clone()
        theirs.step()
        torch.testing.assert_close(values, reference.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", OPTIMIZER_CONFIGS, ids=str)
def test_resume_from_saved_state_is_bit_identical(config: dict[str, Any]) -> None:
    whole, cut = initial_parameters(torch.float32), initial_parameters(torch.float32)
    first = Optimizer(OptimizerConfig.model_validate(config), whole)
    second = Optimizer(OptimizerConfig.model_validate(config), cut)
    for number, (lr, gradient) in enumerate(zip(learning_rates(), make_gradients(torch.float32), strict=True)):
        if number == NUM_STEPS // 2:
            saved = {name: tensor.clone() for name, tensor in second.state.items()}
            second = Optimizer(OptimizerConfig.model_validate(config), cut)
            second.load_state_dict(saved)
        first.step(gradient, lr)
        second.step(gradient, lr)
    assert torch.equal(whole, cut)
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)


@pytest.mark.parametrize("config", OPTIMIZER_CONFIGS, ids=str)
def test_reset_equals_a_new_optimizer(config: dict[str, Any]) -> None:
    used, fresh = initial_parameters(torch.float64), initial_parameters(torch.float64)
    first = Optimizer(OptimizerConfig.model_validate(config), used)
    for gradient in make_gradients(torch.float64)[:5]:
        first.step(gradient, 0.1)
    used.copy_(fresh)
    first.reset_state()
    second = Optimizer(OptimizerConfig.model_validate(config), fresh)
    for gradient in make_gradients(torch.float64)[5:9]:
        first.step(gradient, 0.1)
        second.step(gradient, 0.1)
    assert torch.equal(used, fresh)


@pytest.mark.parametrize("config", OPTIMIZER_CONFIGS, ids=str)
def test_overflow_changes_nothing(config: dict[str, Any]) -> None:
    values = initial_parameters(torch.float32)
    ours = Optimizer(OptimizerConfig.model_validate(config), values)
    for gradient in make_gradients(torch.float32)[:3]:
        ours.step(gradient, 0.1, torch.tensor(0.0))
    before, state = values.clone(), {name: tensor.clone() for name, tensor in ours.state.items()}
    ours.step(torch.full((37,), float("inf")), 0.1, torch.tensor(1.0))
    assert torch.equal(values, before)
    assert all(torch.equal(ours.state[name], state[name]) for name in state)
    if "step" in state:
        assert float(state["step"]) == 3


PARAMETER_SIZES = {"body.0.weight": 11, "body.0.bias": 3, "body.2.weight": 12, "body.2.bias": 4, "head.weight": 7}
"""37 elements in total, as in the vectors above."""

GROUPS: list[dict[str, Any]] = [
    {"match": "*.bias", "weight_decay": 0.0},
    {"match": "head.*", "lr_factor": 10.0, "weight_decay": 0.3},
    {"match": "body.0.*", "lr_factor": 0.1},
]


def split_parameters(vector: Tensor) -> dict[str, Tensor]:
    return dict(zip(PARAMETER_SIZES, vector.split(list(PARAMETER_SIZES.values())), strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("config", OPTIMIZER_CONFIGS, ids=str)
def test_groups_match_torch_param_groups(config: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    values = initial_parameters(dtype)
    ours = Optimizer(OptimizerConfig.model_validate({**config, "groups": GROUPS}), values, PARAMETER_SIZES)
    members = {
        name: tensor.clone().requires_grad_() for name, tensor in split_parameters(initial_parameters(dtype)).items()
    }
    theirs = make_torch_optimizer(config, members["body.2.weight"])  # the only one in no group
    decay = config.get("weight_decay", 0.0)
    for names, factor, group_decay in (
        (["body.0.bias", "body.2.bias"], 1.0, 0.0),
        (["head.weight"], 10.0, 0.3),
        (["body.0.weight"], 0.1, decay),
    ):
        group = {"params": [members[name] for name in names], "weight_decay": group_decay, "factor": factor}
        theirs.add_param_group(group)
    for lr, gradient in zip(learning_rates(), make_gradients(dtype), strict=True):
        ours.step(gradient.clone(), lr, torch.tensor(0.0))
        for name, grad in split_parameters(gradient).items():
            members[name].grad = grad.clone()
        for group in theirs.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
        theirs.step()
    expected = torch.cat([member.detach() for member in members.values()])
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
    assert {name: tuple(tensor.shape) for name, tensor in ours.state.items() if name != "step"} == {
        name: (37,) for name in ours.state if name != "step"
    }, "state vectors cover all groups"


@pytest.mark.parametrize("groups", [[], GROUPS], ids=["no groups", "groups"])
@pytest.mark.parametrize("config", OPTIMIZER_CONFIGS, ids=str)
def test_only_weight_matrices_decay(config: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    config = {**config, "weight_decay": 0.1}
    weight_matrices = {"body.0.weight", "head.weight"}
    values = initial_parameters(torch.float64)
    ours = Optimizer(
        OptimizerConfig.model_validate({**config, "groups": groups, "decay": "weights"}),
        *(values, PARAMETER_SIZES, weight_matrices),
    )
    parts = {
        name: tensor.clone().requires_grad_()
        for name, tensor in split_parameters(initial_parameters(torch.float64)).items()
    }
    theirs = make_torch_optimizer({**config, "weight_decay": 0.0}, parts["body.2.weight"])
    for name, factor, decay in (
        ("body.0.weight", 0.1, 0.1),
        ("body.0.bias", 1.0, 0.0),
        ("body.2.bias", 1.0, 0.0),
        ("head.weight", 10.0, 0.3),
    ):
        if not groups:
            factor, decay = 1.0, 0.1 if name in weight_matrices else 0.0
        theirs.add_param_group({"params": [parts[name]], "weight_decay": decay, "factor": factor})
    for lr, gradient in zip(learning_rates(), make_gradients(torch.float64), strict=True):
        ours.step(gradient.clone(), lr)
        for name, grad in split_parameters(gradient).items():
            parts[name].grad = grad.clone()
        for group in theirs.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
        theirs.step()
    expected = torch.cat([part.detach() for part in parts.values()])
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_unmatched_group_is_a_job_error() -> None:
    config = OptimizerConfig.model_validate({"groups": [*GROUPS, {"match": "tail.*"}]})
    with pytest.raises(JobError, match=r"'tail\.\*' matches no parameter") as caught:
        Optimizer(config, initial_parameters(torch.float32), PARAMETER_SIZES)
    assert caught.value.where == "train.optimizer.groups.3.match"
    assert "body.0.weight" in caught.value.fix


def test_group_with_zero_learning_rate_is_unchanged() -> None:
    values = initial_parameters(torch.float32)
    config = OptimizerConfig.model_validate(
        {"kind": "adamw", "weight_decay": 0.1, "groups": [{"match": "head.*", "lr_factor": 0}]}
    )
    Optimizer(config, values, PARAMETER_SIZES).step(make_gradients(torch.float32)[0], 0.1)
    before, after = split_parameters(initial_parameters(torch.float32)), split_parameters(values)
    assert [name for name in PARAMETER_SIZES if torch.equal(after[name], before[name])] == ["head.weight"]


def test_loss_scale_matches_grad_scaler() -> None:
    device = torch.device("cpu")
    scaler = GradScaler(device)
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert float(scaler.scale) == INITIAL_SCALE
    assert float(scaler.found_inf(good)) == 0
    for gradient in (bad, torch.tensor([float("-inf")])):
        assert float(scaler.found_inf(gradient)) == 1
        scaler.update(scaler.found_inf(gradient))
    assert float(scaler.scale) == INITIAL_SCALE / 4
    for _ in range(GROWTH_INTERVAL):
        assert float(scaler.scale) == INITIAL_SCALE / 4
        scaler.update(scaler.found_inf(good))
    assert float(scaler.scale) == INITIAL_SCALE / 2
    scaler.update(torch.tensor(0.0))
    restored = GradScaler(device)
    restored.load_state_dict({name: tensor.clone() for name, tensor in scaler.state.items()})
    assert {name: float(tensor) for name, tensor in restored.state.items()} == {
        "factor": INITIAL_SCALE / 2,
        "good_steps": 1,
        "skipped": 2,
    }
    restored.load_state_dict(
        {name: tensor for name, tensor in scaler.state.items() if name != "skipped"}
    )  # written by an earlier version
