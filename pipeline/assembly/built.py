"""The model of a job on its device, and what trains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline import device as devices
from pipeline.assembly.prepared import Prepared
from pipeline.cpus import available_cpus
from pipeline.data.loader import EvalLoader
from pipeline.data.random import torch_seed
from pipeline.data.sampler import share
from pipeline.errors import InputError, JobError
from pipeline.job import IN_PLACE_WORKERS, Job
from pipeline.learn.losses import OwnLoss, check_loss
from pipeline.learn.models import build_model
from pipeline.learn.models.flops import multiply_adds
from pipeline.learn.models.freezing import frozen_norms
from pipeline.learn.plan import Plan
from pipeline.learn.task import Unit, build_task
from pipeline.learn.trainee import Trainee
from pipeline.learn.ways import choose_way
from pipeline.starting import take

TRIAL_ROWS = 8
"""So many rows try a loss of the user's own before training."""

THREAD_WORK = 2**25
"""Multiply-adds of a forward pass that are worth a thread. Measured on two cores, two threads against one: at 23 to 37
million 0.5 to 1.7 times as fast, at 67 million and more 1.7 to 1.8 times; at 2.5 million, and wherever another process
takes one of the cores, several times slower, for every product waits for the last of its threads."""


@dataclass(frozen=True)
class Built:
    """The trainee of one rank and what feeds it."""

    trainee: Trainee
    device: torch.device
    way: str
    """How the gradient half of a step runs, see `learn.ways`."""
    misfits: tuple[str, ...] = ()
    """What of `Prepared.start` did not fit the model, in words."""


def build(
    prepared: Prepared,
    *,
    device_kind: str = "",
    way: str = "",
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
    to_train: bool = True,
) -> Built:
    """The model on its device, with everything that training needs besides batches.

    Parameters
    ----------
    device_kind: instead of the job's `scale.device`.
    way: instead of the table's choice: that of the run's first attempt.
    to_train: try what training needs; else the model is only to be evaluated.

    Raises
    ------
    InputError: a device that is not there, a model that does not fit the data, a loss of the user's that fails,
        or pieces of a batch that are too small.
    """
    with prepared.code.in_use():
        return _build(prepared, device_kind, way, rank, world_size, local_rank, to_train)


def _build(
    prepared: Prepared, device_kind: str, way: str, rank: int, world_size: int, local_rank: int, to_train: bool
) -> Built:
    job, fitted = prepared.job, prepared.fitted
    preprocess, labels = fitted.preprocess, fitted.labels
    device = devices.choose(device_kind or job.scale.device, local_rank)
    _check_device(device, prepared)
    way = way or choose_way(job, device, preprocess.code_sizes)
    devices.make_repeatable(device)
    torch.set_num_threads(_threads(job))
    task = build_task(
        job,
        len(labels.classes),
        len(fitted.means),
        class_counts=fitted.class_counts,
        means=fitted.means,
        spreads=fitted.spreads,
        unit=Unit(labels.mean, labels.std) if labels.mean else None,
        number_of=labels.number_of,
    )
    init_seed = torch_seed(job.seed.of("init"), "init")
    model = build_model(job, preprocess.output_shape, task.outputs, init_seed, preprocess.code_sizes)
    if device.type == "cpu" and job.scale.threads == "auto" and job.scale.workers == IN_PLACE_WORKERS:
        rows = min(prepared.plan.batch_size, job.train.micro_batch or prepared.plan.batch_size)
        work = rows * multiply_adds(model, preprocess.output_shape)
        torch.set_num_threads(max(_threads(job), threads_for(work, available_cpus())))
    dtype = devices.Arithmetic.of(job.train.precision, device).dtype
    model.to(dtype)  # before it takes weights over: those of another fp64 run stay what they are
    mismatches = take(model, prepared.start, strict=job.model.strict) if prepared.start is not None else []
    seed = job.seed.of("dropout")
    engine = Trainee(
        job,
        model,
        task,
        preprocess.to(device, dtype, prepared.source.schema),
        device,
        way=way,
        world_size=world_size,
        draw_seed=lambda step: torch_seed(seed, "dropout", step, rank),
    )
    if to_train:
        _try(prepared, engine, world_size)
    return Built(engine, device, way, tuple(mismatches))


def _check_device(device: torch.device, prepared: Prepared) -> None:
    """Raise InputError for data that the device has no type for."""
    is_wide = prepared.source.train.inputs.dtype == "float64" and prepared.job.train.precision != "fp64"
    if device.type == "mps" and is_wide:
        raise InputError(
            "mps has no fp64, and float32 would lose digits of these inputs that matter",
            where="scale.device",
            fix="use cpu, or subtract a constant from the columns that are far from zero",
        )


def _try(prepared: Prepared, trainee: Trainee, world_size: int) -> None:
    """What would fail in training, before it begins.

    Raises
    ------
    JobError: pieces of a batch that are too small, or a loss of the user's that cannot be used.
    """
    model, task = trainee.flat.model, trainee.task
    frozen = frozen_norms(model)
    if any(isinstance(module, nn.BatchNorm1d) and module not in frozen for module in model.modules()):
        _check_pieces(prepared.plan, world_size)
    if isinstance(task.loss, OwnLoss):
        arrays, ids = prepared.arrays("train"), prepared.splits["train"].ids[:TRIAL_ROWS]
        rows = EvalLoader(arrays, ids, rank=0, world_size=1, batch_size=TRIAL_ROWS, device=trainee.device)
        inputs, targets = next(iter(rows))
        check_loss(task.loss, trainee.outputs(inputs), targets, mixes=prepared.job.data.augment.mixup > 0)


def _check_pieces(plan: Plan, world_size: int) -> None:
    """Batch normalisation needs two rows at a time.

    Raises
    ------
    JobError: the shares and pieces of a full or last batch come to a single row.
    """
    last_batch = plan.rows - (plan.steps_per_epoch - 1) * plan.batch_size
    for batch in {min(plan.batch_size, plan.rows), last_batch}:
        for rank in range(world_size):
            local_slice = share(batch, rank, world_size)
            rows = local_slice.stop - local_slice.start
            if rows == 1 or (rows and rows % (plan.job.train.micro_batch or rows) == 1):
                raise JobError(
                    f"batch normalisation has no statistics of a single row, and a batch of {batch:,} rows leaves one "
                    f"to worker {rank} of {world_size}",
                    where="train.batch_size",
                    fix="choose another batch_size or micro_batch, or model.batch_norm: false",
                )


def _threads(job: Job) -> int:
    """Arithmetic threads of one worker, but for large models in this process."""
    if job.scale.threads != "auto":
        return job.scale.threads
    return max(1, int(job.scale.cpus_per_worker))


def threads_for(work: int, cores: int) -> int:
    """How many threads pay for a forward pass of so many multiply-adds."""
    return max(1, min(cores, work // THREAD_WORK))
