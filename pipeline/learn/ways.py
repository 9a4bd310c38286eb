"""The ways to run the gradient half of a step, and the table that chooses one.

A way takes one piece of a batch, adds the gradient of its weighted sum of losses to a `FlatModel`'s exchange vector,
and returns its sums. The choice depends on the job and the device kind alone, never on a timing, so that every resume
of a run computes in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.device import Arithmetic
from pipeline.job import Job, Mlp
from pipeline.learn.flat import FlatModel
from pipeline.learn.task import Sums, Task
from pipeline.learn.written import WrittenMlp

Way = Callable[[Tensor, Tensor, Tensor | float], Sums]
"""(inputs (B, ...), targets (B, ...), scale of the gradient) -> sums without graph; B is 1 at least."""


def choose_way(job: Job, device: torch.device, code_sizes: tuple[int, ...] = ()) -> str:
    """`written` for plain MLPs in fp32 and fp64, `compiled` where the job says so, else `eager`.

    code_sizes: as `build_model` takes them: with embeddings and with frozen layers an MLP is not plain.
    """
    if job.train.compile == "on":
        return "compiled"
    plain = isinstance(job.model, Mlp) and not job.model.dropout and not job.model.batch_norm
    plain = plain and not code_sizes and not job.model.freeze
    if plain and WrittenMlp.knows(job) and device.type in ("cpu", "cuda"):
        return "written"
    return "eager"


def build_way(name: str, flat: FlatModel, task: Task, arithmetic: Arithmetic, device: torch.device) -> Way:
    if name == "written":
        return WrittenMlp(flat, task)
    return _differentiated(flat, task, arithmetic, device, compiled=name == "compiled")


def _differentiated(flat: FlatModel, task: Task, arithmetic: Arithmetic, device: torch.device, compiled: bool) -> Way:
    """The gradient by autograd, the forward pass and loss as written or compiled by torch."""

    def forward(inputs: Tensor, targets: Tensor) -> Sums:
        with arithmetic.context(device):
            outputs = flat.model(inputs)
        return task.sums(outputs, targets)

    if compiled:
        # Code of its own for each shape: with dynamic shapes it would depend on the shape that a resume meets first.
        forward = torch.compile(forward, dynamic=False)

    def gradient(inputs: Tensor, targets: Tensor, scale: Tensor | float) -> Sums:
        sums = forward(inputs, targets)
        loss = sums.loss if isinstance(scale, float) and scale == 1.0 else sums.loss * scale
        gradients = torch.autograd.grad(loss, flat.parameters, materialize_grads=True)
        torch._foreach_add_(flat.gradients, gradients)
        return Sums(sums.loss.detach(), sums.weight, sums.correct)

    return gradient
