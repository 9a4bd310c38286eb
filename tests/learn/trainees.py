"""Small trainees and batches to test with, and the same model for a plain reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.device import Arithmetic
from pipeline.job import Job
from pipeline.job_file import build_job
from pipeline.learn.models import build_model
from pipeline.learn.task import build_task
from pipeline.learn.trainee import Trainee
from pipeline.learn.ways import choose_way

CPU = torch.device("cpu")
SHAPE = (1, 5, 6)
CLASSES = 4


def make_job(**tree: Any) -> Job:
    tree = {"model": {"hidden": [7]}, **tree}
    return build_job({"name": "small", **tree}, "here")


def model_of(job: Job, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    return build_model(job, shape, {"multiclass": CLASSES, "binary": 1, "regression": 3}[job.task.kind], 11)


def make_trainee(
    job: Job,
    *,
    way: str | None = None,
    world_size: int = 1,
    model: nn.Module | None = None,
    counts: list[int] | None = None,
    shape: tuple[int, ...] = SHAPE,
) -> Trainee:
    dtype = Arithmetic.of(job.train.precision, CPU).dtype
    return Trainee(
        job,
        model if model is not None else model_of(job, shape),
        build_task(job, CLASSES, 3, class_counts=counts or ()),
        lambda raw: raw.to(dtype),
        CPU,
        way=way or choose_way(job, CPU),
        world_size=world_size,
        draw_seed=lambda step: 1000 + step,
    )


def make_batch(job: Job, rows: int, *, seed: int = 5, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, *shape, generator=generator)
    if job.task.kind == "regression":
        return inputs, torch.randn(rows, 3, generator=generator)
    classes = 2 if job.task.kind == "binary" else CLASSES
    targets = torch.randint(classes, (rows,), generator=generator)
    return inputs, targets.float() if job.task.kind == "binary" else targets


def mean_gradients(trainee: Trainee, inputs: Tensor, targets: Tensor, step: int = 1) -> Tensor:
    """The gradient half of a step, divided by the weight: (P,)."""
    trainee.gradient(step, inputs, targets)
    return trainee.flat.gradient / trainee.flat.weight
