"""Loss scaling for fp16, kept on the device: no step waits to learn whether its gradient overflowed.

The method and its constants are those of torch.amp.GradScaler (Micikevicius et al., Mixed Precision Training).
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_SCALE = 65536.0
GROWTH = 2.0
BACKOFF = 0.5
GROWTH_INTERVAL = 2000


class LossScale:
    """state: factor (scalar float32) and steps since it last changed (scalar int32), on the device."""

    def __init__(self, device: torch.device) -> None:
        self.state = {
            "factor": torch.full((), INITIAL_SCALE, dtype=torch.float32, device=device),
            "good_steps": torch.zeros((), dtype=torch.int32, device=device),
        }

    @property
    def factor(self) -> Tensor:
        return self.state["factor"]

    def found_inf(self, gradient: Tensor) -> Tensor:
        """1 where any element is NaN or infinite, else 0: a float32 scalar on the device."""
        return (~torch.isfinite(gradient).all()).float()

    def update(self, found_inf: Tensor) -> None:
        """Halve the scale after an overflow, double it after 2,000 steps without one."""
        torch._amp_update_scale_(
            self.state["factor"], self.state["good_steps"], found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL
        )

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
