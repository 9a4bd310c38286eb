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

from pipeline import __version__, own_code
from pipeline import device as devices
from pipeline.assembly import Built, Prepared, build, eval_loader, prepare, stored_transforms, train_loader
from pipeline.bookkeeping import Bookkeeper, Reporter
from pipeline.context import PeerFailure, WorkerContext
from pipeline.errors import Interrupted, JobError, OutOfMemoryError, StorageError, TrainyardError
from pipeline.events import Message, PhaseStarted, TrainingStarted, WarningMessage
from pipeline.job import Job
from pipeline.loop import Batch, Bounds, Position, fit
from pipeline.own_code import UserCode
from pipeline.record.attempt import Attempt, claim
from pipeline.record.checkpoint import Base
from pipeline.record.columns import Columns
from pipeline.record.entries import typed
from pipeline.record.recorder import Recorder, complete
from pipeline.record.run import Run
from pipeline.starting import find_start
from pipeline.storage import Storage
from pipeline.storage.faults import longest_request_s, usual_limit_s
from pipeline.storage.remote import PART_BYTES
from pipeline.watchdog import Limits, Stacks, Watchdog
from pipeline.worker.leaving import leaving_word
from pipeline.worker.order import Order

MAX_LISTED = 4
"""Files that a warning names."""


def run_worker(
    order: Order, context: WorkerContext, *, prepared: Prepared | None = None, built: Built | None = None
) -> Position:
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
    run = Run(Storage.open(order.storage_url), order.run_name)
    rank, world_size = context.rank, context.world_size

    with _watchdog_for(order, context, run), ExitStack() as stack:
        # Build: the same data, model and schedule on every rank.
        code = order.code or own_code.collect(order.job)
        stack.enter_context(code.in_use())
        prepared = prepared or _prepare(order, context, run, code)
        _check_belongs_to_run(prepared, run)
        way = run.journal.state().way  # that of the first attempt: another one gives other bits
        if built is None or way not in ("", built.way):
            built = build(prepared, way=way, rank=rank, world_size=world_size, local_rank=context.local_rank)
        trainee, plan = built.trainee, prepared.plan

        # Claim: rank 0 acquires the run, and every rank learns from it where to start.
        attempt = None
        if rank == 0:
            attempt = _claim(run, order, context, built, prepared.code)
            stack.callback(attempt.close)
            context.progress.attempt = attempt.number
            if attempt.heartbeat is not None:
                context.progress.give_up = attempt.heartbeat.stop
        start = context.broadcast(_resume_state(attempt, order.job.checkpoint.keep) if attempt is not None else None)
        context.progress.attempt = start.attempt
        if start.is_over:
            return start.position
        reporter, recorder, not_stored = Reporter(context), None, dict[str, str]()
        if attempt is not None:
            recorder = Recorder(attempt, keep=order.job.checkpoint.keep)
            stack.callback(recorder.close)
            reporter = Bookkeeper(context, trainee, plan, recorder, attempt, prepared.fitted.to_json())
            stack.enter_context(leaving_word(recorder, reporter))
            not_stored = prepared.code.not_stored()

        # Restore.
        if start.weights is not None:
            trainee.load(start.weights, start.state)

        # Train.
        last_step = start.bounds.ended_at or plan.last_step
        workers = f"{world_size} workers, {built.device}" if world_size > 1 else str(built.device)
        context.emit(
            TrainingStarted(start.position.step, last_step, plan.evaluation(last_step), workers, start.attempt)
        )
        count = context.progress.each
        splits = {
            split: count(eval_loader(prepared, built, split, rank=rank, world_size=world_size))
            for split in prepared.evaluated
        }
        first_step = start.position.step + 1
        with train_loader(
            prepared, built, first_step=first_step, last_step=last_step, rank=rank, world_size=world_size
        ) as loader:
            batches = _BatchTracker(count(loader))
            with _annotate_errors(batches, order.job, context, str(built.device)):
                position, signal_number = fit(
                    trainee, plan, batches, splits, reporter, context, start.position, start.bounds
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
            _warn_of_code_not_stored(context, prepared.code.not_stored().keys() - not_stored.keys())
            recorder.finish()
        return position


def hang_limits(hang_s: float) -> Limits:
    """How long a process may make no progress. Storage that is away is given up before, by itself: at its own limit,
    once the request that was under way then has failed too."""
    return Limits(hang_s, storage_s=usual_limit_s() + longest_request_s(2 * PART_BYTES))


def _watchdog_for(order: Order, context: WorkerContext, run: Run) -> AbstractContextManager[object]:
    """The watchdog of this thread, where the job wants it."""
    hang_s = order.job.scale.hang_s
    if hang_s is None:
        return nullcontext()
    stacks = Stacks(run.url, context.rank, run.write_stacks, save_s=min(10.0, 3 * hang_s))
    return Watchdog(context, hang_limits(hang_s), stacks, where=run.url, answers=lambda: run.storage.answers)


def _prepare(order: Order, context: WorkerContext, run: Run, code: UserCode) -> Prepared:
    def on_progress(text: str) -> None:
        context.progress.count += 1
        context.emit(PhaseStarted(text))

    start, fitted = find_start(order.job, order.storage_url), stored_transforms(run)
    return prepare(order.job, order.max_steps, start=start, fitted=fitted, say=on_progress, code=code)


def _check_belongs_to_run(prepared: Prepared, run: Run) -> None:
    """Raise JobError where the data, the initial weights or the metrics are not those of the run."""
    facts = run.facts()
    if facts["fingerprint"] != prepared.source.fingerprint:
        raise JobError(
            "the data here is not the data of this run", where=run.url, fix="see data.root and data.url on every node"
        )
    if facts.get("start") != (prepared.start.digest if prepared.start is not None else None):
        raise JobError("the weights to start from are not those of this run", where=run.url, fix="see model.init_from")
    if unlogged := Columns.of_job(prepared.job, prepared.fitted.outputs).beyond(Columns.from_facts(facts)):
        raise JobError(
            f"this run was begun by a version that did not measure {', '.join(unlogged)}",
            where=run.url,
            fix="use another --name, or end it with the version that began it",
        )


def _claim(run: Run, order: Order, context: WorkerContext, built: Built, code: UserCode) -> Attempt:
    """Claim the next attempt, and warn of what differs from the one before."""
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": context.world_size,
        "way": built.way,
        "code": {**code.digests, **code.installed()},
        "trainyard": __version__,
        "python": platform.python_version(),
        **devices.facts(built.device),
    }
    if not_stored := code.not_stored():
        facts["code_not_stored"] = not_stored
        _warn_of_code_not_stored(context, not_stored)
    if order.code_changes:
        facts["code_changes_allowed"] = list(order.code_changes)
    attempt = claim(
        run,
        driver=order.driver,
        facts=facts,
        dead=order.dead_attempt,
        on_watch=lambda text: context.emit(Message(text)),
    )
    for name in attempt.damaged:
        context.emit(WarningMessage(f"checkpoint {name} is damaged and not used"))
    if attempt.remark:
        context.emit(Message(attempt.remark))
    before = attempt.previous_facts
    if code.files:
        run.write_code(code.archive)
    if before and (files := own_code.changed(_code_digests(before), _code_digests(facts))):
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

    position: Position
    bounds: Bounds
    weights: dict[str, Tensor] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    is_over: bool = False
    attempt: int = 1


def _resume_state(attempt: Attempt, keep: int) -> ResumeState:
    """What the claim found to resume from. An attempt based on an end has nothing left to train."""
    bounds = Bounds(attempt.ended_at, attempt.highest_step)
    base = attempt.spooled or attempt.base
    if base is None:
        return ResumeState(Position(), bounds, attempt=attempt.number)
    position = _position(base)
    if base.end:
        complete(attempt, keep)
        return ResumeState(position, bounds, is_over=True, attempt=attempt.number)
    with attempt.reading_base():
        return ResumeState(position, bounds, base.weights(), base.state(), attempt=attempt.number)


def _position(base: Base) -> Position:
    try:
        position = typed(Position, base.position)
    except ValueError as error:
        raise StorageError(f"its position cannot be used: {error}", where=base.url, fix="use another --name") from None
    if position.step != base.step:
        raise StorageError(f"its position is step {position.step}, not {base.step}", where=base.url)
    return position


class _BatchTracker:
    """The batches of a rank; notes step and rows of the one that was handed out last."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.step: int | None = None
        self.num_rows = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self.step, self.num_rows = batch.step, len(batch.inputs)
            yield batch


@contextmanager
def _annotate_errors(batches: _BatchTracker, job: Job, context: WorkerContext, device: str) -> Iterator[None]:
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
