"""Optimizers on flat parameter vectors, and loss scaling for fp16.

The updates are torch's fused kernels, called once per step instead of once per layer, and without `torch.optim`, whose
overhead per call exceeds the update of a small model. To add an optimizer, write its update function, add it to
`UPDATE_RULES`, and add its name to `OptimizerConfig.kind`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config import OptimizerConfig, ParamGroupConfig
from pipeline.models.freezing import match_names


class Optimizer:
    """SGD, Adam or AdamW as torch defines them, over one flat vector of parameters.

    Parameters
    ----------
    params: (P,) the parameters, updated in place.
    param_sizes: number of elements of each parameter, by name and in order; only needed for `config.groups` and
        `config.decay`.
    weight_matrices: names of the parameters that decay with `decay: weights`.

    Attributes
    ----------
    state: what a checkpoint needs: momentum (P,), or exp_avg (P,), exp_avg_sq (P,) and step (scalar, float32).

    Raises
    ------
    JobError: a group matches no parameter.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        params: Tensor,
        param_sizes: Mapping[str, int] | None = None,
        weight_matrices: Collection[str] = (),
    ) -> None:
        self._config = config
        self._params = params
        self._groups = _make_param_groups(config, param_sizes or {}, weight_matrices)
        self._rule = UPDATE_RULES[config.kind]
        self.state = {name: torch.zeros_like(params) for name in self._rule.moment_names(config)}
        if self._rule.counts_steps:
            self.state["step"] = torch.zeros((), dtype=torch.float32, device=params.device)
        moments = {name: tensor for name, tensor in self.state.items() if name != "step"}
        self._views = [
            (group.views_into(params), {name: group.views_into(tensor) for name, tensor in moments.items()})
            for group in self._groups
        ]
        self._grad_views: tuple[Tensor | None, list[list[Tensor]]] = (None, [])

    def step(self, grad: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grad: (P,) gradient of the mean loss over the global batch.
        found_inf: scalar on the device; 1 skips this update without a device sync.
        """
        if self._rule.counts_steps:
            self.state["step"].add_(1)
        if self._grad_views[0] is not grad:  # the same vector in every step of a run
            self._grad_views = (grad, [group.views_into(grad) for group in self._groups])
        for group, (params, moments), grads in zip(self._groups, self._views, self._grad_views[1], strict=True):
            self._rule.update(
                _GroupUpdate(
                    self._config,
                    params,
                    grads,
                    moments,
                    self.state.get("step"),
                    lr * group.lr_factor,
                    group.weight_decay,
                    found_inf,
                )
            )
        if self._rule.counts_steps and found_inf is not None:
            self.state["step"].sub_(found_inf)

    def reset_state(self) -> None:
        """Set momentum, moments and step count to zero."""
        for tensor in self.state.values():
            tensor.zero_()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a copy of `state`."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])


class _GroupUpdate(NamedTuple):
    """What the update of one parameter group takes: the group's views of the flat vectors, and its settings."""

    config: OptimizerConfig
    params: list[Tensor]
    grads: list[Tensor]
    moments: dict[str, list[Tensor]]
    step: Tensor | None
    lr: float
    weight_decay: float
    found_inf: Tensor | None


def _update_sgd(group: _GroupUpdate) -> None:
    torch._fused_sgd_(
        group.params,
        group.grads,
        group.moments.get("momentum", []),
        weight_decay=group.weight_decay,
        momentum=group.config.momentum,
        lr=group.lr,
        dampening=0.0,
        nesterov=group.config.nesterov,
        maximize=False,
        is_first_step=False,  # a momentum of zeros gives the same first step
        found_inf=group.found_inf,
    )


def _update_adam(group: _GroupUpdate, kernel: Callable[..., Any] = torch._fused_adam_) -> None:
    kernel(
        group.params,
        group.grads,
        group.moments["exp_avg"],
        group.moments["exp_avg_sq"],
        [],
        [group.step] * len(group.params),
        lr=group.lr,
        beta1=group.config.betas[0],
        beta2=group.config.betas[1],
        weight_decay=group.weight_decay,
        eps=group.config.eps,
        amsgrad=False,
        maximize=False,
        found_inf=group.found_inf,
    )


@dataclass(frozen=True)
class _UpdateRule:
    """One optimizer.

    update: updates the parameters of a group in place.
    moment_names: names of the vectors (P,) that it keeps between steps.
    counts_steps: whether it also keeps the number of updates, `state["step"]`.
    """

    update: Callable[[_GroupUpdate], None]
    moment_names: Callable[[OptimizerConfig], list[str]]
    counts_steps: bool


def _adam_moments(config: OptimizerConfig) -> list[str]:
    return ["exp_avg", "exp_avg_sq"]


UPDATE_RULES = {
    "sgd": _UpdateRule(_update_sgd, lambda config: ["momentum"] if config.momentum else [], counts_steps=False),
    "adam": _UpdateRule(_update_adam, _adam_moments, counts_steps=True),
    "adamw": _UpdateRule(partial(_update_adam, kernel=torch._fused_adamw_), _adam_moments, counts_steps=True),
}
"""By `OptimizerConfig.kind`."""


@dataclass(frozen=True)
class _ParamGroup:
    """Parameters with the same learning-rate factor and weight decay.

    slices: their positions in the flat vectors, adjacent parameters merged; None for all.
    """

    lr_factor: float
    weight_decay: float
    slices: tuple[slice, ...] | None = None

    def views_into(self, vector: Tensor) -> list[Tensor]:
        """Return this group's slices of a vector (P,), as views."""
        return [vector] if self.slices is None else [vector[positions] for positions in self.slices]


def _make_param_groups(
    config: OptimizerConfig, param_sizes: Mapping[str, int], weight_matrices: Collection[str]
) -> list[_ParamGroup]:
    """Return the job's groups and, last, the parameters in none of them, each divided into parameters that decay and
    parameters that do not; without groups and with `decay: all`, one group of all parameters."""
    decays_all = config.decay == "all"
    if not config.groups and decays_all:
        return [_ParamGroup(1.0, config.weight_decay)]
    for number, group in enumerate(config.groups):
        match_names(group.match, param_sizes, f"train.optimizer.groups.{number}.match")
    settings = [
        (group.lr_factor, config.weight_decay if group.weight_decay is None else group.weight_decay)
        for group in config.groups
    ]
    settings.append((1.0, config.weight_decay))
    slices: dict[tuple[int, bool], list[slice]] = {
        (number, decays): [] for number in range(len(settings)) for decays in (True, False)
    }
    begin = 0
    for key, names in groupby(
        param_sizes, lambda name: (_first_matching_group(name, config.groups), decays_all or name in weight_matrices)
    ):
        end = begin + sum(param_sizes[name] for name in names)
        slices[key].append(slice(begin, end))
        begin = end
    return [
        _ParamGroup(settings[number][0], settings[number][1] if decays else 0.0, tuple(group_slices))
        for (number, decays), group_slices in slices.items()
        if group_slices
    ]


def _first_matching_group(name: str, groups: list[ParamGroupConfig]) -> int:
    """Return the index of the first group whose pattern matches a parameter; `len(groups)` for none."""
    return next((number for number, group in enumerate(groups) if fnmatchcase(name, group.match)), len(groups))


INITIAL_SCALE = 65536.0
GROWTH = 2.0
BACKOFF = 0.5
GROWTH_INTERVAL = 2000

MIN_SCALE = 2.0**-14
"""Training fails below this scale, the smallest normal number of fp16: scaled by less, a gradient of 1 for an output
already loses digits, so a smaller scale gains no range. It takes 31 skipped updates from the initial scale. (torch's
scaler has no such limit; DeepSpeed's is 1, fairseq's 1e-4.)"""


class GradScaler:
    """Dynamic loss scaling for fp16, kept on the device: no step waits to find out whether its gradient overflowed.

    Method and constants are those of torch.amp.GradScaler (Micikevicius et al., Mixed Precision Training).

    Attributes
    ----------
    state: scalars on the device: `factor` (float32), `good_steps` since it last changed (int32), and updates `skipped`
        since the start of the run (int64).
    """

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
        """Return 1 if any element is NaN or infinite, else 0: a float32 scalar on the device."""
        return (~torch.isfinite(grad).all()).float()

    def update(self, found_inf: Tensor) -> None:
        """Halve the scale and count a skipped update after an overflow; double it after 2,000 steps without one."""
        self.state["skipped"].add_(found_inf.long())
        torch._amp_update_scale_(
            self.state["factor"], self.state["good_steps"], found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a copy of `state`. States written by earlier versions have no `skipped`."""
        for name, tensor in self.state.items():
            if name in state or name != "skipped":
                tensor.copy_(state[name])
