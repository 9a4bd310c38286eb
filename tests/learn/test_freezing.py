"""Frozen parameters stay, the others learn as under plain torch, and patterns that match nothing are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.learn.flat import FlatModel
from pipeline.learn.models import build_model
from pipeline.learn.models.freezing import last_layer
from pipeline.learn.ways import choose_way
from tests.learn.trainees import CPU, SHAPE, make_batch, make_job, make_trainee, model_of

CNN = {"kind": "cnn", "conv": [{"channels": 3, "kernel": 3, "pool": 2}], "hidden": [8], "batch_norm": True}


def frozen(model: dict[str, Any]) -> set[str]:
    return {name for name, p in model_of(make_job(model=model)).named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"hidden": [5, 6], "freeze": "backbone"}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ({"hidden": [5, 6], "freeze": ["0.*"]}, {"0.weight", "0.bias"}),
        ({"hidden": [5, 6], "freeze": ["*.bias", "4.weight"]}, {"0.bias", "2.bias", "4.bias", "4.weight"}),
        ({**CNN, "freeze": ["features.*"]}, {f"features.{n}.{w}" for n in (0, 1) for w in ("weight", "bias")}),
        ({"hidden": [5]}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_is_frozen(model: dict[str, Any], expected: set[str]) -> None:
    assert frozen(model) == expected


def test_the_head_stays_when_the_backbone_is_frozen() -> None:
    model = model_of(make_job(model={**CNN, "freeze": "backbone"}))
    assert last_layer(model) == ["head.3.weight", "head.3.bias"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == last_layer(model)


@pytest.mark.parametrize(
    ("freeze", "words"),
    [(["nothing.*"], "'nothing.*' matches no parameter"), (["*"], "every parameter of the model is frozen")],
)
def test_what_cannot_be_frozen_is_an_error_of_the_job(freeze: list[str], words: str) -> None:
    with pytest.raises(JobError) as caught:
        frozen({"hidden": [5], "freeze": freeze})
    assert words in caught.value.what
    assert caught.value.where == "model.freeze"
    assert "0.weight" in caught.value.fix or "leave one" in caught.value.fix
    with pytest.raises(JobError, match="every parameter"):
        frozen({"hidden": [], "freeze": ["0.weight", "0.bias"]})


@pytest.mark.parametrize("model", [{"hidden": [7, 5], "activation": "relu"}, CNN], ids=["mlp", "cnn"])
def test_a_frozen_backbone_trains_as_under_plain_torch(model: dict[str, Any]) -> None:
    job = make_job(model={**model, "freeze": "backbone"}, train={"precision": "fp64"})
    assert choose_way(job, CPU) == "eager"
    trainee = make_trainee(job)
    before = trainee.flat.weights()
    reference = build_model(job, SHAPE, 4, 11).double()
    reference.eval()  # every batch norm here is frozen
    head = last_layer(reference)
    assert trainee.flat.values.numel() == sum(before[name].numel() for name in head)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.3)
    for step in (1, 2, 3):
        inputs, targets = make_batch(job, 6, seed=step)
        trainee.gradient(step, inputs, targets)
        trainee.update(0.3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(inputs.double()), targets).backward()
        optimizer.step()
        trainee.outputs(inputs)  # evaluation in between
    after = trainee.flat.weights()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-11, atol=1e-13)
        assert torch.equal(after[name], before[name]) == (name not in head), name


def test_a_batch_norm_with_a_free_parameter_goes_on_counting() -> None:
    trainee = make_trainee(make_job(model={**CNN, "freeze": ["features.1.bias"]}))
    inputs, targets = make_batch(trainee._job, 6)
    trainee.gradient(1, inputs, targets)
    assert trainee.flat.model.state_dict()["features.1.running_mean"].any()


def test_statistics_of_frozen_norms_are_no_part_of_the_exchange() -> None:
    """Averages of equal numbers are rounded: over many steps they would move."""

    def flat(*freeze: str) -> FlatModel:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in freeze)
        return FlatModel(model, CPU, torch.float32, world_size=2)

    def shapes(buffers: list[Tensor]) -> int:
        return sum(buffer.numel() for buffer in buffers)

    assert shapes(flat().buffers) == 8
    half = flat("1.weight", "1.bias", "0.weight", "0.bias")
    assert shapes(half.buffers) == 4
    assert half.exchange.numel() == half.values.numel() + 5 + 4
