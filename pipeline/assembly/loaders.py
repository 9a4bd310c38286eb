"""What feeds a trainee: a rank's batches of the training split, and its blocks of those that are evaluated."""

from __future__ import annotations

from pipeline.assembly.built import TrainingSetup
from pipeline.assembly.prepared import PreparedData
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.sampler import GlobalBatchSampler


def build_train_loader(
    prepared: PreparedData, setup: TrainingSetup, *, first_step: int, last_step: int, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    """This rank's shares of the global batches of the steps from `first_step` to `last_step`."""
    job, plan = prepared.job, prepared.schedule
    return TrainLoader(
        prepared.dataset_part("train"),
        prepared.splits["train"].indices,
        GlobalBatchSampler(
            plan.num_rows, plan.batch_size, shuffle=job.data.shuffle, seed=job.seed.for_stream("shuffle")
        ),
        first_step=first_step,
        last_step=last_step,
        rank=rank,
        world_size=world_size,
        loader_config=job.data.loader,
        device=setup.device,
        augment_config=job.data.augment,
        seed=job.seed.for_stream("augment"),
        num_classes=len(prepared.fitted.target_transform.classes),
    )


def build_eval_loader(
    prepared: PreparedData, setup: TrainingSetup, split: str, *, rank: int = 0, world_size: int = 1
) -> EvalLoader:
    """This rank's share of what an evaluation takes of a split, in blocks."""
    loader = prepared.job.data.loader
    return EvalLoader(
        prepared.dataset_part(split),
        prepared.evaluation_indices(split),
        rank=rank,
        world_size=world_size,
        batch_size=loader.eval_batch_size,
        device=setup.device,
        pin_memory=loader.pin_memory,
    )
