"""What training hands over for a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.record.entries import BestCheckpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Snapshot:
    """All that a checkpoint holds besides rows. Tensors are copies on the CPU that the writer may keep."""

    step: int
    epoch: int
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    """What else training resumes from, such as the optimizer's momentum."""
    position: dict[str, Any]
    """Plain values for the worker that goes on from here."""
    metrics: dict[str, float]
    """Of the latest evaluation of each split, such as "val/loss"."""
    best: BestCheckpoint | None = None
    """The best evaluation so far; its `checkpoint` is for the writer to fill in."""
    best_weights: dict[str, Tensor] | None = None
    """Given where the best is neither of this step nor known from an earlier commit."""
    preprocess: dict[str, Any] | None = None
    is_final: bool = False
    """Training is over: at this step, for every later attempt too."""
    evaluations_since_best: int | None = None
    """Evaluations since the best one."""

    @property
    def skipped_updates(self) -> int | None:
        """For fp16: updates skipped since the start of the run, because their gradient was not finite."""
        count = self.state.get("scale.skipped")
        return None if count is None else int(count)

    def find_nonfinite_tensor(self) -> str | None:
        """Name of the first tensor of weights that holds NaN or infinity."""
        import torch

        for name, tensor in (*self.weights.items(), *(self.best_weights or {}).items()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return name
        return None
