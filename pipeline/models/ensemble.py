"""Ensembles of networks that share most of their weights, as in TabM (arXiv 2410.24210) and BatchEnsemble (2002.06715).

A layer of the ensemble computes, for member k with its own scale vectors r_k and s_k and its own bias b_k,

    y_k = (W (r_k * x_k)) * s_k + b_k

with one matrix W for all members: this equals a linear layer with the weights diag(s_k) W diag(r_k). The output layers
are separate. Each member has a loss of its own, on batches of its own. The layers take (K, B, width): the B rows of the
first of K members, then those of the next; one product with W is for all of them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Averaging = Literal["softmax", "sigmoid", "mean"]
"""How the outputs of the members become one prediction: softmax: the mean of the probabilities of classes; sigmoid: the
mean of the probabilities of each output; mean: the mean of each output."""


DROPOUT_LEVELS = 2**16
"""Number of dropout's probabilities."""


class EnsembleLinear(nn.Module):
    """A linear layer of all members with one shared weight matrix: (K, B, in) to (K, B, out).

    Weights and biases are initially those of `nn.Linear`, and the biases of all members are equal. The scale vectors
    are ones; TabM draws those before the first layer, which alone makes the members differ.

    weight: (out, in), shared. r, s: (K, in) and (K, out), scales before and after the product. bias: (K, out).
    """

    undecayed = ("r", "s", "bias")
    """Parameters without weight decay, see `find_weight_matrices`."""

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        bound = in_features**-0.5
        self.weight = nn.Parameter(bound * (2 * torch.rand(out_features, in_features) - 1))
        self.r = nn.Parameter(torch.ones(members, in_features))
        self.s = nn.Parameter(torch.ones(members, out_features))
        self.bias = nn.Parameter((bound * (2 * torch.rand(out_features) - 1)).repeat(members, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:  # many rows for each member: scaled weights are fewer than scaled values
            weight = self.s.unsqueeze(2) * self.weight * self.r.unsqueeze(1)
            return torch.baddbmm(self.bias.unsqueeze(1), inputs, weight.transpose(1, 2))
        products = nn.functional.linear(inputs * self.r.unsqueeze(1), self.weight)
        return torch.addcmul(self.bias.unsqueeze(1), products, self.s.unsqueeze(1))


class MemberLinear(nn.Module):
    """A separate linear layer for each member: (K, B, in) to (K, B, out). Initially each is an `nn.Linear`.

    weight: (K, out, in). bias: (K, out).
    """

    undecayed = ("bias",)
    """Parameters without weight decay, see `find_weight_matrices`."""

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        bound = in_features**-0.5
        self.weight = nn.Parameter(bound * (2 * torch.rand(members, out_features, in_features) - 1))
        self.bias = nn.Parameter(bound * (2 * torch.rand(members, out_features) - 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), inputs, self.weight.transpose(1, 2))


class MemberBatchNorm(nn.BatchNorm1d):
    """Batch normalization with separate statistics, scales and shifts for each member: (K, B, width) to the same."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__(members * width)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        members, rows, width = input.shape
        return super().forward(input.transpose(0, 1).flatten(1)).view(rows, members, width).transpose(0, 1)


class MemberDropout(nn.Module):
    """Dropout by 16 random bits for each value, several times as fast as `nn.Dropout` on a CPU.

    probability: that a value becomes 0, rounded to a multiple of 2^-16. The others are divided by one minus it.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self._threshold = min(round(probability * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)
        self.scale = DROPOUT_LEVELS / (DROPOUT_LEVELS - self._threshold)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.draw_mask(inputs) * self.scale if self.training else inputs

    def draw_mask(self, like: Tensor) -> Tensor:
        """Draw the next mask from torch's generator: int16 of the shape of a tensor, 1 for what is kept, else 0."""
        count = like.numel()
        bits = torch.randint(-(2**63), 2**63 - 1, (-(-count // 4),), dtype=torch.int64, device=like.device)
        return bits.view(torch.int16)[:count].view(like.shape).ge_(self._threshold - DROPOUT_LEVELS // 2)


def draw_first_scales(kind: Literal["signs", "normal"], widths: list[int], members: int) -> Tensor:
    """Draw the scales of the members before the first layer: (K, sum of widths).

    TabM draws them from {-1, 1}, or from the standard normal distribution if numbers are embedded, and gives all values
    of an embedding the same scale.

    Parameters
    ----------
    widths: number of adjacent inputs that have the same scale.
    """
    shape = (members, len(widths))
    drawn = torch.randn(shape) if kind == "normal" else 2.0 * torch.randint(0, 2, shape) - 1
    return torch.cat([drawn[:, [index]].expand(-1, width) for index, width in enumerate(widths)], 1)


def average_outputs(outputs: Tensor, averaging: Averaging) -> Tensor:
    """Return one prediction of all members, in the form of a single network's outputs: (N, K, O) to (N, O).

    softmax: the logarithms of the mean probabilities, whose softmax are these. sigmoid: the logits of the mean
    probabilities. mean: the mean outputs. In at least float32.
    """
    outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if averaging == "mean":
        return outputs.mean(1)
    log_members = math.log(outputs.shape[1])
    if averaging == "softmax":
        return outputs.log_softmax(-1).logsumexp(1) - log_members
    return nn.functional.logsigmoid(outputs).logsumexp(1) - nn.functional.logsigmoid(-outputs).logsumexp(1)


def compute_disagreement(outputs: Tensor, averaging: Averaging) -> Tensor:
    """Return how much the members disagree on each row, at least 0, and 0 if all outputs are equal.

    softmax: the mutual information of class and member, (N, 1): the entropy of the mean probabilities minus the mean
    entropy of the members' probabilities, in nats, at most ln(min(classes, K)) (Houlsby et al., arXiv 1112.5745, for
    ensembles Malinin et al., arXiv 2006.10562). It is computed as the mean Kullback-Leibler divergence of a member from
    the mean, which is the same. sigmoid: the same for each output, (N, O). mean: the standard deviation of the outputs
    over the members, (N, O) (Lakshminarayanan et al., arXiv 1612.01474).

    Parameters
    ----------
    outputs: (N, K, O), of all members.
    """
    if averaging == "mean":
        return outputs.std(1, correction=0)
    if averaging == "sigmoid":
        logs = torch.stack([nn.functional.logsigmoid(outputs), nn.functional.logsigmoid(-outputs)], -1)
        return _mean_divergence(logs)
    return _mean_divergence(outputs.log_softmax(-1)).unsqueeze(1)


def _mean_divergence(log_probabilities: Tensor) -> Tensor:
    """Return the mean divergence of the members from their mean: log-probabilities (N, K, ..., C) to (N, ...)."""
    mean = log_probabilities.logsumexp(1, keepdim=True) - math.log(log_probabilities.shape[1])
    divergence = (log_probabilities.exp() * (log_probabilities - mean)).sum(-1).mean(1)
    return divergence.clamp_min(0)
