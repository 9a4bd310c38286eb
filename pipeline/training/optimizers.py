"""Loss scaling for fp16, kept on the device: no step waits to learn whether its gradient overflowed.

The method and its constants are those of torch.amp.GradScaler (Micikevicius et al., Mixed Precision Training).

Update rules on flat vectors: torch's own fused kernels, each called once a step instead of once a layer.

They are called without `torch.optim`, whose bookkeeping for each call takes longer than a small model's update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from torch import Tensor

from pipeline import config as spec
from pipeline.models.freezing import match_names

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

    def __init__(
        self, config: spec.OptimizerConfig, params: Tensor, param_sizes: Mapping[str, int] | None = None
    ) -> None:
        self._config = config
        self._params = params
        self._groups = _make_param_groups(config, param_sizes or {})
        names = (["momentum"] if config.momentum else []) if config.kind == "sgd" else ["exp_avg", "exp_avg_sq"]
        self.state = {name: torch.zeros_like(params) for name in names}
        if config.kind != "sgd":
            self.state["step"] = torch.zeros((), dtype=torch.float32, device=params.device)

    def step(self, grad: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        """Change the parameters in place.

        gradient: (P,) of the loss's mean over the global batch.
        found_inf: scalar on the device; 1 skips this update without the host having to know.
        """
        if self._config.kind != "sgd":
            self.state["step"].add_(1)
        kernel = self._sgd if self._config.kind == "sgd" else self._adam
        for group in self._groups:
            kernel(group, grad, lr * group.lr_factor, found_inf)
        if self._config.kind != "sgd" and found_inf is not None:
            self.state["step"].sub_(found_inf)

    def reset_state(self) -> None:
        """Forget momentum and moments."""
        for vector in self.state.values():
            vector.zero_()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a copy of `state`."""
        for name, vector in self.state.items():
            vector.copy_(state[name])

    def _sgd(self, group: _ParamGroup, gradient: Tensor, lr: float, found_inf: Tensor | None) -> None:
        torch._fused_sgd_(
            group.views_into(self._params),
            group.views_into(gradient),
            group.views_into(self.state["momentum"]) if self._config.momentum else [],
            weight_decay=group.weight_decay,
            momentum=self._config.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self._config.nesterov,
            maximize=False,
            is_first_step=False,  # a momentum of zeros gives the same first step
            found_inf=found_inf,
        )

    def _adam(self, group: _ParamGroup, gradient: Tensor, lr: float, found_inf: Tensor | None) -> None:
        values = group.views_into(self._params)
        kernel = torch._fused_adam_ if self._config.kind == "adam" else torch._fused_adamw_
        kernel(
            values,
            group.views_into(gradient),
            group.views_into(self.state["exp_avg"]),
            group.views_into(self.state["exp_avg_sq"]),
            [],
            [self.state["step"]] * len(values),
            lr=lr,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            weight_decay=group.weight_decay,
            eps=self._config.eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )


@dataclass(frozen=True)
class _ParamGroup:
    """Parameters that share a rate and a decay.

    slices: where they lie in the flat vectors, neighbours as one; None for all.
    """

    lr_factor: float
    weight_decay: float
    slices: tuple[slice, ...] | None = None

    def views_into(self, vector: Tensor) -> list[Tensor]:
        """This group's parts of a vector (P,), as views."""
        return [vector] if self.slices is None else [vector[part] for part in self.slices]


def _make_param_groups(config: spec.OptimizerConfig, param_sizes: Mapping[str, int]) -> list[_ParamGroup]:
    """The rule's groups and, last, what is in none of them; without groups all as one."""
    if not config.groups:
        return [_ParamGroup(1.0, config.weight_decay)]
    for number, group in enumerate(config.groups):
        match_names(group.match, param_sizes, f"train.optimizer.groups.{number}.match")
    rest = len(config.groups)
    slices: list[list[slice]] = [[] for _ in range(rest + 1)]
    begin = 0
    for number, names in groupby(param_sizes, lambda name: _first_matching_group(name, config.groups)):
        end = begin + sum(param_sizes[name] for name in names)
        slices[number].append(slice(begin, end))
        begin = end
    rates = [
        (group.lr_factor, config.weight_decay if group.weight_decay is None else group.weight_decay)
        for group in config.groups
    ]
    return [
        _ParamGroup(factor, decay, tuple(parts))
        for (factor, decay), parts in zip([*rates, (1.0, config.weight_decay)], slices, strict=True)
        if parts
    ]


def _first_matching_group(name: str, groups: list[spec.ParamGroupConfig]) -> int:
    """Number of the first group that a parameter belongs to; `len(groups)` for none."""
    return next((number for number, group in enumerate(groups) if fnmatchcase(name, group.match)), len(groups))
