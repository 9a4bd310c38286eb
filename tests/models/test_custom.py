"""Custom models: the arguments that they receive, and errors if they do not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import JobError
from pipeline.models import build_model
from tests.training.factories import make_job

MODEL_MODULE = """
import math
import torch
from torch import nn

class Fitting(nn.Module):
    def __init__(self, input_shape, outputs, width=3, *, code_sizes):
        super().__init__()
        self.given = (input_shape, outputs, code_sizes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), width), nn.Linear(width, outputs))

    def forward(self, inputs):
        return self.body(inputs)

def plain(**args):
    assert set(args) <= {"bias"}, args
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4, **args))

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Dropout(0.5))

def pair():
    class Pair(nn.Module):
        def forward(self, inputs):
            return inputs, inputs
    return Pair()
"""


@pytest.fixture(autouse=True)
def model_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_fitting_nets.py").write_text(MODEL_MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def build_custom_model(name: str, shape: tuple[int, ...] = (1, 3, 4), **args: Any) -> nn.Module:
    return build_model(make_job(model={"kind": f"own_fitting_nets:{name}", "args": args}), shape, 4, 1)


def test_shape_and_outputs_are_passed_to_parameters_of_those_names() -> None:
    assert build_custom_model("Fitting").given == ((1, 3, 4), 4, ())
    assert build_custom_model("Fitting", width=8, outputs=4).given == ((1, 3, 4), 4, ())
    model = build_custom_model("plain", bias=False)
    assert isinstance(model, nn.Sequential)
    assert model[1].bias is None


def test_lazy_modules_are_initialized_from_the_seed() -> None:
    first, second = build_custom_model("lazy"), build_custom_model("lazy")
    torch.rand(3)
    weights = [model.state_dict()["1.weight"] for model in (first, second)]
    assert weights[0].shape == (4, 12)
    assert torch.equal(*weights)
    assert first.training


@pytest.mark.parametrize(
    ("name", "shape", "args", "words"),
    [
        ("plain", (1, 5, 5), {}, "fails on a sample of shape (1, 5, 5): RuntimeError"),
        ("Fitting", (1, 3, 4), {"outputs": 7}, "(1, 7) for 1 sample, but the task needs (1, 4)"),
        ("pair", (1, 3, 4), {}, "returns a tuple, not one tensor"),
    ],
)
def test_mismatched_model_is_rejected_before_training(
    name: str, shape: tuple[int, ...], args: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError) as caught:
        build_custom_model(name, shape, **args)
    assert words in caught.value.what
    assert caught.value.where == f"model.kind: own_fitting_nets:{name}"
    assert caught.value.fix
