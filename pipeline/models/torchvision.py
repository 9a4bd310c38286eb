"""`kind: torchvision:NAME`: torchvision's classification models, and what is known of their pretrained weights."""

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
"""Models with a second head that torchvision uses in training alone, and the names of its tensors: left off here."""

OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)")
"""Names in the published DenseNet weights, which torchvision itself joins on loading: norm.1.weight, norm1.weight."""

RESERVED_ARGS = ("num_classes", "weights", "progress")


def build_torchvision_model(config: TorchvisionModelConfig, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The untrained model with `outputs` classes: its last layer fits the task. Initialised as torchvision does it.

    Its first convolution is replaced where images have another number of channels than 3, unless `weights` are to come
    into it.

    Raises
    ------
    JobError: no such model, arguments that it does not take, or channels that the weights do not have.
    """
    name, where = _model_name(config), f"model.kind: {config.kind}"
    from torchvision import models

    for argument in RESERVED_ARGS:
        if argument in config.args:
            fix = "leave it out: " + ("see model.weights" if argument != "num_classes" else "the task says it")
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
        # With weights the input is taken from ImageNet's mean and std to what these two were trained on.
        pretrained = config.weights is not None
        args = {"aux_logits": False, "transform_input": pretrained, "init_weights": not pretrained, **args}
        if args["aux_logits"]:
            fix = "leave it out"
            raise JobError("an auxiliary head gives a second output", where="model.args.aux_logits", fix=fix)
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=outputs, **args)
    except Exception as error:  # torchvision checks its arguments in many ways
        raise JobError(f"{type(error).__name__}: {error}", where=where, fix="see model.args") from None
    if channels != 3:
        _replace_first_conv(model, channels)
    return model


def load_pretrained(config: TorchvisionModelConfig) -> tuple[dict[str, Tensor], str]:
    """The pretrained weights that `spec.weights` means, as tensors on the CPU by the names of `vision`'s model, and a
    name for messages. Downloads them into torch's cache where they are not a file.

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
                fix="download the file where there is a network, and set model.weights to its path",
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
    """Raises
    ------
    JobError: torchvision has no such classification model.
    """
    from torchvision import models

    name = config.kind.partition(":")[2]
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
        raise JobError(
            f"torchvision has no classification model {name!r}",
            where=f"model.kind: {config.kind}",
            fix=f"use {', '.join(near)}, or another of torchvision.models.list_models(module=torchvision.models)",
        )
    return name


def _replace_first_conv(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one for images of so many channels, initialised as torch does."""
    name, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, attribute = name.rpartition(".")
    sizes: dict[str, Any] = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    replacement = nn.Conv2d(channels, first.out_channels, **sizes, bias=first.bias is not None)
    setattr(model.get_submodule(parent), attribute, replacement)


def _read_state_dict(path: Path, where: str) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pth file, without running any code of the file's."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        text = str(error).partition("\n")[0]
        raise JobError(
            f"cannot be read: {text}", where=where, fix="give the file of a state dict: torch.save(model.state_dict())"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise JobError("holds no state dict", where=where, fix="save model.state_dict() alone: names and tensors")
    return dict(tensors)


def _normalize_keys(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    left_out = AUXILIARY_HEADS.get(name, ())
    kept = {key: value for key, value in tensors.items() if not key.startswith(left_out)} if left_out else dict(tensors)
    if name.startswith("densenet"):
        kept = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in kept.items()}
    return kept
