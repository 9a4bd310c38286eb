"""Embeddings of numbers: several trained functions of each number of a table, beside the number itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NUM_FREQUENCIES = 16
FREQUENCY_STD = 0.1
EMBEDDING_DIM = 4
"""The dimensions of RealMLP's embedding: 16 cosines and 3 values of them, beside the number."""


class PeriodicEmbedding(nn.Module):
    """Periodic embedding with bias, linear map and the raw value (PBLD, section 3 of RealMLP, arXiv 2407.04491).

        (x_1, ..., x_n) -> (x_1, e_1, ..., x_n, e_n),  e_i = W_i cos(2 pi f_i x_i + p_i) + b_i

    with 16 frequencies f_i, phases p_i and 3 values e_i of each number; all are trained. Initially f is normal with
    standard deviation 0.1, p is uniform from -pi to pi, and W and b are uniform from -1/4 to 1/4, as those of a linear
    layer with 16 inputs.

    Numbers (B, n) of a standard deviation near 1, to (B, 4 n), in the dtype of the numbers.

    frequencies, phases: (n, 16). weight: (n, 3, 16). bias: (n, 3).
    """

    undecayed = ("frequencies", "phases", "bias")
    """Parameters without weight decay, see `find_weight_matrices`."""

    def __init__(self, num_numbers: int) -> None:
        super().__init__()
        bound = NUM_FREQUENCIES**-0.5
        self.frequencies = nn.Parameter(FREQUENCY_STD * torch.randn(num_numbers, NUM_FREQUENCIES))
        self.phases = nn.Parameter(math.pi * (2 * torch.rand(num_numbers, NUM_FREQUENCIES) - 1))
        self.weight = nn.Parameter(bound * (2 * torch.rand(num_numbers, EMBEDDING_DIM - 1, NUM_FREQUENCIES) - 1))
        self.bias = nn.Parameter(bound * (2 * torch.rand(num_numbers, EMBEDDING_DIM - 1) - 1))

    def forward(self, numbers: Tensor) -> Tensor:
        by_number = numbers.t().unsqueeze(1)  # (n, 1, B): adjacent in memory are the rows, which are many
        angles = torch.addcmul(self.phases.unsqueeze(2), 2 * math.pi * self.frequencies.unsqueeze(2), by_number)
        values = torch.baddbmm(self.bias.unsqueeze(2), self.weight, angles.cos())  # (n, 3, B)
        return torch.cat([by_number, values.to(numbers.dtype)], 1).permute(2, 0, 1).flatten(1)
