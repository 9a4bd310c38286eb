"""Update rules on flat vectors: torch's own fused kernels, each called once a step instead of once a layer.

They are called without `torch.optim`, whose bookkeeping for each call takes longer than a small model's update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from torch import Tensor

from pipeline import job as spec
from pipeline.learn.models.freezing import matching


class Optimizer:
    """SGD, Adam or AdamW as torch defines them, over one flat vector of parameters.

    state: what a checkpoint needs: momentum (P,), or exp_avg (P,), exp_avg_sq (P,) and step (scalar, float32).

    Parameters
    ----------
    values: (P,) the parameters, changed in place.
    sizes: how many numbers of `values` each parameter has, by name and in order; needed for `rule.groups` alone.

    Raises
    ------
    JobError: a group that matches no parameter.
    """

    def __init__(self, rule: spec.Optimizer, values: Tensor, sizes: Mapping[str, int] | None = None) -> None:
        self._rule = rule
        self._values = values
        self._groups = _groups(rule, sizes or {})
        names = (["momentum"] if rule.momentum else []) if rule.kind == "sgd" else ["exp_avg", "exp_avg_sq"]
        self.state = {name: torch.zeros_like(values) for name in names}
        if rule.kind != "sgd":
            self.state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)

    def update(self, gradient: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        """Change the parameters in place.

        gradient: (P,) of the loss's mean over the global batch.
        found_inf: scalar on the device; 1 skips this update without the host having to know.
        """
        if self._rule.kind != "sgd":
            self.state["step"].add_(1)
        kernel = self._sgd if self._rule.kind == "sgd" else self._adam
        for group in self._groups:
            kernel(group, gradient, lr * group.lr_factor, found_inf)
        if self._rule.kind != "sgd" and found_inf is not None:
            self.state["step"].sub_(found_inf)

    def reset(self) -> None:
        """Forget momentum and moments."""
        for vector in self.state.values():
            vector.zero_()

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a copy of `state`."""
        for name, vector in self.state.items():
            vector.copy_(state[name])

    def _sgd(self, group: _Group, gradient: Tensor, lr: float, found_inf: Tensor | None) -> None:
        torch._fused_sgd_(
            group.of(self._values),
            group.of(gradient),
            group.of(self.state["momentum"]) if self._rule.momentum else [],
            weight_decay=group.weight_decay,
            momentum=self._rule.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self._rule.nesterov,
            maximize=False,
            is_first_step=False,  # a momentum of zeros gives the same first step
            found_inf=found_inf,
        )

    def _adam(self, group: _Group, gradient: Tensor, lr: float, found_inf: Tensor | None) -> None:
        values = group.of(self._values)
        kernel = torch._fused_adam_ if self._rule.kind == "adam" else torch._fused_adamw_
        kernel(
            values,
            group.of(gradient),
            group.of(self.state["exp_avg"]),
            group.of(self.state["exp_avg_sq"]),
            [],
            [self.state["step"]] * len(values),
            lr=lr,
            beta1=self._rule.betas[0],
            beta2=self._rule.betas[1],
            weight_decay=group.weight_decay,
            eps=self._rule.eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )


@dataclass(frozen=True)
class _Group:
    """Parameters that share a rate and a decay.

    slices: where they lie in the flat vectors, neighbours as one; None for all.
    """

    lr_factor: float
    weight_decay: float
    slices: tuple[slice, ...] | None = None

    def of(self, vector: Tensor) -> list[Tensor]:
        """This group's parts of a vector (P,), as views."""
        return [vector] if self.slices is None else [vector[part] for part in self.slices]


def _groups(rule: spec.Optimizer, sizes: Mapping[str, int]) -> list[_Group]:
    """The rule's groups and, last, what is in none of them; without groups all as one."""
    if not rule.groups:
        return [_Group(1.0, rule.weight_decay)]
    for number, group in enumerate(rule.groups):
        matching(group.match, sizes, f"train.optimizer.groups.{number}.match")
    rest = len(rule.groups)
    slices: list[list[slice]] = [[] for _ in range(rest + 1)]
    begin = 0
    for number, names in groupby(sizes, lambda name: _first_match(name, rule.groups)):
        end = begin + sum(sizes[name] for name in names)
        slices[number].append(slice(begin, end))
        begin = end
    rates = [
        (group.lr_factor, rule.weight_decay if group.weight_decay is None else group.weight_decay)
        for group in rule.groups
    ]
    return [
        _Group(factor, decay, tuple(parts))
        for (factor, decay), parts in zip([*rates, (1.0, rule.weight_decay)], slices, strict=True)
        if parts
    ]


def _first_match(name: str, groups: list[spec.Group]) -> int:
    """Number of the first group that a parameter belongs to; `len(groups)` for none."""
    return next((number for number, group in enumerate(groups) if fnmatchcase(name, group.match)), len(groups))
