"""Frozen parameters: those that are not trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import JobError

MAX_LISTED = 8


def freeze(model: nn.Module, patterns: str | Sequence[str]) -> None:
    """Freeze parameters: they get no gradient and do not change.

    Parameters
    ----------
    patterns: "backbone" for all parameters except those of the last layer, or names and patterns (`fnmatch`).

    Raises
    ------
    JobError: a pattern matches nothing, or every parameter is frozen.
    """
    parameters = dict(model.named_parameters())
    if patterns == "backbone":
        frozen = parameters.keys() - set(last_layer_names(model))
    else:
        frozen = set(itertools.chain(*(match_names(pattern, parameters, "model.freeze") for pattern in patterns)))
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in parameters.values()):
        raise JobError(
            "every parameter of the model is frozen", where="model.freeze", fix="leave at least one trainable"
        )


def last_layer_names(model: nn.Module) -> list[str]:
    """Return the names of all tensors of the last module, in the order of `named_modules`, that has direct parameters.

    In all of torchvision's classification models and in nearly all others it maps features to outputs.
    """
    layers = [
        (name, module) for name, module in model.named_modules() if next(module.parameters(False), None) is not None
    ]
    name, module = layers[-1] if layers else ("", nn.Identity())
    return [f"{name}.{tensor_name}".lstrip(".") for tensor_name in module.state_dict()]


def match_names(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """Return the parameter names that a pattern matches.

    Raises
    ------
    JobError: none matches.
    """
    names = list(names)
    matches = [name for name in names if fnmatchcase(name, pattern)]
    if not matches:
        rest = f", ... ({len(names)} in all)" if len(names) > MAX_LISTED else ""
        raise JobError(
            f"{pattern!r} matches no parameter",
            where=where,
            fix=f"use shell-style patterns; the parameters are {', '.join(names[:MAX_LISTED])}{rest}",
        )
    return matches


def find_frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch normalizations whose parameters are all frozen: their statistics do not change either."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.affine
        and not any(parameter.requires_grad for parameter in module.parameters(False))
    ]
