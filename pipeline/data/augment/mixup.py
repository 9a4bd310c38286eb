"""Mixup: each sample and its target, mixed with another's of the global batch (Zhang et al. 2018, arXiv:1710.09412)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment.sampling import copy_to_device_async, sample_mixup_permutation
from pipeline.data.augment.transforms import to_float


def required_positions(seed: int, step: int, num_rows: int, local_slice: slice) -> np.ndarray:
    """Positions in a global batch of so many rows that mixing a rank's share takes: int64 (b + e,).

    The share itself, then those of its partners that are not in it, ascending.
    """
    local_positions = np.arange(local_slice.start, local_slice.stop, dtype=np.int64)
    return np.concatenate(
        [local_positions, np.setdiff1d(sample_mixup_permutation(seed, step, num_rows)[local_slice], local_positions)]
    )


@dataclass(frozen=True, eq=False)
class MixupParams:
    """How a share of b samples is mixed out of the b + e that it takes.

    partners: where each one's partner lies among them, int64 (b,). shares: what each keeps of itself, float32 (b,).
    """

    partner_indices: Tensor
    lam: Tensor

    @classmethod
    def from_batch(
        cls, positions: np.ndarray, local_slice: slice, partners: np.ndarray, lam: np.ndarray
    ) -> MixupParams:
        """From what `needed` gave, and the partners and shares of the whole batch."""
        order = np.argsort(positions)
        partner_indices = order[np.searchsorted(positions, partners[local_slice], sorter=order)]
        return cls(torch.from_numpy(partner_indices), torch.from_numpy(lam[local_slice].astype(np.float32)))

    def to(self, device: torch.device) -> MixupParams:
        """On a device; the host does not wait for the copy."""
        return MixupParams(copy_to_device_async(self.partner_indices, device), copy_to_device_async(self.lam, device))

    def mix_images(self, images: Tensor) -> Tensor:
        """(b + e, ...) of raw values to (b, ...), floating."""
        return self._mix(to_float(images))

    def mix_targets(self, targets: Tensor, classes: int) -> Tensor:
        """Labels, int64 (b + e,), to probabilities of the classes, float32 (b, classes); numbers stay numbers."""
        if not targets.is_floating_point():
            targets = (targets[:, None] == torch.arange(classes, device=targets.device)).float()
        return self._mix(targets)

    def _mix(self, values: Tensor) -> Tensor:
        lam = self.lam.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        return lam * values[: len(self.partner_indices)] + (1 - lam) * values[self.partner_indices]
