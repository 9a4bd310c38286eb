"""The training setup of one rank: engine, model and device, its loaders, and the check of stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline import device as devices
from pipeline.config import IN_PLACE_WORKERS, CustomModelConfig, JobConfig, TorchvisionModelConfig
from pipeline.cpus import available_cpus
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.rng import derive_torch_seed
from pipeline.data.sampler import GlobalBatchSampler, rank_slice
from pipeline.errors import InputError, JobError, StorageError
from pipeline.models import build_model
from pipeline.models.flops import count_multiply_adds
from pipeline.models.freezing import find_frozen_norms
from pipeline.setup.data import PreparedData
from pipeline.setup.initial_weights import load_matching_weights
from pipeline.training.engine import TrainEngine
from pipeline.training.gradient_fns import select_gradient_backend
from pipeline.training.losses import CustomLoss, check_custom_loss
from pipeline.training.schedule import TrainingSchedule
from pipeline.training.task import TargetScale, build_task

MAX_LISTED = 3
"""Maximum number of tensor names in a message."""

DRY_RUN_ROWS = 8
"""Number of rows on which a custom loss is tried before training."""

MULTIPLY_ADDS_PER_THREAD = 2**25
"""Multiply-adds of a forward pass that justify one thread. Measured on two cores, two threads against one: 0.5 to 1.7
times as fast at 23 to 37 million, 1.7 to 1.8 times at 67 million and more; several times slower at 2.5 million, and
whenever another process uses one of the cores, because every matrix product waits for the slowest of its threads."""


@dataclass(frozen=True)
class TrainingSetup:
    """The engine of one rank, and how it was built."""

    engine: TrainEngine
    device: torch.device
    gradient_backend: str
    """Execution backend of the gradient, see `pipeline.training.gradient_fns`."""
    weight_mismatches: tuple[str, ...] = ()
    """What of `PreparedData.initial_weights` did not match the model, as text."""


def build_training(
    prepared: PreparedData,
    *,
    device_kind: str = "",
    gradient_backend: str = "",
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
    for_training: bool = True,
) -> TrainingSetup:
    """Build the model on its device, with everything that training needs except batches.

    Parameters
    ----------
    device_kind: overrides the job's `scale.device`.
    gradient_backend: overrides the default choice: a resume passes the backend of the run's first attempt.
    for_training: whether to do a dry run; not needed if the model is only evaluated.

    Raises
    ------
    InputError: the device is not available, the model does not fit the data, a custom loss fails, or micro-batches are
        too small.
    """
    with prepared.code.activated():
        return _build_training(prepared, device_kind, gradient_backend, rank, world_size, local_rank, for_training)


def _build_training(
    prepared: PreparedData,
    device_kind: str,
    gradient_backend: str,
    rank: int,
    world_size: int,
    local_rank: int,
    for_training: bool,
) -> TrainingSetup:
    job, fitted = prepared.job, prepared.fitted
    preprocess, labels = fitted.input_transform, fitted.target_transform
    device = devices.select_device(device_kind or job.scale.device, local_rank)
    _check_device(device, prepared)
    gradient_backend = gradient_backend or select_gradient_backend(job, device, preprocess.code_sizes)
    devices.set_deterministic(device)
    torch.set_num_threads(_configured_threads(job))
    task = build_task(
        job,
        len(labels.classes),
        len(fitted.target_mean),
        class_counts=fitted.class_counts,
        target_mean=fitted.target_mean,
        target_std=fitted.target_std,
        target_scale=TargetScale(labels.mean, labels.std) if labels.mean else None,
        label_index=labels.label_index,
        class_names=labels.classes,
    )
    init_seed = derive_torch_seed(job.seed.for_stream("init"), "init")
    model = build_model(
        *(job, preprocess.output_shape, task.num_outputs, init_seed, preprocess.code_sizes, preprocess.num_numbers)
    )
    if device.type == "cpu" and job.scale.threads == "auto" and job.scale.workers == IN_PLACE_WORKERS:
        rows = min(prepared.schedule.batch_size, job.train.micro_batch or prepared.schedule.batch_size)
        work = rows * count_multiply_adds(model, preprocess.output_shape)
        torch.set_num_threads(max(_configured_threads(job), select_num_threads(work, available_cpus())))
    dtype = devices.Precision.from_name(job.train.precision, device).dtype
    model.to(dtype)  # before weights are loaded: those of another fp64 run keep their precision
    mismatches = (
        load_matching_weights(model, prepared.initial_weights, strict=job.model.strict)
        if prepared.initial_weights is not None
        else []
    )
    seed = job.seed.for_stream("dropout")
    engine = TrainEngine(
        job,
        model,
        task,
        preprocess.make_transform_fn(device, dtype, prepared.dataset.schema),
        device,
        gradient_backend=gradient_backend,
        world_size=world_size,
        rng_seed_fn=lambda step: derive_torch_seed(seed, "dropout", step, rank),
    )
    if for_training:
        dry_run(prepared, engine, world_size)
    return TrainingSetup(engine, device, gradient_backend, tuple(mismatches))


def _check_device(device: torch.device, prepared: PreparedData) -> None:
    """Raise InputError if the device does not support the dtype of the data."""
    is_wide = prepared.dataset.train.inputs.dtype == "float64" and prepared.job.train.precision != "fp64"
    if device.type == "mps" and is_wide:
        raise InputError(
            "mps does not support fp64, and float32 would lose significant digits of these inputs",
            where="scale.device",
            fix="use cpu, or subtract a constant from the columns that are far from zero",
        )


def dry_run(prepared: PreparedData, engine: TrainEngine, world_size: int) -> None:
    """Check before training what would fail in training.

    Raises
    ------
    JobError: micro-batches are too small for batch normalization, or a custom loss cannot be used.
    """
    model, task = engine.flat.model, engine.task
    frozen = find_frozen_norms(model)
    if any(isinstance(module, nn.BatchNorm1d) and module not in frozen for module in model.modules()):
        check_batch_norm_batches(prepared.schedule, world_size)
    if isinstance(task.loss_fn, CustomLoss):
        part, indices = prepared.dataset_part("train"), prepared.splits["train"].indices[:DRY_RUN_ROWS]
        loader = EvalLoader(part, indices, rank=0, world_size=1, batch_size=DRY_RUN_ROWS, device=engine.device)
        inputs, targets = next(iter(loader))
        check_custom_loss(
            task.loss_fn, engine.predict_logits(inputs), targets, has_mixup=prepared.job.data.augment.mixup > 0
        )


def check_batch_norm_batches(schedule: TrainingSchedule, world_size: int) -> None:
    """Check that no micro-batch has a single sample, of which batch normalization has no statistics.

    Raises
    ------
    JobError: a rank's slice of a full or last batch, or its last micro-batch, has a single sample.
    """
    last_batch = schedule.num_rows - (schedule.steps_per_epoch - 1) * schedule.batch_size
    for batch in {min(schedule.batch_size, schedule.num_rows), last_batch}:
        for rank in range(world_size):
            local_slice = rank_slice(batch, rank, world_size)
            size = local_slice.stop - local_slice.start
            if size == 1 or (size and size % (schedule.job.train.micro_batch or size) == 1):
                raise JobError(
                    f"batch normalization has no statistics of a single sample, and a batch of {batch:,} samples "
                    f"leaves one to worker {rank} of {world_size}",
                    where="train.batch_size",
                    fix="choose another batch_size or micro_batch, or model.batch_norm: false",
                )


def _configured_threads(job: JobConfig) -> int:
    """Return the threads of one worker; `_build_training` adds some for large models in this process."""
    if job.scale.threads != "auto":
        return job.scale.threads
    return max(1, int(job.scale.cpus_per_worker))


def select_num_threads(multiply_adds: int, cores: int) -> int:
    """Return the number of threads that is worth using for a forward pass of a number of multiply-adds."""
    return max(1, min(cores, multiply_adds // MULTIPLY_ADDS_PER_THREAD))


def build_train_loader(
    prepared: PreparedData, setup: TrainingSetup, *, first_step: int, last_step: int, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    """Return a loader of this rank's slices of the global batches of steps `first_step` to `last_step`."""
    job, schedule = prepared.job, prepared.schedule
    return TrainLoader(
        prepared.dataset_part("train"),
        prepared.splits["train"].indices,
        GlobalBatchSampler(
            schedule.num_rows,
            schedule.batch_size,
            shuffle=job.data.shuffle,
            seed=job.seed.for_stream("shuffle"),
            members=job.members,
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
    """Return a loader of this rank's slice of the rows of a split that are evaluated."""
    loader_config = prepared.job.data.loader
    return EvalLoader(
        prepared.dataset_part(split),
        prepared.evaluation_indices(split),
        rank=rank,
        world_size=world_size,
        batch_size=loader_config.eval_batch_size,
        device=setup.device,
        pin_memory=loader_config.pin_memory,
    )


def check_state_dict(job: JobConfig, fitted: FittedTransforms, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Check that stored weights have the names and shapes of the job's model, before memory is allocated for it.

    A stored job of three lines can ask for a model of any size; with this check its weights must have that size too.
    Custom models are not checked: their code is trusted.

    Raises
    ------
    StorageError: names the tensors that differ.
    """
    if isinstance(job.model, CustomModelConfig):
        return
    preprocess = fitted.input_transform
    try:
        with torch.device("meta"):  # shapes without memory
            meta_model = build_model(
                *(job, preprocess.output_shape, fitted.num_outputs, 0, preprocess.code_sizes, preprocess.num_numbers)
            )
    except (RuntimeError, OverflowError, ValueError, ZeroDivisionError) as error:
        if isinstance(job.model, TorchvisionModelConfig):  # some compute with tensor values when they are built
            return
        raise _mismatch_error(f"{type(error).__name__}: {error}", where) from None
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in meta_model.state_dict().items()}
    actual_shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    differ = [
        name for name in {**expected_shapes, **actual_shapes} if expected_shapes.get(name) != actual_shapes.get(name)
    ]
    if differ:
        raise _mismatch_error(", ".join(differ[:MAX_LISTED]) + (" and more" if len(differ) > MAX_LISTED else ""), where)


def _mismatch_error(what: str, where: str) -> StorageError:
    return StorageError(
        f"its tensors do not match its job's model: {what.partition(chr(10))[0][:200]}",
        where=where,
        fix="use another checkpoint",
    )
