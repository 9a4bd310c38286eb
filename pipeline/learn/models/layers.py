"""What the built-in models are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import nn

from pipeline.job import CnnConfig, MlpConfig

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
    """Linear layers from `widths[0]` inputs through the other widths to `outputs`, with what `spec` puts between."""
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(widths):
        layers.append(nn.Linear(inputs, width))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[config.activation]())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
    return [*layers, nn.Linear(widths[-1], outputs)]
