"""The number of multiply-adds of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pipeline.models.ensemble import EnsembleLinear, MemberLinear
from pipeline.models.numeric_embedding import PeriodicEmbedding


def count_multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Count the multiply-adds of a forward pass of one sample.

    Linear layers and convolutions count for each application, those of an ensemble for each member; other weight
    matrices once. Embeddings of categories are lookups and do not count.

    Parameters
    ----------
    model: on the CPU in float32.
    input_shape: of one preprocessed sample.
    """
    count = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        if isinstance(module, nn.Linear | EnsembleLinear | MemberLinear):
            count += output.numel() * module.in_features
        elif isinstance(module, PeriodicEmbedding | _ConvTransposeNd):
            count += inputs[0].numel() * module.weight[0].numel()
        elif isinstance(module, _ConvNd):
            count += output.numel() * module.weight[0].numel()

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear | EnsembleLinear | MemberLinear | PeriodicEmbedding | _ConvNd):
            handles.append(module.register_forward_hook(add))
        elif not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            count += sum(weight.numel() for weight in _direct_weight_matrices(module))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(torch.zeros(1, *input_shape))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return count


def _direct_weight_matrices(module: nn.Module) -> list[Tensor]:
    return [weight for weight in module.parameters(recurse=False) if weight.ndim > 1]
