"""The models that a job file can describe. Their untrained weights are the same on every device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import CnnConfig, JobConfig, MlpConfig, TorchvisionModelConfig
from pipeline.errors import JobError
from pipeline.models.cnn import CnnNet, build_cnn
from pipeline.models.custom import build_custom_model
from pipeline.models.ensemble import Averaging, EnsembleLinear, MemberBatchNorm, MemberLinear
from pipeline.models.freezing import freeze
from pipeline.models.mlp import ACTIVATIONS, EmbeddingMlpNet, EnsembleMlpNet, MlpNet, build_mlp
from pipeline.models.numeric_embedding import PeriodicEmbedding
from pipeline.models.torchvision import build_torchvision_model
from pipeline.user_code import wrap_user_error

__all__ = ["build_model", "uses_rng"]

AVERAGING_BY_TASK: dict[str, Averaging] = {
    "multiclass": "softmax",
    "binary": "sigmoid",
    "multilabel": "sigmoid",
    "regression": "mean",
}
"""How the outputs of an ensemble's members are averaged, by `TaskConfig.kind`."""


def build_model(
    job: JobConfig,
    input_shape: tuple[int, ...],
    outputs: int,
    seed: int,
    code_sizes: tuple[int, ...] = (),
    num_numbers: int | None = None,
) -> nn.Module:
    """Build the untrained model, on the CPU in float32; its weights are a function of `seed` alone.

    Parameters that the job freezes do not require a gradient.

    Parameters
    ----------
    input_shape: shape of one preprocessed sample, such as (1, 28, 28) or (2,).
    outputs: number of outputs per sample.
    code_sizes: the last len(code_sizes) values of a sample (F,) are category codes, integers from 0 to size - 1.
    num_numbers: the first values of a sample (F,) that are numbers, not one-hot columns; by default all that are not
        codes.

    Raises
    ------
    JobError: the model does not fit its input or output, or a custom model cannot be built.
    """
    config = job.model
    if isinstance(config, CnnConfig | TorchvisionModelConfig) and len(input_shape) != 3:
        kind = "a cnn" if isinstance(config, CnnConfig) else config.kind
        raise JobError(
            f"{kind} takes images, but a sample has the shape {input_shape}",
            where="model.kind",
            fix="use kind: mlp",
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if isinstance(config, MlpConfig):
            if num_numbers is None:
                num_numbers = math.prod(input_shape) - len(code_sizes)
            averaging = AVERAGING_BY_TASK[job.task.kind]
            model = build_mlp(config, input_shape, outputs, code_sizes, num_numbers, averaging)
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
    """Return whether a forward pass in training may use random numbers. Unknown modules and subclasses may."""
    plain: tuple[Any, ...] = (MlpNet, CnnNet, nn.Sequential, nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.Flatten)
    embedding: tuple[Any, ...] = (EmbeddingMlpNet, nn.ModuleList, nn.Embedding, PeriodicEmbedding)
    ensemble: tuple[Any, ...] = (EnsembleMlpNet, EnsembleLinear, MemberLinear, MemberBatchNorm)
    known = {*plain, *embedding, *ensemble, nn.BatchNorm1d, nn.BatchNorm2d, *ACTIVATIONS.values()}
    return any(type(module) not in known for module in model.modules())


def _dry_run(model: nn.Module, input_shape: tuple[int, ...], outputs: int, where: str) -> None:
    """Pass one sample of zeros through a torchvision or custom model. This also initializes lazy modules.

    Raises
    ------
    JobError: the model fails on the sample, or its outputs have another shape.
    """
    model.eval()
    try:
        with torch.no_grad():
            outputs_tensor = model(torch.zeros(1, *input_shape))
    except Exception as raised:  # any exception of the user's module is reported
        error = wrap_user_error(raised, where, JobError)
        fix = "the model must take samples of this shape: see data.resize, or the model's args"
        raise JobError(f"fails on a sample of shape {input_shape}: {error.what}", where=where, fix=fix) from raised
    model.train()
    if not isinstance(outputs_tensor, Tensor):
        raise JobError(
            f"returns a {type(outputs_tensor).__name__}, not one tensor", where=where, fix="return (B, outputs)"
        )
    if outputs_tensor.shape != (1, outputs):
        raise JobError(
            f"returns outputs of shape {tuple(outputs_tensor.shape)} for 1 sample, but the task needs {(1, outputs)}",
            where=where,
            fix="take `outputs` as an argument: it is passed if the signature has it",
        )
