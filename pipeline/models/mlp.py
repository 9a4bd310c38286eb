"""`kind: mlp`: fully connected layers, after embeddings if a table has columns of many categories.

Its activations and dense layers are also used by `cnn`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.config import CnnConfig, MlpConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}


MAX_EMBEDDING_DIM = 50
"""Maximum embedding dimension of `embedding_width: auto`."""


def build_dense_layers(widths: list[int], outputs: int, config: MlpConfig | CnnConfig) -> list[nn.Module]:
    """Build linear layers from `widths[0]` inputs through the other widths to `outputs`, and the layers between."""
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(widths):
        layers.append(nn.Linear(inputs, width))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[config.activation]())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
    return [*layers, nn.Linear(widths[-1], outputs)]


class MlpNet(nn.Sequential):
    """Linear layers with activations between them. Flattens its input: (B, ...) to (B, outputs)."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = inputs.flatten(1)
        for module in self:
            outputs = module(outputs)
        return outputs


class EmbeddingMlpNet(nn.Module):
    """An `MlpNet` that replaces the last columns of its input by embeddings first: (B, F) to (B, outputs).

    The last `len(embeddings)` of the F columns are category codes, integers from 0 in the floating dtype of the input.
    Their embeddings follow the other columns. The layers have the names of an `MlpNet`'s.
    """

    def __init__(self, embeddings: Sequence[nn.Embedding], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(embeddings)
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self._names = [str(number) for number in range(len(layers))]

    def forward(self, inputs: Tensor) -> Tensor:
        num_numeric = inputs.shape[1] - len(self.embeddings)
        codes = inputs[:, num_numeric:].long().unbind(1)
        embedded = [embedding(column) for embedding, column in zip(self.embeddings, codes, strict=True)]
        outputs = torch.cat([inputs[:, :num_numeric], *embedded], 1)
        for name in self._names:
            outputs = self.get_submodule(name)(outputs)
        return outputs


def build_mlp(config: MlpConfig, input_shape: tuple[int, ...], outputs: int, code_sizes: tuple[int, ...]) -> nn.Module:
    """Build an `MlpNet`, or an `EmbeddingMlpNet` if its inputs include category codes."""
    inputs = math.prod(input_shape)
    if not code_sizes:
        return MlpNet(*build_dense_layers([inputs, *compute_hidden_widths(config, inputs)], outputs, config))
    # Code 0 is a category that no training row has: its embedding stays 0.
    embeddings = [nn.Embedding(size, compute_embedding_dim(config, size), padding_idx=0) for size in code_sizes]
    inputs += sum(embedding.embedding_dim for embedding in embeddings) - len(code_sizes)
    return EmbeddingMlpNet(
        embeddings, build_dense_layers([inputs, *compute_hidden_widths(config, inputs)], outputs, config)
    )


def compute_hidden_widths(config: MlpConfig, inputs: int) -> list[int]:
    """Return the widths of the hidden layers; `doubling`: inputs x 2, 4, 8, ... for `layers` linear layers in total."""
    if config.hidden != "doubling":
        return list(config.hidden)
    assert config.layers is not None
    return [inputs * 2**depth for depth in range(1, config.layers)]


def compute_embedding_dim(config: MlpConfig, num_codes: int) -> int:
    """Return the embedding dimension for a number of codes; `auto` is fastai's `emb_sz_rule`, at most 50, not 600."""
    if config.embedding_width != "auto":
        return config.embedding_width
    return min(MAX_EMBEDDING_DIM, round(1.6 * math.pow(num_codes, 0.56)))
