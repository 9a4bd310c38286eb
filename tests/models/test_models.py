"""Models: weights by seed, tensor names, random numbers, multiply-adds, and errors that name the field."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.models import build_model, uses_rng
from pipeline.models.flops import count_multiply_adds
from tests.training.factories import make_job


def build_from_config(model: dict[str, Any], shape: tuple[int, ...] = (1, 28, 28), seed: int = 1) -> nn.Module:
    return build_model(make_job(model=model), shape, 10, seed)


MODEL_CONFIGS: list[dict[str, Any]] = [
    {"hidden": []},
    {"hidden": [32, 8], "activation": "gelu", "dropout": 0.2, "batch_norm": True},
    {"kind": "cnn"},
    {"kind": "cnn", "batch_norm": True, "conv": [{"channels": 2, "padding": 1, "pool": 1}], "hidden": []},
]


@pytest.mark.parametrize("model", MODEL_CONFIGS, ids=str)
def test_weights_depend_only_on_the_seed(model: dict[str, Any]) -> None:
    torch.manual_seed(77)
    first = build_from_config(model)
    drawn = torch.rand(3)
    torch.manual_seed(77)
    assert torch.equal(torch.rand(3), drawn), "building does not use the global generator"
    again, other = build_from_config(model), build_from_config(model, seed=2)
    pairs = list(zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert first(torch.rand(3, 1, 28, 28)).shape == (3, 10)


def test_mlp_is_a_plain_sequential() -> None:
    model = build_from_config({"hidden": [5, 6]})
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert list(model.state_dict()) == names
    plain = nn.Sequential(nn.Linear(784, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 10))
    plain.load_state_dict(model.state_dict())
    inputs = torch.rand(4, 1, 28, 28)
    assert torch.equal(model(inputs), plain(inputs.flatten(1)))


def test_doubled_widths_start_from_the_input() -> None:
    linear = [
        m for m in build_from_config({"hidden": "doubling", "layers": 3}, (2,)).modules() if isinstance(m, nn.Linear)
    ]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(2, 4), (4, 8), (8, 10)]
    only = [
        m for m in build_from_config({"hidden": "doubling", "layers": 1}, (2,)).modules() if isinstance(m, nn.Linear)
    ]
    assert [(layer.in_features, layer.out_features) for layer in only] == [(2, 10)]


@pytest.mark.parametrize(
    ("model", "shape", "where"),
    [
        ({"kind": "cnn"}, (2,), "model.kind"),
        ({"kind": "cnn"}, (1, 4, 4), "model.conv.0"),
        ({"kind": "cnn"}, (1, 14, 14), "model.conv.1"),
        ({"kind": "nowhere_at_all:Net"}, (2,), "model.kind: nowhere_at_all:Net"),
        ({"kind": "torch.nn:NoSuchNet"}, (2,), "model.kind: torch.nn:NoSuchNet"),
        ({"kind": "torch.nn:Linear", "args": {"wrong": 1}}, (2,), "model.kind: torch.nn:Linear"),
        ({"kind": "builtins:dict"}, (2,), "model.kind: builtins:dict"),
    ],
)
def test_invalid_model_error_names_its_field(model: dict[str, Any], shape: tuple[int, ...], where: str) -> None:
    with pytest.raises(JobError) as caught:
        build_from_config(model, shape)
    assert caught.value.where == where
    assert caught.value.fix or "nn.Module" in caught.value.what


def test_user_module_is_built_with_its_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_own_nets.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, width):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, width), nn.Linear(width, 10))\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    model = build_from_config({"kind": "users_own_nets:Net", "args": {"width": 3}})
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert uses_rng(model)


@pytest.mark.parametrize(
    ("model", "is_random"), list(zip(MODEL_CONFIGS, [False, True, False, False], strict=True)), ids=str
)
def test_only_random_models_use_the_rng(model: dict[str, Any], is_random: bool) -> None:
    assert uses_rng(build_from_config(model)) == is_random


def test_flops_are_counted_per_use() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, 5)
            self.layer = nn.Linear(5, 7)
            self.matrix = nn.Parameter(torch.zeros(7, 3))

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.layer(self.embedding(inputs.long())) @ self.matrix
            return outputs.mean(1)

    assert count_multiply_adds(Own(), (4,)) == 4 * 5 * 7 + 7 * 3
    convolutions = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 2, 2, stride=2), nn.Flatten())
    assert count_multiply_adds(convolutions, (4, 8, 8)) == 6 * 6 * 6 * (2 * 9) + 6 * 6 * 6 * (2 * 4)
    normed = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in normed.state_dict().items()}
    state = torch.random.get_rng_state()
    assert count_multiply_adds(normed, (3,)) == 6
    assert normed.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in normed.state_dict().items())
