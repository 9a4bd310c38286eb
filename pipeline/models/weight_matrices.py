"""Which parameters are weight matrices: those that weight decay is for."""

from __future__ import annotations

from torch import nn


def find_weight_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weight matrices: those of linear layers, convolutions and embeddings of categories.

    They are the parameters with two or more axes, except biases and those that a module lists in `undecayed`. So
    normalizations, and with a class attribute `undecayed` other parameters of custom modules, are none.
    """
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and name != "bias" and name not in getattr(module, "undecayed", ())
    }
