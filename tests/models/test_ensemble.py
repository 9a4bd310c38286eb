"""Ensembles: each member is a network with weights that follow from the shared ones; averages and disagreement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.errors import JobError
from pipeline.models import build_model, uses_rng
from pipeline.models.ensemble import (
    Averaging,
    EnsembleLinear,
    MemberBatchNorm,
    MemberDropout,
    MemberLinear,
    average_outputs,
    compute_disagreement,
    draw_first_scales,
)
from pipeline.models.flops import count_multiply_adds
from pipeline.models.freezing import last_layer_names
from pipeline.models.mlp import EnsembleMlpNet
from tests.training.factories import make_job

NUM_INPUTS, NUM_CODES = 5, 4


def build_ensemble(model: dict[str, Any], *, codes: bool = False, outputs: int = 3, seed: int = 5) -> EnsembleMlpNet:
    """Build an ensemble of rows of 5 numbers, and with `codes` a category of 4 codes; no parameter is 0 or 1."""
    shape, sizes = (NUM_INPUTS + codes,), (NUM_CODES,) if codes else ()
    built = build_model(make_job(model=model), shape, outputs, seed, sizes, NUM_INPUTS)
    assert isinstance(built, EnsembleMlpNet)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.double().parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return built


def make_rows(count: int, *, codes: bool = False, seed: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, NUM_INPUTS, generator=draw, dtype=torch.float64)
    return torch.cat([numbers, torch.randint(NUM_CODES, (count, 1), generator=draw)], 1) if codes else numbers


def member_outputs(ensemble: EnsembleMlpNet, member: int, rows: Tensor) -> Tensor:
    """Compute the outputs (N, O) of one member as of a separate network with its own weights."""
    values = ensemble.embed(rows)
    for module in ensemble.children():
        if isinstance(module, EnsembleLinear):
            weight = module.s[member].unsqueeze(1) * module.weight * module.r[member]
            values = F.linear(values, weight, module.bias[member]).relu()
        elif isinstance(module, MemberLinear):
            values = F.linear(values, module.weight[member], module.bias[member])
    return values


@given(
    members=st.integers(2, 5),
    hidden=st.lists(st.integers(1, 9), max_size=3),
    rows=st.integers(1, 6),
    codes=st.booleans(),
    embedding=st.sampled_from(["none", "periodic"]),
)
@settings(deadline=None, max_examples=60)
def test_ensemble_equals_separate_networks(
    members: int, hidden: list[int], rows: int, codes: bool, embedding: str
) -> None:
    """Outputs and gradients, in float64: in training each member has rows of its own, in evaluation all rows."""
    ensemble = build_ensemble({"hidden": hidden, "ensemble": members, "numeric_embedding": embedding}, codes=codes)
    parameters = list(ensemble.parameters())
    inputs = make_rows(rows * members, codes=codes)
    outputs = ensemble(inputs)
    expected = torch.stack([member_outputs(ensemble, k, inputs[k::members]) for k in range(members)], 1).flatten(0, 1)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((outputs * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ensemble.eval()
    separate = torch.stack([member_outputs(ensemble, k, inputs) for k in range(members)], 1)
    torch.testing.assert_close(ensemble.forward_members(inputs), separate, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ensemble(inputs).softmax(1), separate.softmax(2).mean(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "averaging"), [("multiclass", "softmax"), ("binary", "sigmoid"), ("regression", "mean")]
)
def test_averaging_follows_the_task(kind: str, averaging: Averaging) -> None:
    model = build_model(make_job(model={"ensemble": 2}, task=kind), (3,), 1, 1)
    assert isinstance(model, EnsembleMlpNet)
    assert model.averaging == averaging


OUTPUTS = st.tuples(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.sampled_from([1, 30])
)


def draw_outputs(sizes: tuple[int, int, int, int, int]) -> Tensor:
    rows, members, outputs, seed, scale = sizes
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, members, outputs, generator=generator, dtype=torch.float64)


@given(sizes=OUTPUTS)
@settings(deadline=None)
def test_probabilities_are_averaged(sizes: tuple[int, int, int, int, int]) -> None:
    outputs = draw_outputs(sizes)
    softmax, sigmoid = (average_outputs(outputs, averaging) for averaging in ("softmax", "sigmoid"))
    torch.testing.assert_close(softmax.softmax(-1), outputs.softmax(-1).mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sigmoid.sigmoid(), outputs.sigmoid().mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(average_outputs(outputs, "mean"), outputs.mean(1))


@given(sizes=OUTPUTS, averaging=st.sampled_from(["softmax", "sigmoid", "mean"]))
@settings(deadline=None)
def test_disagreement_is_0_for_equal_members_and_else_positive(
    sizes: tuple[int, int, int, int, int], averaging: Averaging
) -> None:
    outputs = draw_outputs(sizes)
    disagreement = compute_disagreement(outputs, averaging)
    assert disagreement.shape == (len(outputs), 1 if averaging == "softmax" else outputs.shape[2])
    assert (disagreement >= 0).all()
    equal = outputs[:, :1].expand_as(outputs)
    assert float(compute_disagreement(equal, averaging).max()) < 1e-12
    if averaging == "mean":
        torch.testing.assert_close(disagreement, ((outputs - outputs.mean(1, keepdim=True)) ** 2).mean(1).sqrt())
        return
    probabilities = (
        outputs.softmax(-1) if averaging == "softmax" else torch.stack([outputs.sigmoid(), (-outputs).sigmoid()], -1)
    )
    entropy = torch.special.entr(probabilities.mean(1)).sum(-1) - torch.special.entr(probabilities).sum(-1).mean(1)
    torch.testing.assert_close(disagreement.view(entropy.shape), entropy, rtol=1e-6, atol=1e-10)


def test_certain_members_that_disagree_have_the_largest_uncertainty() -> None:
    outputs = torch.tensor([[[80.0, -80.0], [-80.0, 80.0]]], dtype=torch.float64)
    assert float(compute_disagreement(outputs, "softmax")) == pytest.approx(torch.tensor(2.0).log().item())
    assert torch.isfinite(compute_disagreement(1e30 * outputs, "softmax")).all()


def test_initial_weights_are_those_of_tabm() -> None:
    """Only the scales before the first layer and the output layers differ between members."""
    plain, embedded = (
        build_model(
            make_job(model={"hidden": [40, 30], "ensemble": 6, "numeric_embedding": embedding}), (9,), 3, 1, (), 7
        )
        for embedding in ("none", "periodic")
    )
    weights = plain.state_dict()
    assert set(weights["0.r"].unique().tolist()) == {-1.0, 1.0}
    for name in ("0.s", "2.r", "2.s"):
        assert (weights[name] == 1).all(), name
    for name in ("0.bias", "2.bias"):
        assert (weights[name] == weights[name][0]).all(), name
    assert float(weights["2.weight"].abs().max()) <= 40**-0.5
    assert float(weights["2.weight"].std()) == pytest.approx((3 * 40) ** -0.5, rel=0.05), "uniform"
    assert len({tuple(rows.flatten().tolist()) for rows in weights["4.weight"]}) == 6
    scales = embedded.state_dict()["0.r"]
    assert scales.shape == (6, 4 * 7 + 2)
    assert (scales[:, :28].view(6, 7, 4) == scales[:, :28].view(6, 7, 4)[:, :, :1]).all(), "one for each number"
    assert len(scales.unique()) == 6 * 9


def test_first_scales_are_shared_by_the_width_of_an_input() -> None:
    for kind in ("signs", "normal"):
        scales = draw_first_scales(kind, [2, 1, 3], 4)
        assert scales.shape == (4, 6)
        for part in scales.split([2, 1, 3], 1):
            assert (part == part[:, :1]).all()


def test_weights_depend_only_on_the_seed() -> None:
    first, again, other = (build_ensemble({"ensemble": 3}, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_one_member_is_a_plain_network() -> None:
    job = make_job(model={"ensemble": 1, "numeric_embedding": "none"})
    assert list(build_model(job, (5,), 3, 1).state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@given(probability=st.sampled_from([0.1, 0.5, 0.9]), seed=st.integers(0, 3))
@settings(deadline=None)
def test_dropout_has_its_probability_and_keeps_the_mean(probability: float, seed: int) -> None:
    dropout, ones = MemberDropout(probability), torch.ones(4, 1000, 50)
    torch.manual_seed(seed)
    dropped = dropout(ones)
    assert float((dropped == 0).double().mean()) == pytest.approx(probability, abs=0.005)
    assert len(dropped.unique()) == 2
    assert float(dropped.max()) == pytest.approx(1 / (1 - probability), rel=1e-3)
    torch.manual_seed(seed)
    assert torch.equal(dropout(ones), dropped)
    assert not torch.equal(dropout(ones), dropped)
    assert dropout.eval()(ones) is ones


def test_dropout_of_an_odd_number_of_values() -> None:
    assert MemberDropout(0.5)(torch.ones(3, 1, 5)).shape == (3, 1, 5)


def test_batch_normalization_has_statistics_for_each_member() -> None:
    norm, plain = MemberBatchNorm(3, 4), [nn.BatchNorm1d(4) for _ in range(3)]
    values = torch.randn(3, 7, 4) * torch.tensor([1.0, 5.0, 9.0]).view(3, 1, 1)
    for _ in range(2):
        expected = torch.stack([layer(part) for layer, part in zip(plain, values, strict=True)])
        torch.testing.assert_close(norm(values), expected)
    norm.eval()
    expected = torch.stack([layer.eval()(part) for layer, part in zip(plain, values, strict=True)])
    torch.testing.assert_close(norm(values), expected)


@pytest.mark.parametrize("model", [{"batch_norm": True}, {"activation": "gelu"}, {"hidden": "doubling", "layers": 2}])
def test_other_settings_of_an_mlp_apply(model: dict[str, Any]) -> None:
    ensemble = build_ensemble({"ensemble": 3, **model})
    assert ensemble(make_rows(12)).shape == (12, 3)
    assert ensemble.eval()(make_rows(12)).shape == (12, 3)


def test_random_numbers_are_used_only_by_dropout() -> None:
    assert not uses_rng(
        build_ensemble({"ensemble": 2, "batch_norm": True, "numeric_embedding": "periodic"}, codes=True)
    )
    assert uses_rng(build_ensemble({"ensemble": 2, "dropout": 0.1}))


def test_multiply_adds_count_every_member() -> None:
    one, three = (
        count_multiply_adds(build_model(make_job(model={"hidden": [7, 6], "ensemble": k}), (5,), 3, 1), (5,))
        for k in (1, 3)
    )
    assert (one, three) == (5 * 7 + 7 * 6 + 6 * 3, 3 * one)


def test_images_and_freezing() -> None:
    """An ensemble flattens images; the last layer is the output layer of all members."""
    job = make_job(model={"hidden": [4], "ensemble": 2, "freeze": "backbone"})
    model = build_model(job, (1, 3, 3), 5, 1)
    assert model.eval()(torch.rand(6, 1, 3, 3)).shape == (6, 5)
    assert model.train()(torch.rand(6, 1, 3, 3)).shape == (6, 5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == last_layer_names(model) == ["2.weight", "2.bias"]
    with pytest.raises(JobError, match="is for the numbers of tables") as caught:
        build_model(make_job(model={"numeric_embedding": "periodic"}), (1, 3, 3), 5, 1)
    assert caught.value.where == "model.numeric_embedding"
