"""Mixup: each sample and its target are mixed with another of the batch (Zhang et al. 2018, arXiv:1710.09412)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment.sampling import copy_to_device_async, sample_mixup_permutation
from pipeline.data.augment.transforms import to_float


def required_positions(seed: int, step: int, num_rows: int, local_slice: slice) -> np.ndarray:
    """Return the positions in a global batch of `num_rows` samples that mixing a rank's share needs: int64 (b + e,).

    First the share, then those of its partners that are not in it, ascending.
    """
    local_positions = np.arange(local_slice.start, local_slice.stop, dtype=np.int64)
    return np.concatenate(
        [local_positions, np.setdiff1d(sample_mixup_permutation(seed, step, num_rows)[local_slice], local_positions)]
    )


@dataclass(frozen=True, eq=False)
class MixupParams:
    """How a share of b samples is mixed from the b + e samples that it needs.

    partner_indices: the index of each sample's partner among them, int64 (b,).
    lam: the weight of the sample itself, float32 (b,); its partner has 1 - lam.
    """

    partner_indices: Tensor
    lam: Tensor

    @classmethod
    def from_batch(
        cls, positions: np.ndarray, local_slice: slice, partners: np.ndarray, lam: np.ndarray
    ) -> MixupParams:
        """Return the parameters of a rank's share.

        positions: as from `required_positions`. partners, lam: of the whole global batch, as from
        `sample_mixup_permutation` and `sample_mixup_lambda`.
        """
        order = np.argsort(positions)
        partner_indices = order[np.searchsorted(positions, partners[local_slice], sorter=order)]
        return cls(torch.from_numpy(partner_indices), torch.from_numpy(lam[local_slice].astype(np.float32)))

    def to(self, device: torch.device) -> MixupParams:
        """Copy to a device; the host does not wait for the copy."""
        return MixupParams(copy_to_device_async(self.partner_indices, device), copy_to_device_async(self.lam, device))

    def mix_images(self, images: Tensor) -> Tensor:
        """Mix raw values (b + e, ...) to floating-point (b, ...)."""
        return self._mix(to_float(images))

    def mix_targets(self, targets: Tensor, num_classes: int) -> Tensor:
        """Mix labels, int64 (b + e,), to probabilities of the classes, float32 (b, num_classes); or floating-point
        targets (b + e, ...) to (b, ...)."""
        if not targets.is_floating_point():
            targets = (targets[:, None] == torch.arange(num_classes, device=targets.device)).float()
        return self._mix(targets)

    def _mix(self, values: Tensor) -> Tensor:
        lam = self.lam.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        return lam * values[: len(self.partner_indices)] + (1 - lam) * values[self.partner_indices]
