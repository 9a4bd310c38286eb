"""Small trainees and batches to test with, and the same model for a plain reference."""

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
    way: str | None = None,
    world_size: int = 1,
    model: nn.Module | None = None,
    counts: list[int] | None = None,
    shape: tuple[int, ...] = SHAPE,
) -> TrainEngine:
    dtype = Precision.from_name(job.train.precision, CPU).dtype
    return TrainEngine(
        job,
        model if model is not None else make_model(job, shape),
        build_task(job, NUM_CLASSES, 3, class_counts=counts or ()),
        lambda raw: raw.to(dtype),
        CPU,
        gradient_backend=way or select_gradient_backend(job, CPU),
        world_size=world_size,
        rng_seed_fn=lambda step: 1000 + step,
    )


def make_batch(job: JobConfig, rows: int, *, seed: int = 5, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, *shape, generator=generator)
    if job.task.kind == "regression":
        return inputs, torch.randn(rows, 3, generator=generator)
    classes = 2 if job.task.kind == "binary" else NUM_CLASSES
    targets = torch.randint(classes, (rows,), generator=generator)
    return inputs, targets.float() if job.task.kind == "binary" else targets


def mean_gradient(trainee: TrainEngine, inputs: Tensor, targets: Tensor, step: int = 1) -> Tensor:
    """The gradient half of a step, divided by the weight: (P,)."""
    trainee.forward_backward(step, inputs, targets)
    return trainee.flat.grad / trainee.flat.weight_sum
