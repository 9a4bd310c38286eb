"""The periodic embedding of numbers: its formula, its initial values, and what it is applied to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import build_model
from pipeline.models.mlp import EmbeddingMlpNet, MlpNet
from pipeline.models.numeric_embedding import PeriodicEmbedding
from pipeline.models.weight_matrices import find_weight_matrices
from tests.training.factories import make_job


@given(numbers=st.integers(1, 5), rows=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None)
def test_embedding_follows_its_formula(numbers: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    embedding, inputs = PeriodicEmbedding(numbers).double(), torch.randn(rows, numbers, dtype=torch.float64)
    frequencies, phases, weight, bias = (
        getattr(embedding, name).detach().numpy() for name in ("frequencies", "phases", "weight", "bias")
    )
    embedded = embedding(inputs).detach().numpy().reshape(rows, numbers, 4)
    x = inputs.numpy()
    for index in range(numbers):
        cosines = np.cos(2 * math.pi * frequencies[index] * x[:, [index]] + phases[index])
        np.testing.assert_allclose(embedded[:, index, 0], x[:, index])
        np.testing.assert_allclose(embedded[:, index, 1:], cosines @ weight[index].T + bias[index], atol=1e-12)


def test_initial_values_are_those_of_realmlp() -> None:
    torch.manual_seed(1)
    embedding = PeriodicEmbedding(200)
    assert float(embedding.frequencies.detach().std()) == pytest.approx(0.1, rel=0.05)
    for parameter, bound in ((embedding.phases, math.pi), (embedding.weight, 0.25), (embedding.bias, 0.25)):
        assert float(parameter.detach().abs().max()) <= bound
        assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_only_numbers_are_embedded() -> None:
    """A row has 3 numbers, 2 one-hot columns and a code."""
    job = make_job(model={"hidden": [6], "numeric_embedding": "periodic"})
    model = build_model(job, (6,), 4, 1, (5,), 3)
    assert isinstance(model, EmbeddingMlpNet)
    assert model.state_dict()["0.weight"].shape == (6, 3 * 4 + 2 + 4)
    row = torch.tensor([[0.5, -1.0, 2.0, 1.0, 0.0, 3.0]])
    embedded = model.embed(row)
    assert torch.equal(embedded[:, :12], model.numeric_embedding(row[:, :3]))
    assert torch.equal(embedded[:, 12:14], row[:, 3:5])
    assert torch.equal(embedded[:, 14:], model.state_dict()["embeddings.0.weight"][[3]])


def test_a_table_without_numbers_has_nothing_to_embed() -> None:
    job = make_job(model={"hidden": [6], "numeric_embedding": "periodic"})
    assert isinstance(build_model(job, (4,), 3, 1, (), 0), MlpNet)


def test_all_values_of_arrays_are_numbers() -> None:
    model = build_model(make_job(model={"hidden": [6], "numeric_embedding": "periodic"}), (5,), 3, 1)
    assert model.state_dict()["0.weight"].shape == (6, 20)


def test_angles_keep_their_precision_under_autocast() -> None:
    """In bfloat16 an angle of 20 would be off by up to 0.06."""
    embedding = PeriodicEmbedding(3)
    with torch.no_grad():
        embedding.weight.fill_(1 / 16)
        embedding.bias.zero_()
        embedding.frequencies.copy_(torch.linspace(0.5, 1, 48).view(3, 16))
    numbers = torch.linspace(-4, 4, 60).view(20, 3)
    exact = embedding(numbers)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embedding(numbers), exact, rtol=0, atol=0.01)


def test_weight_matrices_are_those_of_layers() -> None:
    """Not biases, normalizations, scales of members, frequencies and phases."""
    job = make_job(
        model={"hidden": [6, 5], "ensemble": 2, "numeric_embedding": "periodic", "batch_norm": True, "dropout": 0.1}
    )
    model = build_model(job, (6,), 4, 1, (5,), 3)
    assert find_weight_matrices(model) == {
        *("numeric_embedding.weight", "embeddings.0.weight", "0.weight", "4.weight", "8.weight")
    }
    cnn = build_model(make_job(model={"kind": "cnn", "batch_norm": True}), (1, 28, 28), 4, 1)
    assert find_weight_matrices(cnn) == {
        *("features.0.weight", "features.4.weight", "head.0.weight", "head.3.weight", "head.6.weight")
    }
