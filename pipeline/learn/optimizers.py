"""Update rules on flat vectors: torch's own fused kernels, each called once a step instead of once a layer.

They are called without `torch.optim`, whose bookkeeping for each call takes longer than a small model's update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline import job as spec


class Optimizer:
    """SGD, Adam or AdamW as torch defines them, over one flat vector of parameters.

    state: what a checkpoint needs: momentum (P,), or exp_avg (P,), exp_avg_sq (P,) and step (scalar, float32).
    """

    def __init__(self, rule: spec.Optimizer, values: Tensor) -> None:
        self._rule = rule
        self._values = values
        names = (["momentum"] if rule.momentum else []) if rule.kind == "sgd" else ["exp_avg", "exp_avg_sq"]
        self.state = {name: torch.zeros_like(values) for name in names}
        if rule.kind != "sgd":
            self.state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)

    def update(self, gradient: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        """Change the parameters in place.

        gradient: (P,) of the loss's mean over the global batch.
        found_inf: scalar on the device; 1 skips this update without the host having to know.
        """
        if self._rule.kind == "sgd":
            self._sgd(gradient, lr, found_inf)
        else:
            self._adam(gradient, lr, found_inf)

    def reset(self) -> None:
        """Forget momentum and moments."""
        for vector in self.state.values():
            vector.zero_()

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a copy of `state`."""
        for name, vector in self.state.items():
            vector.copy_(state[name])

    def _sgd(self, gradient: Tensor, lr: float, found_inf: Tensor | None) -> None:
        torch._fused_sgd_(
            [self._values],
            [gradient],
            list(self.state.values()),
            weight_decay=self._rule.weight_decay,
            momentum=self._rule.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self._rule.nesterov,
            maximize=False,
            is_first_step=False,  # a momentum of zeros gives the same first step
            found_inf=found_inf,
        )

    def _adam(self, gradient: Tensor, lr: float, found_inf: Tensor | None) -> None:
        step = self.state["step"].add_(1)
        kernel = torch._fused_adam_ if self._rule.kind == "adam" else torch._fused_adamw_
        kernel(
            [self._values],
            [gradient],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [step],
            lr=lr,
            beta1=self._rule.betas[0],
            beta2=self._rule.betas[1],
            weight_decay=self._rule.weight_decay,
            eps=self._rule.eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
        if found_inf is not None:
            step.sub_(found_inf)
