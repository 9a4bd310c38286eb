"""A loss: (outputs (B, K), targets) to one number a sample, (B,)."""

import torch
from torch.nn import functional as F  # noqa: N812


def focal(outputs: torch.Tensor, targets: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Binary cross-entropy that dwells on what is still wrong (Lin et al. 2017, arXiv:1708.02002)."""
    plain = F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
    return (1 - torch.exp(-plain)) ** gamma * plain
