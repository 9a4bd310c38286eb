"""Execution backends of forward-backward: `eager`, `compiled` and `written` (manual backward).

A gradient function takes one micro-batch, adds the gradient of its weighted sum of losses to `FlatParameters.grad`, and
returns its sums. The backend depends on the job and the device kind alone, never on a timing, so that every resume of a
run uses the same one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config import JobConfig, MlpConfig
from pipeline.device import Precision
from pipeline.models.mlp import EnsembleMlpNet
from pipeline.training.ensemble_backward import EnsembleBackward
from pipeline.training.flat_parameters import FlatParameters
from pipeline.training.manual_backward import ManualMlpBackward
from pipeline.training.task import LossSums, Task

GradientFn = Callable[[Tensor, Tensor, Tensor | float], LossSums]
"""(inputs (B, ...), targets (B, ...), scale of the gradient) -> sums without graph; B is at least 1."""


def select_gradient_backend(job: JobConfig, device: torch.device, code_sizes: tuple[int, ...] = ()) -> str:
    """Return `written` for plain MLPs and, on the CPU, ensembles in fp32 and fp64; `compiled` if the job asks for it;
    else `eager`.

    Parameters
    ----------
    code_sizes: as for `build_model`. An MLP with embeddings or frozen layers is not plain.
    """
    if job.train.compile == "on":
        return "compiled"
    model = job.model
    plain = isinstance(model, MlpConfig) and not model.dropout and not model.batch_norm and not model.freeze
    plain = plain and not code_sizes and job.members == 1 and getattr(model, "numeric_embedding", "") != "periodic"
    if EnsembleBackward.supports(job) and device.type == "cpu":
        return "written"
    if plain and ManualMlpBackward.supports(job) and device.type in ("cpu", "cuda"):
        return "written"
    return "eager"


def build_gradient_fn(
    gradient_backend: str, flat: FlatParameters, task: Task, precision: Precision, device: torch.device
) -> GradientFn:
    """Return the gradient function of a backend, bound to a model and its task."""
    if gradient_backend == "written":
        return (EnsembleBackward if isinstance(flat.model, EnsembleMlpNet) else ManualMlpBackward)(flat, task)
    return _autograd_gradient_fn(flat, task, precision, device, compiled=gradient_backend == "compiled")


def _autograd_gradient_fn(
    flat: FlatParameters, task: Task, precision: Precision, device: torch.device, compiled: bool
) -> GradientFn:
    """Return the gradient by autograd; forward pass and loss run eagerly or compiled by torch."""

    def forward(inputs: Tensor, targets: Tensor) -> LossSums:
        with precision.autocast_context(device):
            outputs = flat.model(inputs)
        return task.compute_loss_sums(outputs, targets)

    if compiled:
        # One compilation per shape: with dynamic shapes the code would depend on the first shape after a resume.
        forward = torch.compile(forward, dynamic=False)

    def gradient(inputs: Tensor, targets: Tensor, scale: Tensor | float) -> LossSums:
        sums = forward(inputs, targets)
        loss = sums.loss_sum if isinstance(scale, float) and scale == 1.0 else sums.loss_sum * scale
        gradients = torch.autograd.grad(loss, flat.parameters, materialize_grads=True)
        torch._foreach_add_(flat.grads, gradients)
        return LossSums(sums.loss_sum.detach(), sums.weight_sum, sums.num_correct)

    return gradient
