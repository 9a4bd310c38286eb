"""A model: an nn.Module. `input_shape` and `outputs` are passed if the signature has them."""

import torch
from torch import nn


class Fourier(nn.Module):
    """Sine features of the inputs, then two layers: (B, ...) to (B, outputs)."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 32) -> None:
        super().__init__()
        self.waves = nn.Linear(input_shape[0], width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        waves = torch.sin(6.0 * self.waves(points))
        return self.head(torch.relu(self.hidden(waves)))
