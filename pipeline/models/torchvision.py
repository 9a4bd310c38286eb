"""`kind: torchvision:NAME`: torchvision's classification models and their pretrained weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import TorchvisionModelConfig
from pipeline.errors import JobError

AUXILIARY_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Models with an auxiliary head that torchvision uses in training only, and the prefixes of its tensors: left out."""

OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)")
"""Names in the published DenseNet weights, which torchvision renames on loading: norm.1.weight to norm1.weight."""

RESERVED_ARGS = ("num_classes", "weights", "progress")


def build_torchvision_model(config: TorchvisionModelConfig, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build the untrained model with `outputs` classes, initialized by torchvision.

    If images do not have 3 channels, its first convolution is replaced; pretrained weights then do not fit.

    Raises
    ------
    JobError: there is no such model, it does not take the arguments, or the weights do not fit the channels.
    """
    name, where = _model_name(config), f"model.kind: {config.kind}"
    from torchvision import models

    for argument in RESERVED_ARGS:
        if argument in config.args:
            fix = "leave it out: " + ("see model.weights" if argument != "num_classes" else "the task determines it")
            raise JobError(f"{argument} cannot be an argument", where=f"model.args.{argument}", fix=fix)
    channels = input_shape[0]
    if channels != 3 and config.weights is not None:
        raise JobError(
            f"the weights are for images of 3 channels, but these have {channels}",
            where="model.weights",
            fix="set data.mode: rgb, or leave the weights out",
        )
    args = dict(config.args)
    if name in AUXILIARY_HEADS:
        # With weights, torchvision maps inputs normalized by ImageNet's statistics to those of these two models.
        pretrained = config.weights is not None
        args = {"aux_logits": False, "transform_input": pretrained, "init_weights": not pretrained, **args}
        if args["aux_logits"]:
            fix = "leave it out"
            raise JobError("an auxiliary head returns a second output", where="model.args.aux_logits", fix=fix)
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=outputs, **args)
    except Exception as error:  # torchvision checks its arguments in many ways
        raise JobError(f"{type(error).__name__}: {error}", where=where, fix="see model.args") from None
    if channels != 3:
        _replace_first_conv(model, channels)
    return model


def load_pretrained(config: TorchvisionModelConfig) -> tuple[dict[str, Tensor], str]:
    """Return the pretrained weights of `config.weights`, and a name for messages.

    The weights are CPU tensors by the names of the model's tensors. If they are not a file, they are downloaded into
    torch's cache.

    Raises
    ------
    JobError: there are no such weights, they cannot be downloaded, or the file cannot be read.
    """
    name, where = _model_name(config), f"model.weights: {config.weights}"
    assert config.weights is not None
    from torchvision import models

    weights_enum = models.get_model_weights(name)
    if config.weights in weights_enum.__members__:
        member = weights_enum[config.weights]
        try:
            tensors = member.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # no network, a wrong hash, or a damaged file in the cache
            raise JobError(
                f"cannot be downloaded from {member.url}: {error}",
                where=where,
                fix="download the file on a machine with network access, and set model.weights to its path",
            ) from None
        return _normalize_keys(tensors, name), f"torchvision's {member}"
    path = Path(config.weights).expanduser()
    if not path.is_file():
        names = list(weights_enum.__members__)
        close_matches = difflib.get_close_matches(config.weights, names, n=1)
        hint = f"did you mean {close_matches[0]}? " if close_matches else ""
        raise JobError(
            f"neither a file nor weights of {name}", where=where, fix=f"{hint}torchvision has {', '.join(names)}"
        )
    return _normalize_keys(_read_state_dict(path, where), name), str(path)


def _model_name(config: TorchvisionModelConfig) -> str:
    """Return the torchvision name of the model.

    Raises
    ------
    JobError: torchvision has no such classification model.
    """
    from torchvision import models

    name = config.kind.partition(":")[2]
    known = models.list_models(module=models)
    if name not in known:
        suggestions = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
        raise JobError(
            f"torchvision has no classification model {name!r}",
            where=f"model.kind: {config.kind}",
            fix=f"use {', '.join(suggestions)}, or one of torchvision.models.list_models(module=torchvision.models)",
        )
    return name


def _replace_first_conv(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one with another number of input channels, initialized by torch."""
    name, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, attribute = name.rpartition(".")
    sizes: dict[str, Any] = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    replacement = nn.Conv2d(channels, first.out_channels, **sizes, bias=first.bias is not None)
    setattr(model.get_submodule(parent), attribute, replacement)


def _read_state_dict(path: Path, where: str) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors or .pth file, without running code from the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        text = str(error).partition("\n")[0]
        raise JobError(
            f"cannot be read: {text}", where=where, fix="use a file of a state dict: torch.save(model.state_dict())"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise JobError("is not a state dict", where=where, fix="save only model.state_dict(): names and tensors")
    return dict(tensors)


def _normalize_keys(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Drop the tensors of auxiliary heads, and rename those of published DenseNet weights."""
    left_out = AUXILIARY_HEADS.get(name, ())
    kept = {key: value for key, value in tensors.items() if not key.startswith(left_out)} if left_out else dict(tensors)
    if name.startswith("densenet"):
        kept = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in kept.items()}
    return kept
