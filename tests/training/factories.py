"""Small engines and batches for tests, and the same model as a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.device import Precision
from pipeline.models import build_model
from pipeline.training.engine import TrainEngine
from pipeline.training.gradient_fns import select_gradient_backend
from pipeline.training.task import build_task

CPU = torch.device("cpu")
SHAPE = (1, 5, 6)
NUM_CLASSES = 4


def make_job(**tree: Any) -> JobConfig:
    tree = {"model": {"hidden": [7]}, **tree}
    return build_job({"name": "small", **tree}, "here")


def make_model(job: JobConfig, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    return build_model(job, shape, {"multiclass": NUM_CLASSES, "binary": 1, "regression": 3}[job.task.kind], 11)


def make_engine(
    job: JobConfig,
    *,
    gradient_backend: str | None = None,
    world_size: int = 1,
    model: nn.Module | None = None,
    counts: list[int] | None = None,
    shape: tuple[int, ...] = SHAPE,
    device: torch.device = CPU,
) -> TrainEngine:
    dtype = Precision.from_name(job.train.precision, device).dtype
    return TrainEngine(
        job,
        model if model is not None else make_model(job, shape),
        build_task(job, NUM_CLASSES, 3, class_counts=counts or ()),
        lambda raw: raw.to(dtype),
        device,
        gradient_backend=gradient_backend or select_gradient_backend(job, device),
        world_size=world_size,
        rng_seed_fn=lambda step: 1000 + step,
    )


def make_batch(
    job: JobConfig, size: int, *, seed: int = 5, shape: tuple[int, ...] = SHAPE, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Return random inputs (size, *shape) and targets of the task; the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, *shape, generator=generator)
    if job.task.kind == "regression":
        targets = torch.randn(size, 3, generator=generator)
    else:
        targets = torch.randint(2 if job.task.kind == "binary" else NUM_CLASSES, (size,), generator=generator)
    return inputs.to(device), (targets.float() if job.task.kind == "binary" else targets).to(device)


def mean_gradient(engine: TrainEngine, inputs: Tensor, targets: Tensor, step: int = 1) -> Tensor:
    """Return the gradient of the mean loss of a batch, (P,) on the CPU."""
    engine.forward_backward(step, inputs, targets)
    return (engine.flat.grad / engine.flat.weight_sum).cpu()
