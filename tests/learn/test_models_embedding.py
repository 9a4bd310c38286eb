"""Embeddings in the mlp: codes of many-levelled columns looked up, exactly and under every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.job import Mlp
from pipeline.learn.models import build_model, draws_at_random
from pipeline.learn.models.mlp import embedding_width
from pipeline.learn.ways import choose_way
from tests.learn.trainees import CLASSES, CPU, make_job, make_trainee

SIZES = (3000, 7)
NUMBERS = 4


def build(model: dict[str, Any], sizes: tuple[int, ...] = SIZES, seed: int = 5) -> nn.Module:
    return build_model(make_job(model=model), (NUMBERS + len(sizes),), CLASSES, seed, sizes)


def rows(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    numbers = torch.randn(count, NUMBERS, generator=draw)
    codes = torch.stack([torch.randint(size, (count,), generator=draw) for size in SIZES], 1)
    return numbers, codes


def test_codes_are_looked_up_and_join_the_numbers() -> None:
    model = build({"hidden": [6]})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "embeddings.0.weight": (3000, 50),
        "embeddings.1.weight": (7, 5),
        "0.weight": (6, NUMBERS + 55),
        "0.bias": (6,),
        "2.weight": (CLASSES, 6),
        "2.bias": (CLASSES,),
    }
    numbers, codes = rows(9)
    codes[0] = torch.tensor([2999, 6])
    weights = model.state_dict()
    looked_up = [weights[f"embeddings.{number}.weight"][codes[:, number]] for number in range(2)]
    hidden = torch.relu(torch.cat([numbers, *looked_up], 1) @ weights["0.weight"].t() + weights["0.bias"])
    expected = hidden @ weights["2.weight"].t() + weights["2.bias"]
    torch.testing.assert_close(model(torch.cat([numbers, codes.float()], 1)), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_a_function_of_the_seed_and_nothing_draws() -> None:
    first, again, other = build({"hidden": [6]}), build({"hidden": [6]}), build({"hidden": [6]}, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.state_dict()["embeddings.1.weight"], other.state_dict()["embeddings.1.weight"])
    assert not draws_at_random(first)


@pytest.mark.parametrize(("levels", "width"), [(2, 2), (7, 5), (100, 21), (400, 46), (3000, 50)])
def test_the_width_follows_the_stated_rule(levels: int, width: int) -> None:
    assert embedding_width(Mlp(), levels) == width
    assert embedding_width(Mlp(embedding_width=9), levels) == 9


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_every_level_learns_its_own_answer_in_every_precision(precision: str) -> None:
    """Only the code tells the class, and neighbours among 3,000 codes are not alike in bf16's eight bits."""
    job = make_job(
        model={"hidden": []}, train={"precision": precision, "optimizer": {"kind": "adam"}, "clip_norm": 1.0}
    )
    assert choose_way(job, CPU, SIZES) == "eager"
    trainee = make_trainee(job, model=build({"hidden": []}), way="eager")
    codes = torch.tensor([[2900 + number, 3] for number in range(16)])
    inputs = torch.cat([torch.zeros(16, NUMBERS), codes.float()], 1)
    targets = torch.tensor([number * 7 % CLASSES for number in range(16)])
    for step in range(1, 61):
        trainee.gradient(step, inputs, targets)
        trainee.update(0.05)
    assert torch.equal(trainee.outputs(inputs).argmax(1), targets)
