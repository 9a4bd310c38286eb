"""What feeds a trainee: a rank's batches of the training split, and its blocks of those that are evaluated."""

from __future__ import annotations

from pipeline.assembly.built import Built
from pipeline.assembly.prepared import Prepared
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.sampler import GlobalBatches


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
        classes=len(prepared.fitted.labels.classes),
    )


def eval_loader(prepared: Prepared, built: Built, split: str, *, rank: int = 0, world_size: int = 1) -> EvalLoader:
    """This rank's share of what an evaluation takes of a split, in blocks."""
    loader = prepared.job.data.loader
    return EvalLoader(
        prepared.arrays(split),
        prepared.evaluated_ids(split),
        rank=rank,
        world_size=world_size,
        batch_size=loader.eval_batch_size,
        device=built.device,
        pin_memory=loader.pin_memory,
    )
