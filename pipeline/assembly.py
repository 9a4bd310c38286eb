"""From a job to what trains it: data, splits, plan, model and loaders. The same for every verb that needs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline import device as devices
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.preprocess import Preprocess, fit_preprocess
from pipeline.data.random import torch_seed
from pipeline.data.sampler import GlobalBatches, share
from pipeline.data.sources import Arrays, Source, open_source
from pipeline.data.split import Rows, make_splits, split_warnings
from pipeline.data.targets import class_counts, class_names, prepare_targets
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.learn.models import build_model
from pipeline.learn.plan import Plan
from pipeline.learn.task import build_task
from pipeline.learn.trainee import Trainee
from pipeline.learn.ways import choose_way


@dataclass(frozen=True)
class Prepared:
    """The data of a job, split and looked at, and the plan that follows from it."""

    job: Job
    source: Source
    splits: dict[str, Rows]
    targets: dict[str, np.ndarray]
    """Prepared targets of each part of the source."""
    classes: tuple[str, ...]
    preprocess: Preprocess
    """Fitted on the training split."""
    plan: Plan

    @property
    def evaluated(self) -> list[str]:
        """The splits to evaluate while training."""
        return list(self.job.evaluate.splits or (["val"] if "val" in self.splits else ["train"]))

    def arrays(self, split: str) -> Arrays:
        """The part in which a split lies, with prepared targets."""
        part = self.splits[split].part
        return Arrays(self.source.part(part).inputs, self.targets[part])

    @property
    def warnings(self) -> list[str]:
        """What is allowed, but probably not meant."""
        found = split_warnings(self.job, self.splits)
        best, processes, cores = self.job.best, self.job.data.loader.processes, devices.available_cpus()
        if best.patience is not None and best.metric.partition("/")[0] not in self.evaluated:
            found.append(f"best.patience has no effect: {best.metric} is not evaluated")
        if processes > cores:
            found.append(f"data.loader.processes is {processes}, but there are {cores} cores: 0 may be faster")
        return found


def prepare(job: Job, max_steps: int | None = None) -> Prepared:
    """Load and split the data, fit its preprocessing, and lay out the plan.

    Raises
    ------
    InputError: data that cannot be loaded or does not fit the job.
    """
    source = open_source(job)
    splits = make_splits(job, source)
    dtype = np.float64 if job.train.precision == "fp64" else np.float32
    parts = {rows.part: source.part(rows.part).targets for rows in splits.values()}
    prepared = Prepared(
        job=job,
        source=source,
        splits=splits,
        targets={part: prepare_targets(targets, job.task, dtype) for part, targets in parts.items()},
        classes=class_names(source, job.task),
        preprocess=fit_preprocess(job, source.part(splits["train"].part), splits["train"].ids),
        plan=Plan(job, len(splits["train"]), max_steps),
    )
    for split in prepared.evaluated:
        if split not in splits:
            raise JobError(f"there is no {split} split to evaluate", where="evaluate.splits", fix="see data.splits")
    wanted = job.best.metric.partition("/")[0]
    if wanted in splits and wanted not in prepared.evaluated:
        raise JobError(
            f"{job.best.metric} is not evaluated", where="best.metric", fix=f"add {wanted} to evaluate.splits"
        )
    return prepared


@dataclass(frozen=True)
class Built:
    """The trainee of one rank and what feeds it."""

    trainee: Trainee
    device: torch.device
    way: str
    """How the gradient half of a step runs, see `learn.ways`."""


def build(
    prepared: Prepared,
    *,
    device_kind: str = "",
    way: str = "",
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
) -> Built:
    """The model on its device, with everything that training needs besides batches.

    Parameters
    ----------
    device_kind: instead of the job's `scale.device`.
    way: instead of the table's choice: that of the run's first attempt.

    Raises
    ------
    InputError: a device that is not there, or a model that does not fit the data.
    """
    job, rows = prepared.job, prepared.splits["train"]
    device = devices.choose(device_kind or job.scale.device, local_rank)
    way = way or choose_way(job, device)
    devices.make_repeatable(device)
    torch.set_num_threads(_threads(job, world_size))
    targets = prepared.targets[rows.part][rows.ids]
    columns = targets.shape[1] if targets.ndim > 1 else 1
    counts = class_counts(targets, len(prepared.classes)) if job.task.class_weights == "balanced" else None
    task = build_task(job.task, len(prepared.classes), columns, counts)
    model = build_model(job, prepared.preprocess.output_shape, task.outputs, torch_seed(job.seed.of("init"), "init"))
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        _check_pieces(prepared.plan, world_size)
    dtype = devices.Arithmetic.of(job.train.precision, device).dtype
    seed = job.seed.of("dropout")
    trainee = Trainee(
        job,
        model,
        task,
        prepared.preprocess.to(device, dtype),
        device,
        way=way,
        world_size=world_size,
        draw_seed=lambda step: torch_seed(seed, "dropout", step, rank),
    )
    return Built(trainee, device, way)


def train_loader(
    prepared: Prepared, built: Built, *, first_step: int, last_step: int, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    """This rank's shares of the global batches of the steps from `first_step` to `last_step`."""
    job, plan = prepared.job, prepared.plan
    return TrainLoader(
        prepared.arrays("train"),
        prepared.splits["train"].ids,
        GlobalBatches(plan.rows, plan.batch_size, shuffle=job.data.shuffle, seed=job.seed.of("shuffle")),
        first_step=first_step,
        last_step=last_step,
        rank=rank,
        world_size=world_size,
        loader=job.data.loader,
        device=built.device,
        augment=job.data.augment,
        seed=job.seed.of("augment"),
    )


def eval_loader(prepared: Prepared, built: Built, split: str, *, rank: int = 0, world_size: int = 1) -> EvalLoader:
    """This rank's share of a split, in blocks."""
    loader = prepared.job.data.loader
    return EvalLoader(
        prepared.arrays(split),
        prepared.splits[split].ids,
        rank=rank,
        world_size=world_size,
        batch_size=loader.eval_batch_size,
        device=built.device,
        limit=prepared.job.evaluate.limit,
        pin_memory=loader.pin_memory,
    )


def _check_pieces(plan: Plan, world_size: int) -> None:
    """Batch normalisation needs two rows at a time.

    Raises
    ------
    JobError: the shares and pieces of a full or last batch come to a single row.
    """
    last_batch = plan.rows - (plan.steps_per_epoch - 1) * plan.batch_size
    for batch in {min(plan.batch_size, plan.rows), last_batch}:
        for rank in range(world_size):
            mine = share(batch, rank, world_size)
            rows = mine.stop - mine.start
            if rows == 1 or (rows and rows % (plan.job.train.micro_batch or rows) == 1):
                raise JobError(
                    f"batch normalisation has no statistics of a single row, and a batch of {batch:,} rows leaves one "
                    f"to worker {rank} of {world_size}",
                    where="train.batch_size",
                    fix="choose another batch_size or micro_batch, or model.batch_norm: false",
                )


def _threads(job: Job, world_size: int) -> int:
    """Arithmetic threads of one worker. More than one is slower where the products are small."""
    if job.scale.threads != "auto":
        return job.scale.threads
    return max(1, int(job.scale.cpus_per_worker))
