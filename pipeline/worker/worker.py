"""What one rank does in one attempt: build, claim, restore, train, report."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline import device as devices
from pipeline import user_code
from pipeline.config import JobConfig
from pipeline.context import PeerFailure, WorkerContext
from pipeline.errors import Interrupted, JobError, OutOfMemoryError, StorageError, TrainyardError
from pipeline.events import Message, PhaseStarted, TrainingStarted, WarningMessage
from pipeline.runs.async_writer import AsyncRunWriter, finish_ended_run
from pipeline.runs.checkpoints.checkpoint import ResumeCheckpoint
from pipeline.runs.journal.entries import validate_as
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from pipeline.setup import (
    PreparedData,
    TrainingSetup,
    build_eval_loader,
    build_train_loader,
    build_training,
    load_stored_transforms,
    prepare_data,
)
from pipeline.setup.initial_weights import find_initial_weights
from pipeline.storage import Storage
from pipeline.storage.remote import PART_BYTES
from pipeline.storage.retry import get_limit_s, request_timeout_s
from pipeline.training.loop import BatchLike, StopBounds, TrainProgress, fit
from pipeline.user_code import UserCode
from pipeline.version import __version__
from pipeline.watchdog import HangTimeouts, StackDump, Watchdog
from pipeline.worker.exit_entry import record_exit
from pipeline.worker.reporter import Rank0Reporter, RankReporter
from pipeline.worker.spec import WorkerSpec

MAX_LISTED = 4
"""Files that a warning lists."""


def run_worker(
    spec: WorkerSpec,
    context: WorkerContext,
    *,
    prepared: PreparedData | None = None,
    built: TrainingSetup | None = None,
) -> TrainProgress:
    """Run one rank's part of one attempt. Rank 0 also claims the attempt and writes the run directory.

    Parameters
    ----------
    spec: the job and its run, the same on every rank.
    context: the rank, its collectives, and the connection to the driver.
    prepared, built: the data and the model, where this process has built them already for this rank.

    Returns
    -------
    The progress at the end of the run.

    Raises
    ------
    Interrupted: a signal asked to stop, and the run is saved.
    BusyError: another process is writing this run.
    OutOfMemoryError: a batch did not fit.
    TrainyardError: any other failure; it is also in the run's journal.
    """
    run = Run(Storage.open(spec.storage_url), spec.run_name)

    with _watchdog_for(spec, context, run), ExitStack() as exit_stack:
        # Build: the same data, model and schedule on every rank.
        code = spec.code or user_code.collect_user_code(spec.job)
        exit_stack.enter_context(code.activated())
        prepared = prepared or _prepare_data(spec, context, run, code)
        _check_belongs_to_run(prepared, run)
        built = _build_training(prepared, built, context, run)

        # Claim: rank 0 acquires the lease of the run and selects the checkpoint; every rank resumes from that one.
        attempt = None
        if context.rank == 0:
            attempt = _acquire_lease(run, spec, context, built, prepared.code)
            exit_stack.callback(attempt.close)
            context.progress.attempt = attempt.number
            if attempt.heartbeat is not None:
                context.progress.release_run = attempt.heartbeat.stop
        resume = context.broadcast(_resume_state(attempt, spec.job.checkpoint.keep) if attempt is not None else None)
        context.progress.attempt = resume.attempt
        if resume.is_over:
            return resume.progress
        reporter, writer, not_stored = RankReporter(context), None, dict[str, str]()
        if attempt is not None:
            writer = AsyncRunWriter(attempt, keep=spec.job.checkpoint.keep)
            exit_stack.callback(writer.close)
            reporter = Rank0Reporter(
                context, built.engine, prepared.schedule, writer, attempt, prepared.fitted.to_json()
            )
            exit_stack.enter_context(record_exit(writer, reporter))
            not_stored = prepared.code.find_unstored_files()

        # Restore: weights, optimizer and position.
        if resume.weights is not None:
            built.engine.load_state_dict(resume.weights, resume.state)

        # Train: to the last step, an early stop or a signal.
        progress = _train(prepared, built, context, reporter, resume)

        # Report: the final metrics to the cluster; on rank 0 also the end of the run.
        context.report({"step": progress.step, **(progress.metrics or {})}, last=True)
        if writer is not None:
            _warn_of_code_not_stored(context, prepared.code.find_unstored_files().keys() - not_stored.keys())
            writer.finish()
        return progress


def hang_limits(hang_s: float) -> HangTimeouts:
    """Return how long a process may make no progress. Lost storage raises its own error before that: at its own limit,
    once the request that was in flight has failed too."""
    return HangTimeouts(hang_s, storage_s=get_limit_s() + request_timeout_s(2 * PART_BYTES))


def _watchdog_for(spec: WorkerSpec, context: WorkerContext, run: Run) -> AbstractContextManager[object]:
    """Return the watchdog of this thread, or an empty context where `scale.hang_s` is off."""
    hang_s = spec.job.scale.hang_s
    if hang_s is None:
        return nullcontext()
    stacks = StackDump(run.url, context.rank, run.write_stack_dump, save_timeout_s=min(10.0, 3 * hang_s))
    return Watchdog(
        context, hang_limits(hang_s), stacks, where=run.url, response_count=lambda: run.storage.response_count
    )


def _prepare_data(spec: WorkerSpec, context: WorkerContext, run: Run, code: UserCode) -> PreparedData:
    def on_progress(text: str) -> None:
        context.progress.count += 1
        context.emit(PhaseStarted(text))

    initial_weights, fitted = find_initial_weights(spec.job, spec.storage_url), load_stored_transforms(run)
    return prepare_data(
        spec.job, spec.max_steps, initial_weights=initial_weights, fitted=fitted, on_progress=on_progress, code=code
    )


def _check_belongs_to_run(prepared: PreparedData, run: Run) -> None:
    """Raise JobError if the data or the initial weights differ from those of the run."""
    metadata = run.read_metadata()
    if metadata["fingerprint"] != prepared.dataset.fingerprint:
        raise JobError(
            "the data here is not the data of this run", where=run.url, fix="see data.root and data.url on every node"
        )
    if metadata.get("start") != (prepared.initial_weights.digest if prepared.initial_weights is not None else None):
        raise JobError("the initial weights are not those of this run", where=run.url, fix="see model.init_from")


def _build_training(
    prepared: PreparedData, built: TrainingSetup | None, context: WorkerContext, run: Run
) -> TrainingSetup:
    """Build the model and its engine, unless `built` already uses the gradient backend of the run's first attempt:
    another backend computes other bits."""
    gradient_backend = run.journal.read_state().way
    if built is not None and gradient_backend in ("", built.gradient_backend):
        return built
    return build_training(
        prepared,
        gradient_backend=gradient_backend,
        rank=context.rank,
        world_size=context.world_size,
        local_rank=context.local_rank,
    )


def _acquire_lease(run: Run, spec: WorkerSpec, context: WorkerContext, built: TrainingSetup, code: UserCode) -> Attempt:
    """Claim the next attempt, and warn of what differs from the previous one."""
    metadata: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": context.world_size,
        "way": built.gradient_backend,
        "code": {**code.digests, **code.installed_module_digests()},
        "trainyard": __version__,
        "python": platform.python_version(),
        **devices.environment_info(built.device),
    }
    if not_stored := code.find_unstored_files():
        metadata["code_not_stored"] = not_stored
        _warn_of_code_not_stored(context, not_stored)
    if spec.code_changes:
        metadata["code_changes_allowed"] = list(spec.code_changes)
    attempt = acquire_lease(
        run,
        driver=spec.driver,
        metadata=metadata,
        known_dead_attempt=spec.ended_attempt,
        on_watch=lambda text: context.emit(Message(text)),
    )
    for name in attempt.damaged_checkpoints:
        context.emit(WarningMessage(f"checkpoint {name} is damaged and not used"))
    if attempt.local_checkpoint_message:
        context.emit(Message(attempt.local_checkpoint_message))
    previous = attempt.previous_metadata
    if code.files:
        run.write_code(code.archive)
    if previous and (files := user_code.find_changed_files(_code_digests(previous), _code_digests(metadata))):
        context.emit(WarningMessage(f"code changed since the last attempt: {', '.join(files)}: the result may differ"))
    for name in ("torch", "device", "cpu_capability", "threads", "world_size") if previous else ():
        if previous.get(name) != metadata[name]:
            text = f"{name} is {metadata[name]}, was {previous.get(name)}: the result may differ in bits"
            context.emit(WarningMessage(text))
    return attempt


def _code_digests(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of all the user's code that a claim lists."""
    return {**metadata.get("code", {}), **metadata.get("code_not_stored", {})}


def _warn_of_code_not_stored(context: WorkerContext, files: Collection[str]) -> None:
    names = sorted(files)
    if names:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        text = (
            f"imported, but not stored with the run: {', '.join(names[:MAX_LISTED])}{more}; only modules that the "
            "job's code names in import statements are stored: add one, such as `import helper`, or move the code "
            "into an installed package"
        )
        context.emit(WarningMessage(text))


@dataclass(frozen=True)
class ResumeState:
    """What an attempt starts from: the same on every rank."""

    progress: TrainProgress
    bounds: StopBounds
    weights: dict[str, Tensor] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    is_over: bool = False
    attempt: int = 1


def _resume_state(attempt: Attempt, keep: int) -> ResumeState:
    """Load the checkpoint that the claim selected. Where it is the end of the run, nothing is left to train: finish
    the run directory instead."""
    bounds = StopBounds(attempt.end_step, attempt.highest_step)
    checkpoint = attempt.local_checkpoint or attempt.resume_checkpoint
    if checkpoint is None:
        return ResumeState(TrainProgress(), bounds, attempt=attempt.number)
    progress = _read_progress(checkpoint)
    if checkpoint.is_final:
        finish_ended_run(attempt, keep)
        return ResumeState(progress, bounds, is_over=True, attempt=attempt.number)
    with attempt.reading_resume_checkpoint():
        return ResumeState(progress, bounds, checkpoint.load_weights(), checkpoint.load_state(), attempt=attempt.number)


def _read_progress(checkpoint: ResumeCheckpoint) -> TrainProgress:
    url = checkpoint.url
    try:
        progress = validate_as(TrainProgress, checkpoint.position)
    except ValueError as error:
        raise StorageError(f"its position cannot be used: {error}", where=url, fix="use another --name") from None
    if progress.step != checkpoint.step:
        raise StorageError(f"its position is step {progress.step}, not {checkpoint.step}", where=url)
    return progress


def _train(
    prepared: PreparedData, built: TrainingSetup, context: WorkerContext, reporter: RankReporter, resume: ResumeState
) -> TrainProgress:
    """Build the loaders of this rank and train from `resume` on.

    Raises
    ------
    Interrupted: a signal asked to stop, and the run is saved.
    """
    job, schedule, rank, world_size = prepared.job, prepared.schedule, context.rank, context.world_size
    last_step = resume.bounds.ended_at or schedule.last_step
    step, num_evaluations = resume.progress.step, schedule.evaluation_number(last_step)
    workers = f"{world_size} workers, {built.device}" if world_size > 1 else str(built.device)
    context.emit(TrainingStarted(step, last_step, num_evaluations, workers, resume.attempt))
    track = context.progress.track
    splits = {
        split: track(build_eval_loader(prepared, built, split, rank=rank, world_size=world_size))
        for split in prepared.evaluation_splits
    }
    with build_train_loader(
        prepared, built, first_step=step + 1, last_step=last_step, rank=rank, world_size=world_size
    ) as loader:
        batches = _BatchTracker(track(loader))
        with _annotate_errors(batches, job, context, str(built.device)):
            progress, signal_number = fit(
                built.engine, schedule, batches, splits, reporter, context, resume.progress, resume.bounds
            )
    if signal_number:
        raise Interrupted(
            f"stopped at step {progress.step} of {last_step}, and saved",
            signal_number=signal_number,
            fix="the same command resumes from there",
        )
    return progress


class _BatchTracker:
    """The batches of a rank; keeps the step and the number of samples of the latest one."""

    def __init__(self, batches: Iterable[BatchLike]) -> None:
        self._batches = batches
        self.step: int | None = None
        self.num_samples = 0

    def __iter__(self) -> Iterator[BatchLike]:
        for batch in self._batches:
            self.step, self.num_samples = batch.step, len(batch.inputs)
            yield batch


@contextmanager
def _annotate_errors(batches: _BatchTracker, job: JobConfig, context: WorkerContext, device: str) -> Iterator[None]:
    """Store the step on an error; where memory ran out, name the settings to lower.

    Raises
    ------
    OutOfMemoryError: instead of the device's own error.
    """
    try:
        yield
    except (TrainyardError, PeerFailure):
        raise
    except Exception as error:
        error.__dict__["step"] = batches.step  # the driver compares it, to detect a failure that repeats
        if not devices.is_out_of_memory(error):
            raise
        of_rank = f" of rank {context.rank}" if context.world_size > 1 else ""
        num_rows = batches.num_samples // job.members
        micro_batch = min(num_rows, job.train.micro_batch or num_rows)
        raise OutOfMemoryError(
            f"out of memory on {device}{of_rank}, with micro-batches of {micro_batch} samples"
            f" ({str(error).strip().partition(chr(10))[0][:200] or type(error).__name__})",
            where=f"train.batch_size: {job.train.batch_size}",
            fix=f"set train.micro_batch: {max(1, micro_batch // 2)} for the same result from smaller micro-batches,"
            " or lower train.batch_size; in an evaluation data.loader.eval_batch_size",
        ) from error
