"""Mixup: each sample and its target, mixed with another's of the global batch (Zhang et al. 2018, arXiv:1710.09412)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment.changes import as_floats
from pipeline.data.augment.drawing import draw_partners, sent


def needed(seed: int, step: int, rows: int, mine: slice) -> np.ndarray:
    """Positions in a global batch of so many rows that mixing a rank's share takes: int64 (b + e,).

    The share itself, then those of its partners that are not in it, ascending.
    """
    local_positions = np.arange(mine.start, mine.stop, dtype=np.int64)
    return np.concatenate([local_positions, np.setdiff1d(draw_partners(seed, step, rows)[mine], local_positions)])


@dataclass(frozen=True, eq=False)
class Mix:
    """How a share of b samples is mixed out of the b + e that it takes.

    partners: where each one's partner lies among them, int64 (b,). shares: what each keeps of itself, float32 (b,).
    """

    partners: Tensor
    shares: Tensor

    @classmethod
    def of(cls, positions: np.ndarray, mine: slice, partners: np.ndarray, shares: np.ndarray) -> Mix:
        """From what `needed` gave, and the partners and shares of the whole batch."""
        order = np.argsort(positions)
        partner_indices = order[np.searchsorted(positions, partners[mine], sorter=order)]
        return cls(torch.from_numpy(partner_indices), torch.from_numpy(shares[mine].astype(np.float32)))

    def to(self, device: torch.device) -> Mix:
        """On a device; the host does not wait for the copy."""
        return Mix(sent(self.partners, device), sent(self.shares, device))

    def images(self, images: Tensor) -> Tensor:
        """(b + e, ...) of raw values to (b, ...), floating."""
        return self._mixed(as_floats(images))

    def targets(self, targets: Tensor, classes: int) -> Tensor:
        """Labels, int64 (b + e,), to probabilities of the classes, float32 (b, classes); numbers stay numbers."""
        if not targets.is_floating_point():
            targets = (targets[:, None] == torch.arange(classes, device=targets.device)).float()
        return self._mixed(targets)

    def _mixed(self, values: Tensor) -> Tensor:
        lam = self.shares.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        return lam * values[: len(self.partners)] + (1 - lam) * values[self.partners]
