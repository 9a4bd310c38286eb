"""Frozen parameters do not change, the others train as in plain torch, and invalid patterns are reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.models import build_model
from pipeline.models.freezing import last_layer_names
from pipeline.training.flat_parameters import FlatParameters
from pipeline.training.gradient_fns import select_gradient_backend
from tests.training.factories import CPU, SHAPE, make_batch, make_engine, make_job, make_model

CNN_MODEL = {"kind": "cnn", "conv": [{"channels": 3, "kernel": 3, "pool": 2}], "hidden": [8], "batch_norm": True}


def frozen_names(model: dict[str, Any]) -> set[str]:
    return {name for name, p in make_model(make_job(model=model)).named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"hidden": [5, 6], "freeze": "backbone"}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ({"hidden": [5, 6], "freeze": ["0.*"]}, {"0.weight", "0.bias"}),
        ({"hidden": [5, 6], "freeze": ["*.bias", "4.weight"]}, {"0.bias", "2.bias", "4.bias", "4.weight"}),
        ({**CNN_MODEL, "freeze": ["features.*"]}, {f"features.{n}.{w}" for n in (0, 1) for w in ("weight", "bias")}),
        ({"hidden": [5]}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_matching_parameters_are_frozen(model: dict[str, Any], expected: set[str]) -> None:
    assert frozen_names(model) == expected


def test_head_stays_trainable_with_a_frozen_backbone() -> None:
    model = make_model(make_job(model={**CNN_MODEL, "freeze": "backbone"}))
    assert last_layer_names(model) == ["head.3.weight", "head.3.bias"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == last_layer_names(model)


@pytest.mark.parametrize(
    ("freeze", "words"),
    [(["nothing.*"], "'nothing.*' matches no parameter"), (["*"], "every parameter of the model is frozen")],
)
def test_invalid_freeze_is_a_job_error(freeze: list[str], words: str) -> None:
    with pytest.raises(JobError) as caught:
        frozen_names({"hidden": [5], "freeze": freeze})
    assert words in caught.value.what
    assert caught.value.where == "model.freeze"
    assert "0.weight" in caught.value.fix or "at least one trainable" in caught.value.fix
    with pytest.raises(JobError, match="every parameter"):
        frozen_names({"hidden": [], "freeze": ["0.weight", "0.bias"]})


@pytest.mark.parametrize("model", [{"hidden": [7, 5], "activation": "relu"}, CNN_MODEL], ids=["mlp", "cnn"])
def test_frozen_backbone_trains_like_plain_torch(model: dict[str, Any]) -> None:
    job = make_job(model={**model, "freeze": "backbone"}, train={"precision": "fp64"})
    assert select_gradient_backend(job, CPU) == "eager"
    engine = make_engine(job)
    before = engine.flat.state_dict()
    reference = build_model(job, SHAPE, 4, 11).double()
    reference.eval()  # every batch normalization is frozen
    head = last_layer_names(reference)
    assert engine.flat.params.numel() == sum(before[name].numel() for name in head)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.3)
    for step in (1, 2, 3):
        inputs, targets = make_batch(job, 6, seed=step)
        engine.forward_backward(step, inputs, targets)
        engine.optimizer_step(0.3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(inputs.double()), targets).backward()
        optimizer.step()
        engine.predict_logits(inputs)  # evaluation between steps
    after = engine.flat.state_dict()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-11, atol=1e-13)
        assert torch.equal(after[name], before[name]) == (name not in head), name


def test_partly_frozen_batch_norm_keeps_updating() -> None:
    engine = make_engine(make_job(model={**CNN_MODEL, "freeze": ["features.1.bias"]}))
    inputs, targets = make_batch(engine._job, 6)
    engine.forward_backward(1, inputs, targets)
    assert engine.flat.model.state_dict()["features.1.running_mean"].any()


def test_frozen_norm_statistics_are_not_reduced() -> None:
    """Averaging equal values rounds: over many steps the statistics would change."""

    def flat(*freeze: str) -> FlatParameters:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in freeze)
        return FlatParameters(model, CPU, torch.float32, world_size=2)

    def shapes(buffers: list[Tensor]) -> int:
        return sum(buffer.numel() for buffer in buffers)

    assert shapes(flat().buffers) == 8
    half = flat("1.weight", "1.bias", "0.weight", "0.bias")
    assert shapes(half.buffers) == 4
    assert half.all_reduce_buffer.numel() == half.params.numel() + 5 + 4
