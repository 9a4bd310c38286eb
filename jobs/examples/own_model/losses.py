"""A loss: a function of outputs (B, K) and targets that returns one loss per sample, (B,)."""

import torch
from torch.nn import functional as F  # noqa: N812


def focal(outputs: torch.Tensor, targets: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Return the focal loss: binary cross-entropy with less weight on well-classified samples (Lin et al. 2017,
    arXiv:1708.02002)."""
    cross_entropy = F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
    return (1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy
