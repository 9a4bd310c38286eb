"""Embeddings of the mlp: exact lookup of category codes, in every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import MlpConfig
from pipeline.models import build_model, uses_rng
from pipeline.training.gradient_fns import select_gradient_backend
from tests.training.factories import CPU, NUM_CLASSES, make_engine, make_job

CATEGORY_COUNTS = (3000, 7)
NUM_NUMERIC = 4


def build_from_config(model: dict[str, Any], sizes: tuple[int, ...] = CATEGORY_COUNTS, seed: int = 5) -> nn.Module:
    return build_model(make_job(model=model), (NUM_NUMERIC + len(sizes),), NUM_CLASSES, seed, sizes)


def make_rows(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    numbers = torch.randn(count, NUM_NUMERIC, generator=draw)
    codes = torch.stack([torch.randint(size, (count,), generator=draw) for size in CATEGORY_COUNTS], 1)
    return numbers, codes


def test_codes_are_embedded_and_concatenated_with_numbers() -> None:
    model = build_from_config({"hidden": [6]})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "embeddings.0.weight": (3000, 50),
        "embeddings.1.weight": (7, 5),
        "0.weight": (6, NUM_NUMERIC + 55),
        "0.bias": (6,),
        "2.weight": (NUM_CLASSES, 6),
        "2.bias": (NUM_CLASSES,),
    }
    numbers, codes = make_rows(9)
    codes[0] = torch.tensor([2999, 6])
    weights = model.state_dict()
    looked_up = [weights[f"embeddings.{number}.weight"][codes[:, number]] for number in range(2)]
    hidden = torch.relu(torch.cat([numbers, *looked_up], 1) @ weights["0.weight"].t() + weights["0.bias"])
    expected = hidden @ weights["2.weight"].t() + weights["2.bias"]
    torch.testing.assert_close(model(torch.cat([numbers, codes.float()], 1)), expected, rtol=1e-5, atol=1e-5)


def test_weights_depend_only_on_the_seed() -> None:
    first, again, other = (
        build_from_config({"hidden": [6]}),
        build_from_config({"hidden": [6]}),
        build_from_config({"hidden": [6]}, seed=6),
    )
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.state_dict()["embeddings.1.weight"], other.state_dict()["embeddings.1.weight"])
    assert not uses_rng(first)


@pytest.mark.parametrize(("num_codes", "width"), [(2, 2), (7, 5), (100, 21), (400, 46), (3000, 50)])
def test_embedding_width_follows_the_documented_rule(num_codes: int, width: int) -> None:
    assert MlpConfig().embedding_dim(num_codes) == width
    assert MlpConfig(embedding_width=9).embedding_dim(num_codes) == 9


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_every_category_is_learned_in_every_precision(precision: str) -> None:
    """The class depends on the code alone; bf16's 8 bits could not distinguish adjacent codes among 3,000."""
    job = make_job(
        model={"hidden": []}, train={"precision": precision, "optimizer": {"kind": "adam"}, "clip_norm": 1.0}
    )
    assert select_gradient_backend(job, CPU, CATEGORY_COUNTS) == "eager"
    engine = make_engine(job, model=build_from_config({"hidden": []}), gradient_backend="eager")
    codes = torch.tensor([[2900 + number, 3] for number in range(16)])
    inputs = torch.cat([torch.zeros(16, NUM_NUMERIC), codes.float()], 1)
    targets = torch.tensor([number * 7 % NUM_CLASSES for number in range(16)])
    for step in range(1, 61):
        engine.forward_backward(step, inputs, targets)
        engine.optimizer_step(0.05)
    assert torch.equal(engine.predict_logits(inputs).argmax(1), targets)
