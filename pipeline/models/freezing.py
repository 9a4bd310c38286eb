"""Parameters that are not trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import JobError

MAX_LISTED = 8


def freeze(model: nn.Module, patterns: str | Sequence[str]) -> None:
    """Take parameters out of training: they get no gradient and stay as they are.

    Parameters
    ----------
    spec: "backbone" for all but the parameters of `last_layer`, or names and patterns of parameters (`fnmatch`).

    Raises
    ------
    JobError: a pattern that matches nothing, or all is frozen.
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
            "every parameter of the model is frozen", where="model.freeze", fix="leave one that can be trained"
        )


def last_layer_names(model: nn.Module) -> list[str]:
    """Names of all tensors of the last module, in the order of `named_modules`, with parameters of its own: what turns
    features into outputs in all of torchvision's classification models and in nearly all others."""
    layers = [
        (name, module) for name, module in model.named_modules() if next(module.parameters(False), None) is not None
    ]
    name, module = layers[-1] if layers else ("", nn.Identity())
    return [f"{name}.{tensor_name}".lstrip(".") for tensor_name in module.state_dict()]


def match_names(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """Those names of parameters that a pattern matches.

    Raises
    ------
    JobError: none.
    """
    names = list(names)
    matches = [name for name in names if fnmatchcase(name, pattern)]
    if not matches:
        rest = f", ... ({len(names)} in all)" if len(names) > MAX_LISTED else ""
        raise JobError(
            f"{pattern!r} matches no parameter",
            where=where,
            fix=f"patterns are as a shell's; the parameters are {', '.join(names[:MAX_LISTED])}{rest}",
        )
    return matches


def find_frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Batch normalisations whose parameters are all frozen: their statistics stay too, as in evaluation."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.affine
        and not any(parameter.requires_grad for parameter in module.parameters(False))
    ]
