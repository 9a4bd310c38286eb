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

MIN_SCALE = 2.0**-14
"""Below this scale training has failed. It is fp16's smallest normal number: a gradient of 1 for an output, scaled by
less, already loses digits, so a smaller scale makes room for nothing. From the initial scale it is 31 skipped updates
away. (torch's scaler has no such limit; DeepSpeed's is 1, fairseq's 1e-4.)"""


class GradScaler:
    """state: factor (scalar float32), steps since it last changed (scalar int32), and updates skipped since the start
    of the run (scalar int64), on the device."""

    def __init__(self, device: torch.device) -> None:
        self.state = {
            "factor": torch.full((), INITIAL_SCALE, dtype=torch.float32, device=device),
            "good_steps": torch.zeros((), dtype=torch.int32, device=device),
            "skipped": torch.zeros((), dtype=torch.int64, device=device),
        }

    @property
    def scale(self) -> Tensor:
        return self.state["factor"]

    def found_inf(self, grad: Tensor) -> Tensor:
        """1 where any element is NaN or infinite, else 0: a float32 scalar on the device."""
        return (~torch.isfinite(grad).all()).float()

    def update(self, found_inf: Tensor) -> None:
        """Halve the scale and count the update as skipped after an overflow, double the scale after 2,000 steps without
        one."""
        self.state["skipped"].add_(found_inf.long())
        torch._amp_update_scale_(
            self.state["factor"], self.state["good_steps"], found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a copy of `state`. That of an earlier version has no count of skipped updates."""
        for name, tensor in self.state.items():
            if name in state or name != "skipped":
                tensor.copy_(state[name])
