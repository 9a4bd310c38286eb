"""`kind: mlp`: fully connected layers, after embeddings of categories and numbers; one network or an ensemble.

Its activations and dense layers are also used by `cnn`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.config import CnnConfig, MlpConfig
from pipeline.errors import JobError
from pipeline.models.ensemble import (
    Averaging,
    EnsembleLinear,
    MemberBatchNorm,
    MemberDropout,
    MemberLinear,
    average_outputs,
    draw_first_scales,
)
from pipeline.models.numeric_embedding import EMBEDDING_DIM, PeriodicEmbedding

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}


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
    """An `MlpNet` that replaces columns of its input by embeddings first: (B, F) to (B, outputs).

    The first columns are numbers, which `numeric_embedding` replaces if there is one. The last `len(embeddings)` of the
    F columns are category codes, integers from 0 in the floating dtype of the input. Their embeddings follow the other
    columns. The layers have the names of an `MlpNet`'s.

    num_numbers: how many columns `numeric_embedding` replaces.
    """

    def __init__(
        self,
        embeddings: Sequence[nn.Embedding],
        layers: Sequence[nn.Module],
        numeric_embedding: PeriodicEmbedding | None = None,
        num_numbers: int = 0,
    ) -> None:
        super().__init__()
        if numeric_embedding is not None:
            self.numeric_embedding = numeric_embedding
        if embeddings:
            self.embeddings = nn.ModuleList(embeddings)
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self._num_codes, self._num_numbers = len(embeddings), num_numbers if numeric_embedding is not None else 0
        self._names = [str(number) for number in range(len(layers))]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.apply_layers(self.embed(inputs))

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the inputs of the first layer, (B, width)."""
        inputs = inputs.flatten(1)
        if not self._num_codes and not self._num_numbers:
            return inputs
        num_others = inputs.shape[1] - self._num_codes
        columns = [inputs[:, self._num_numbers : num_others]]
        if self._num_numbers:
            columns.insert(0, self.numeric_embedding(inputs[:, : self._num_numbers]))
        if self._num_codes:
            codes = inputs[:, num_others:].long().unbind(1)
            columns += [embedding(column) for embedding, column in zip(self.embeddings, codes, strict=True)]
        return torch.cat(columns, 1)

    def apply_layers(self, values: Tensor) -> Tensor:
        """Pass the inputs of the first layer through all layers."""
        for name in self._names:
            values = getattr(self, name)(values)
        return values


class EnsembleMlpNet(EmbeddingMlpNet):
    """An ensemble of K networks with shared weights, see `pipeline.models.ensemble`.

    In training each member takes its own rows: inputs (B K, ...), B rows of K members, of which row i K + k is row i of
    member k, to outputs (B K, outputs) in the same order. In evaluation all members take all rows: (N, ...) to the one
    prediction of them all, (N, outputs), see `average_outputs`. Embeddings of categories and numbers are shared.

    members: K. averaging: how outputs are averaged.
    """

    def __init__(self, members: int, averaging: Averaging, *args: Any) -> None:
        super().__init__(*args)
        self.members = members
        self.averaging = averaging

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            outputs = self.forward_members(inputs)
            return average_outputs(outputs, self.averaging)
        by_member = self.embed(inputs).unflatten(0, (-1, self.members)).transpose(0, 1)
        return self.apply_layers(by_member).transpose(0, 1).flatten(0, 1)

    def forward_members(self, inputs: Tensor) -> Tensor:
        """Return the outputs of every member for every row, (N, K, outputs), in the current mode."""
        return self.apply_layers(self.embed(inputs).expand(self.members, -1, -1)).transpose(0, 1)


def build_mlp(
    config: MlpConfig,
    input_shape: tuple[int, ...],
    outputs: int,
    code_sizes: tuple[int, ...],
    num_numbers: int,
    averaging: Averaging,
) -> nn.Module:
    """Build an `MlpNet`; an `EmbeddingMlpNet` if its inputs include category codes or its numbers are embedded; an
    `EnsembleMlpNet` if it has several members.

    Parameters
    ----------
    num_numbers: the first values of a sample (F,) that are numbers.

    Raises
    ------
    JobError: numbers of samples that are not rows are to be embedded.
    """
    embeds_numbers = config.numeric_embedding == "periodic"
    if embeds_numbers and len(input_shape) != 1:
        raise JobError(
            f"{config.numeric_embedding} is for the numbers of tables, but a sample has the shape {input_shape}",
            where="model.numeric_embedding",
            fix="leave it out",
        )
    num_numbers = num_numbers if embeds_numbers else 0
    inputs = math.prod(input_shape)
    if config.ensemble == 1 and not code_sizes and not num_numbers:
        return MlpNet(*build_dense_layers([inputs, *compute_hidden_widths(config, inputs)], outputs, config))
    numeric_embedding = PeriodicEmbedding(num_numbers) if num_numbers else None
    # Code 0 is a category that no training row has: its embedding stays 0.
    embeddings = [nn.Embedding(size, config.embedding_dim(size), padding_idx=0) for size in code_sizes]
    input_widths = [EMBEDDING_DIM] * num_numbers + [1] * (inputs - num_numbers - len(code_sizes))
    input_widths += [embedding.embedding_dim for embedding in embeddings]
    inputs = sum(input_widths)
    widths = [inputs, *compute_hidden_widths(config, inputs)]
    if config.ensemble == 1:
        layers = build_dense_layers(widths, outputs, config)
        return EmbeddingMlpNet(embeddings, layers, numeric_embedding, num_numbers)
    layers = build_ensemble_layers(widths, outputs, config)
    if isinstance(layers[0], EnsembleLinear):
        kind: Literal["signs", "normal"] = "signs" if config.numeric_embedding == "none" else "normal"
        layers[0].r.data = draw_first_scales(kind, input_widths, config.ensemble)
    return EnsembleMlpNet(config.ensemble, averaging, embeddings, layers, numeric_embedding, num_numbers)


def build_ensemble_layers(widths: list[int], outputs: int, config: MlpConfig) -> list[nn.Module]:
    """Build the layers of an ensemble, as `build_dense_layers` does those of one network."""
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(widths):
        layers.append(EnsembleLinear(config.ensemble, inputs, width))
        if config.batch_norm:
            layers.append(MemberBatchNorm(config.ensemble, width))
        layers.append(ACTIVATIONS[config.activation]())
        if config.dropout:
            layers.append(MemberDropout(config.dropout))
    return [*layers, MemberLinear(config.ensemble, widths[-1], outputs)]


def compute_hidden_widths(config: MlpConfig, inputs: int) -> list[int]:
    """Return the widths of the hidden layers; `doubling`: inputs x 2, 4, 8, ... for `layers` linear layers in total."""
    if config.hidden != "doubling":
        return list(config.hidden)
    assert config.layers is not None
    return [inputs * 2**depth for depth in range(1, config.layers)]
