"""One rank's part of one attempt, from its beginning to its end."""

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
from pipeline.runs.metric_log.schema import MetricSchema
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
"""Files that a warning names."""


def run_worker(
    spec: WorkerSpec,
    context: WorkerContext,
    *,
    prepared: PreparedData | None = None,
    built: TrainingSetup | None = None,
) -> TrainProgress:
    """One rank's whole part of one attempt. Rank 0 claims the attempt and writes the run directory.

    Parameters
    ----------
    prepared, built: what this process has loaded and built already, as this rank needs it; they are built here where
        they are missing.

    Returns
    -------
    Where the run ended.

    Raises
    ------
    Interrupted: a signal asked to stop, and the run is saved.
    BusyError: another process is writing this run.
    OutOfMemoryError: a batch did not fit.
    TrainyardError: what else went wrong; the run's journal has it too.
    """
    run = Run(Storage.open(spec.storage_url), spec.run_name)
    rank, world_size = context.rank, context.world_size

    with _watchdog_for(spec, context, run), ExitStack() as stack:
        # Build: the same data, model and schedule on every rank.
        code = spec.code or user_code.collect_user_code(spec.job)
        stack.enter_context(code.activated())
        prepared = prepared or _prepare_data(spec, context, run, code)
        _check_belongs_to_run(prepared, run)
        way = run.journal.read_state().way  # that of the first attempt: another one gives other bits
        if built is None or way not in ("", built.gradient_backend):
            built = build_training(
                prepared, gradient_backend=way, rank=rank, world_size=world_size, local_rank=context.local_rank
            )
        trainee, plan = built.engine, prepared.schedule

        # Claim: rank 0 acquires the run, and every rank learns from it where to start.
        attempt = None
        if rank == 0:
            attempt = _acquire_lease(run, spec, context, built, prepared.code)
            stack.callback(attempt.close)
            context.progress.attempt = attempt.number
            if attempt.heartbeat is not None:
                context.progress.release_run = attempt.heartbeat.stop
        start = context.broadcast(_resume_state(attempt, spec.job.checkpoint.keep) if attempt is not None else None)
        context.progress.attempt = start.attempt
        if start.is_over:
            return start.progress
        reporter, recorder, not_stored = RankReporter(context), None, dict[str, str]()
        if attempt is not None:
            recorder = AsyncRunWriter(attempt, keep=spec.job.checkpoint.keep)
            stack.callback(recorder.close)
            reporter = Rank0Reporter(context, trainee, plan, recorder, attempt, prepared.fitted.to_json())
            stack.enter_context(record_exit(recorder, reporter))
            not_stored = prepared.code.find_unstored_files()

        # Restore.
        if start.weights is not None:
            trainee.load_state_dict(start.weights, start.state)

        # Train.
        last_step = start.bounds.ended_at or plan.last_step
        workers = f"{world_size} workers, {built.device}" if world_size > 1 else str(built.device)
        context.emit(
            TrainingStarted(start.progress.step, last_step, plan.evaluation_number(last_step), workers, start.attempt)
        )
        count = context.progress.track
        splits = {
            split: count(build_eval_loader(prepared, built, split, rank=rank, world_size=world_size))
            for split in prepared.evaluation_splits
        }
        first_step = start.progress.step + 1
        with build_train_loader(
            prepared, built, first_step=first_step, last_step=last_step, rank=rank, world_size=world_size
        ) as loader:
            batches = _BatchTracker(count(loader))
            with _annotate_errors(batches, spec.job, context, str(built.device)):
                position, signal_number = fit(
                    trainee, plan, batches, splits, reporter, context, start.progress, start.bounds
                )
        if signal_number:
            raise Interrupted(
                f"stopped at step {position.step} of {last_step}, and saved",
                signal_number=signal_number,
                fix="the same command goes on from there",
            )

        # Report: to the cluster, and on rank 0 the end of the run.
        context.report({"step": position.step, **(position.metrics or {})}, last=True)
        if recorder is not None:
            _warn_of_code_not_stored(context, prepared.code.find_unstored_files().keys() - not_stored.keys())
            recorder.finish()
        return position


def hang_limits(hang_s: float) -> HangTimeouts:
    """How long a process may make no progress. Storage that is away is given up before, by itself: at its own limit,
    once the request that was under way then has failed too."""
    return HangTimeouts(hang_s, storage_s=get_limit_s() + request_timeout_s(2 * PART_BYTES))


def _watchdog_for(spec: WorkerSpec, context: WorkerContext, run: Run) -> AbstractContextManager[object]:
    """The watchdog of this thread, where the job wants it."""
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

    start, fitted = find_initial_weights(spec.job, spec.storage_url), load_stored_transforms(run)
    return prepare_data(
        spec.job, spec.max_steps, initial_weights=start, fitted=fitted, on_progress=on_progress, code=code
    )


def _check_belongs_to_run(prepared: PreparedData, run: Run) -> None:
    """Raise JobError where the data, the initial weights or the metrics are not those of the run."""
    facts = run.read_metadata()
    if facts["fingerprint"] != prepared.dataset.fingerprint:
        raise JobError(
            "the data here is not the data of this run", where=run.url, fix="see data.root and data.url on every node"
        )
    if facts.get("start") != (prepared.initial_weights.digest if prepared.initial_weights is not None else None):
        raise JobError("the weights to start from are not those of this run", where=run.url, fix="see model.init_from")
    if unlogged := MetricSchema.from_job(prepared.job, prepared.fitted.num_outputs).columns_missing_from(
        MetricSchema.from_metadata(facts)
    ):
        raise JobError(
            f"this run was begun by a version that did not measure {', '.join(unlogged)}",
            where=run.url,
            fix="use another --name, or end it with the version that began it",
        )


def _acquire_lease(run: Run, spec: WorkerSpec, context: WorkerContext, built: TrainingSetup, code: UserCode) -> Attempt:
    """Claim the next attempt, and warn of what differs from the one before."""
    facts: dict[str, Any] = {
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
        facts["code_not_stored"] = not_stored
        _warn_of_code_not_stored(context, not_stored)
    if spec.code_changes:
        facts["code_changes_allowed"] = list(spec.code_changes)
    attempt = acquire_lease(
        run,
        driver=spec.driver,
        metadata=facts,
        known_dead_attempt=spec.ended_attempt,
        on_watch=lambda text: context.emit(Message(text)),
    )
    for name in attempt.damaged_checkpoints:
        context.emit(WarningMessage(f"checkpoint {name} is damaged and not used"))
    if attempt.local_checkpoint_message:
        context.emit(Message(attempt.local_checkpoint_message))
    before = attempt.previous_metadata
    if code.files:
        run.write_code(code.archive)
    if before and (files := user_code.find_changed_files(_code_digests(before), _code_digests(facts))):
        context.emit(WarningMessage(f"code changed since the last attempt: {', '.join(files)}: the result may differ"))
    for name in ("torch", "device", "cpu_capability", "threads", "world_size") if before else ():
        if before.get(name) != facts[name]:
            text = f"{name} is {facts[name]}, was {before.get(name)}: the result may differ in bits"
            context.emit(WarningMessage(text))
    return attempt


def _code_digests(facts: Mapping[str, Any]) -> dict[str, str]:
    """Digests of all the user's code that an attempt named in its claim."""
    return {**facts.get("code", {}), **facts.get("code_not_stored", {})}


def _warn_of_code_not_stored(context: WorkerContext, files: Collection[str]) -> None:
    names = sorted(files)
    if names:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        text = (
            f"imported, but not stored with the run: {', '.join(names[:MAX_LISTED])}{more}; only what the job's code "
            "names in import statements is: add one, such as `import helper`, or move it into an installed package"
        )
        context.emit(WarningMessage(text))


@dataclass(frozen=True)
class ResumeState:
    """Where an attempt begins: the same on every rank."""

    progress: TrainProgress
    bounds: StopBounds
    weights: dict[str, Tensor] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    is_over: bool = False
    attempt: int = 1


def _resume_state(attempt: Attempt, keep: int) -> ResumeState:
    """What the claim found to resume from. An attempt based on an end has nothing left to train."""
    bounds = StopBounds(attempt.end_step, attempt.highest_step)
    base = attempt.local_checkpoint or attempt.resume_checkpoint
    if base is None:
        return ResumeState(TrainProgress(), bounds, attempt=attempt.number)
    position = _read_progress(base)
    if base.is_final:
        finish_ended_run(attempt, keep)
        return ResumeState(position, bounds, is_over=True, attempt=attempt.number)
    with attempt.reading_resume_checkpoint():
        return ResumeState(position, bounds, base.load_weights(), base.load_state(), attempt=attempt.number)


def _read_progress(base: ResumeCheckpoint) -> TrainProgress:
    try:
        position = validate_as(TrainProgress, base.position)
    except ValueError as error:
        raise StorageError(f"its position cannot be used: {error}", where=base.url, fix="use another --name") from None
    if position.step != base.step:
        raise StorageError(f"its position is step {position.step}, not {base.step}", where=base.url)
    return position


class _BatchTracker:
    """The batches of a rank; notes step and rows of the one that was handed out last."""

    def __init__(self, batches: Iterable[BatchLike]) -> None:
        self._batches = batches
        self.step: int | None = None
        self.num_rows = 0

    def __iter__(self) -> Iterator[BatchLike]:
        for batch in self._batches:
            self.step, self.num_rows = batch.step, len(batch.inputs)
            yield batch


@contextmanager
def _annotate_errors(batches: _BatchTracker, job: JobConfig, context: WorkerContext, device: str) -> Iterator[None]:
    """Note on an error which step it was in; where memory ran out, say what to lower.

    Raises
    ------
    OutOfMemoryError: instead of the device's own error.
    """
    try:
        yield
    except (TrainyardError, PeerFailure):
        raise
    except Exception as error:
        error.__dict__["step"] = batches.step  # tells a failure that repeats itself
        if not devices.is_out_of_memory(error):
            raise
        of_rank = f" of rank {context.rank}" if context.world_size > 1 else ""
        micro_batch = min(batches.num_rows, job.train.micro_batch or batches.num_rows)
        raise OutOfMemoryError(
            f"out of memory on {device}{of_rank}, with pieces of {micro_batch} samples"
            f" ({str(error).strip().partition(chr(10))[0][:200] or type(error).__name__})",
            where=f"train.batch_size: {job.train.batch_size}",
            fix=f"set train.micro_batch: {max(1, micro_batch // 2)} for the same result from smaller pieces,"
            " or lower train.batch_size; in an evaluation data.loader.eval_batch_size",
        ) from error
