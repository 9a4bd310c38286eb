"""The models that a job file can describe, built with the same untrained weights on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import CnnConfig, JobConfig, MlpConfig, TorchvisionModelConfig
from pipeline.errors import JobError
from pipeline.models.cnn import CnnNet, build_cnn
from pipeline.models.custom import build_custom_model
from pipeline.models.freezing import freeze
from pipeline.models.mlp import ACTIVATIONS, EmbeddingMlpNet, MlpNet, build_mlp
from pipeline.models.torchvision import build_torchvision_model
from pipeline.user_code import wrap_user_error

__all__ = ["build_model", "uses_rng"]


def build_model(
    job: JobConfig, input_shape: tuple[int, ...], outputs: int, seed: int, code_sizes: tuple[int, ...] = ()
) -> nn.Module:
    """The untrained model, on the CPU in float32; its weights are a function of `seed` alone. What the job freezes
    requires no gradient.

    Parameters
    ----------
    input_shape: shape of one preprocessed sample, such as (1, 28, 28) or (2,).
    outputs: numbers that the model gives for one sample.
    code_sizes: the last len(code_sizes) numbers of a sample (F,) are codes, whole numbers from 0 to size - 1.

    Raises
    ------
    JobError: a model that does not fit its input or output, or a module of the user's that cannot be built.
    """
    config = job.model
    if isinstance(config, CnnConfig | TorchvisionModelConfig) and len(input_shape) != 3:
        kind = "a cnn" if isinstance(config, CnnConfig) else config.kind
        raise JobError(
            f"{kind} takes images, but a sample here has the shape {input_shape}",
            where="model.kind",
            fix="use kind: mlp",
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if isinstance(config, MlpConfig):
            model = build_mlp(config, input_shape, outputs, code_sizes)
        elif isinstance(config, CnnConfig):
            model = build_cnn(config, input_shape, outputs)
        else:
            if isinstance(config, TorchvisionModelConfig):
                model = build_torchvision_model(config, input_shape, outputs)
            else:
                model = build_custom_model(config, input_shape, outputs, code_sizes)
            _dry_run(model, input_shape, outputs, f"model.kind: {config.kind}")
    freeze(model, config.freeze)
    return model


def uses_rng(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers. Unknown modules, subclasses too, are taken to."""
    plain: tuple[Any, ...] = (MlpNet, CnnNet, nn.Sequential, nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.Flatten)
    embedding: tuple[Any, ...] = (EmbeddingMlpNet, nn.ModuleList, nn.Embedding)
    known = {*plain, *embedding, nn.BatchNorm1d, nn.BatchNorm2d, *ACTIVATIONS.values()}
    return any(type(module) not in known for module in model.modules())


def _dry_run(model: nn.Module, input_shape: tuple[int, ...], outputs: int, where: str) -> None:
    """One sample of zeros through a model that others wrote; lazy modules get their shapes by it.

    Raises
    ------
    JobError: it fails on such a sample, or its outputs have another shape.
    """
    model.eval()
    try:
        with torch.no_grad():
            outputs_tensor = model(torch.zeros(1, *input_shape))
    except Exception as raised:  # whatever a module of the user's raises is the user's to see
        error = wrap_user_error(raised, where, JobError)
        fix = "the model must take samples of this shape: see data.resize, or the model's args"
        raise JobError(f"fails on a sample of shape {input_shape}: {error.what}", where=where, fix=fix) from raised
    model.train()
    if not isinstance(outputs_tensor, Tensor):
        raise JobError(
            f"gives a {type(outputs_tensor).__name__}, not one tensor", where=where, fix="return (B, outputs)"
        )
    if outputs_tensor.shape != (1, outputs):
        raise JobError(
            f"gives outputs of shape {tuple(outputs_tensor.shape)} for 1 sample, but the task needs {(1, outputs)}",
            where=where,
            fix="take `outputs` as an argument: it is given where the signature names it",
        )
