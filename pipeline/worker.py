"""What one worker does for one attempt: build, claim, restore, fit, and leave the record in order."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pipeline import __version__, own_code
from pipeline import device as devices
from pipeline.assembly import Built, Prepared, build, eval_loader, prepare, train_loader
from pipeline.bookkeeping import Bookkeeper, Reporter
from pipeline.context import Context, PeerLost
from pipeline.errors import (
    BusyError,
    Interrupted,
    JobError,
    OutOfMemoryError,
    StorageError,
    StorageLostError,
    SupersededError,
    TrainyardError,
)
from pipeline.job import Job
from pipeline.loop import Batch, Bounds, Position, fit
from pipeline.record import decisions
from pipeline.record.attempt import Attempt, claim
from pipeline.record.checkpoint import Base
from pipeline.record.decisions import first_facts
from pipeline.record.entries import typed
from pipeline.record.recorder import LAST_WORD_S, Recorder, complete
from pipeline.record.run import Run
from pipeline.record.standing import last_leave
from pipeline.storage import Storage
from pipeline.storage.faults import longest_request_s, usual_limit_s
from pipeline.storage.remote import PART_BYTES
from pipeline.watchdog import Limits, Stacks, Watchdog


@dataclass(frozen=True)
class Order:
    """What a driver asks of its workers; picklable."""

    job: Job
    storage_url: str = field(repr=False)  # it may hold a password
    run_name: str
    driver: str
    """Nonce of the driving process."""
    max_steps: int | None = None
    dead_attempt: int | None = None
    """An attempt of this driver's whose workers are known to have ended."""
    code_folder: str = ""
    """Where the user's own modules lie."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What the driver was handed, see `pipeline.storage.handed`. (Ray writes an order's repr down.)"""


def work(order: Order, context: Context, prepared: Prepared | None = None) -> Position:
    """One rank's whole part of one attempt. Rank 0 claims the attempt and keeps its record.

    Returns
    -------
    Where the run ended.

    Raises
    ------
    Interrupted: a signal asked to stop, and the run is saved.
    BusyError: another process is writing this run.
    TrainyardError: what else went wrong; it stands in the run's journal.
    """
    run = Run(Storage.open(order.storage_url), order.run_name)
    with _watched(order, context, run):
        return _work(order, context, prepared, run)


def _work(order: Order, context: Context, prepared: Prepared | None, run: Run) -> Position:
    def say(text: str) -> None:
        context.progress.count += 1
        context.tell({"kind": "phase", "text": text})

    own_code.make_importable(order.job, order.code_folder)
    prepared = prepared or prepare(order.job, order.max_steps, storage_url=order.storage_url, say=say)
    facts = run.facts()
    if facts["fingerprint"] != prepared.source.fingerprint:
        raise JobError(
            "the data here is not the data of this run", where=run.url, fix="see data.root and data.url on every node"
        )
    if facts.get("start") != (prepared.start.digest if prepared.start is not None else None):
        raise JobError("the weights to start from are not those of this run", where=run.url, fix="see model.init_from")
    rank, world_size, local_rank = context.rank, context.world_size, context.local_rank
    way = str(first_facts(run.journal.read()).get("way", ""))
    built = build(prepared, way=way, rank=rank, world_size=world_size, local_rank=local_rank)
    if context.rank != 0:
        start: Start = context.broadcast(None)
        context.progress.attempt = start.attempt
        return start.position if start.is_over else _fit(prepared, built, context, start, Reporter(context))
    attempt = _claim(run, order, context, built)
    context.progress.attempt = attempt.number
    try:
        start = context.broadcast(_start(attempt, prepared.job.checkpoint.keep))
        if start.is_over:
            return start.position
        return _lead(prepared, built, context, start, attempt, facts["cell_steps"])
    finally:
        attempt.close()


def _lead(
    prepared: Prepared, built: Built, context: Context, start: Start, attempt: Attempt, cell_steps: int
) -> Position:
    """Rank 0's part: train, keep the record, and see it through."""
    recorder = Recorder(attempt, cell_steps=cell_steps, keep=prepared.job.checkpoint.keep)
    bookkeeper = Bookkeeper(context, built.trainee, prepared.plan, recorder, attempt, prepared.fitted.to_json())
    try:
        with _leaving_word(recorder, bookkeeper):
            position = _fit(prepared, built, context, start, bookkeeper)
            recorder.finish()
            return position
    finally:
        recorder.close()


@dataclass(frozen=True)
class Start:
    """Where an attempt begins: the same on every rank."""

    position: Position
    bounds: Bounds
    weights: dict[str, Tensor] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    is_over: bool = False
    attempt: int = 1


def _claim(run: Run, order: Order, context: Context, built: Built) -> Attempt:
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": context.world_size,
        "way": built.way,
        "code": own_code.digests(order.job),
        "trainyard": __version__,
        "python": platform.python_version(),
        **devices.facts(built.device),
    }
    attempt = claim(
        run,
        driver=order.driver,
        facts=facts,
        dead=order.dead_attempt,
        on_watch=lambda message: context.tell({"kind": "message", "text": message}),
    )
    for name in attempt.damaged:
        context.tell({"kind": "warning", "text": f"checkpoint {name} is damaged and not used"})
    if attempt.remark:
        context.tell({"kind": "message", "text": attempt.remark})
    before = attempt.previous_facts
    if before and (files := own_code.changed(before.get("code", {}), facts["code"])):
        text = f"code changed since the last attempt: {', '.join(files)}: the result may differ"
        context.tell({"kind": "warning", "text": text})
    for name in ("torch", "device", "cpu_capability", "threads", "world_size") if before else ():
        if before.get(name) != facts[name]:
            text = f"{name} is {facts[name]}, was {before.get(name)}: the result may differ in bits"
            context.tell({"kind": "warning", "text": text})
    return attempt


def _start(attempt: Attempt, keep: int) -> Start:
    """What the claim found to go on from. An attempt based on an end has nothing left to train."""
    bounds = Bounds(attempt.ended_at, attempt.highest_step)
    base = attempt.spooled or attempt.base
    if base is None:
        return Start(Position(), bounds, attempt=attempt.number)
    position = _position(base)
    if base.end:
        complete(attempt, keep)
        return Start(position, bounds, is_over=True)
    return Start(position, bounds, base.weights(), base.state(), attempt=attempt.number)


def _position(base: Base) -> Position:
    try:
        position = typed(Position, base.position)
    except ValueError as error:
        raise StorageError(f"its position cannot be used: {error}", where=base.url, fix="use another --name") from None
    if position.step != base.step:
        raise StorageError(f"its position is step {position.step}, not {base.step}", where=base.url)
    return position


def _fit(prepared: Prepared, built: Built, context: Context, start: Start, recorder: Reporter) -> Position:
    """Train from `start` to the end.

    Raises
    ------
    Interrupted: a signal asked to stop; the recorder has saved.
    OutOfMemoryError: a batch did not fit.
    """
    if start.weights is not None:
        built.trainee.load(start.weights, start.state)
    plan = prepared.plan
    last_step = start.bounds.ended_at or plan.last_step
    workers = f"{context.world_size} workers, {built.device}" if context.world_size > 1 else str(built.device)
    context.tell(
        {
            "kind": "start",
            "step": start.position.step,
            "last_step": last_step,
            "workers": workers,
            "attempt": start.attempt,
        }
    )
    rank, world_size = context.rank, context.world_size
    splits = {
        split: context.progress.each(eval_loader(prepared, built, split, rank=rank, world_size=world_size))
        for split in prepared.evaluated
    }
    first_step = start.position.step + 1
    with train_loader(
        prepared, built, first_step=first_step, last_step=last_step, rank=rank, world_size=world_size
    ) as batches:
        followed = _Followed(context.progress.each(batches))
        with followed.saying_where(prepared.job, context, str(built.device)):
            position, signal_number = fit(
                built.trainee, plan, followed, splits, recorder, context, start.position, start.bounds
            )
    if signal_number:
        raise Interrupted(
            f"stopped at step {position.step} of {last_step}, and saved",
            signal_number=signal_number,
            fix="the same command goes on from there",
        )
    context.report({"step": position.step, **(position.metrics or {})}, last=True)
    return position


class _Followed:
    """The batches of a rank, and the step of the one that was handed out last."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._step: int | None = None
        self._rows = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self._step, self._rows = batch.step, len(batch.inputs)
            yield batch

    @contextmanager
    def saying_where(self, job: Job, context: Context, device: str) -> Iterator[None]:
        """Note on an error which step it was in; make one of memory say what to lower."""
        try:
            yield
        except (TrainyardError, PeerLost):
            raise
        except Exception as error:
            error.__dict__["step"] = self._step  # for who looks whether it repeats itself
            if not devices.is_out_of_memory(error):
                raise
            of_rank = f" of rank {context.rank}" if context.world_size > 1 else ""
            piece = min(self._rows, job.train.micro_batch or self._rows)
            raise OutOfMemoryError(
                f"out of memory on {device}{of_rank}, with pieces of {piece} samples"
                f" ({str(error).strip().partition(chr(10))[0][:200] or type(error).__name__})",
                where=f"train.batch_size: {job.train.batch_size}",
                fix=f"set train.micro_batch: {max(1, piece // 2)} for the same result from smaller pieces,"
                " or lower train.batch_size; in an evaluation data.loader.eval_batch_size",
            ) from error


def limits(hang_s: float) -> Limits:
    """How long a process may stand still. Storage that is away is given up before, by itself: at its own limit, once
    the request that was under way then has failed too."""
    return Limits(hang_s, storage_s=usual_limit_s() + longest_request_s(2 * PART_BYTES))


def _watched(order: Order, context: Context, run: Run) -> AbstractContextManager[object]:
    """Have this thread watched, where the job wants it."""
    hang_s = order.job.scale.hang_s
    if hang_s is None:
        return nullcontext()
    stacks = Stacks(run.url, context.rank, run.write_stacks, save_s=min(10.0, 3 * hang_s))
    return Watchdog(context, limits(hang_s), stacks, where=run.url, answers=lambda: run.storage.answers)


@contextmanager
def _leaving_word(recorder: Recorder, bookkeeper: Bookkeeper) -> Iterator[None]:
    """Write into the journal why an attempt leaves before the end."""
    try:
        yield
    except SupersededError:
        raise
    except Interrupted:
        recorder.leave("interrupted", None, bookkeeper.step)
        raise
    except PeerLost as error:  # the driver starts again, or says why not
        recorder.leave("interrupted", error, bookkeeper.step)
        raise
    except Exception as error:
        recorder.leave("failed", error, bookkeeper.step)
        raise


def say_for_the_dead(run: Run, order: Order, error: TrainyardError) -> None:
    """Write into the journal why a driver gives up, where its last workers died before they could, or could not know:
    as an attempt of its own, for only what has claimed a run writes its journal."""
    if isinstance(error, StorageLostError):  # what it says of the work that is saved elsewhere must not wait
        run = run.within(LAST_WORD_S)
    with suppress(BusyError, StorageLostError):  # then another has the run, or nobody can be told
        if run.exists():
            _say_for_the_dead(run, order, error)


def _say_for_the_dead(run: Run, order: Order, error: TrainyardError) -> None:
    entries = run.journal.read()
    last = decisions.last_claim(entries)
    if last is None or last.driver != order.driver or decisions.ended_at(entries) is not None:
        return
    status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, Interrupted) else "failed"
    left = last_leave(entries)
    if left is not None and left.status == status and (left.error or {}).get("type") in (None, type(error).__name__):
        return  # the workers have said so themselves
    attempt = claim(run, driver=order.driver, facts=last.facts, dead=last.attempt)
    try:
        recorder = Recorder(attempt, cell_steps=run.facts()["cell_steps"], keep=order.job.checkpoint.keep)
        recorder.leave(status, error, attempt.highest_step)
        recorder.close()
    finally:
        attempt.close()
