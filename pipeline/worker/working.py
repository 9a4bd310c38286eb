"""One rank's part of one attempt, from its beginning to its end."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline import __version__, own_code
from pipeline import device as devices
from pipeline.assembly import Built, Prepared, build, eval_loader, prepare, stored_transforms, train_loader
from pipeline.bookkeeping import Bookkeeper, Reporter
from pipeline.context import Context
from pipeline.errors import (
    Interrupted,
    JobError,
    StorageError,
)
from pipeline.loop import Bounds, Position, fit
from pipeline.own_code import UserCode
from pipeline.record.attempt import Attempt, claim
from pipeline.record.checkpoint import Base
from pipeline.record.columns import Columns
from pipeline.record.entries import typed
from pipeline.record.recorder import Recorder, complete
from pipeline.record.run import Run
from pipeline.starting import find_start
from pipeline.storage import Storage
from pipeline.worker.followed import Followed
from pipeline.worker.leaving import leaving_word
from pipeline.worker.order import Order
from pipeline.worker.watched import watched

MOST_SHOWN = 4


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
    with watched(order, context, run):
        return _work(order, context, prepared, run)


def _work(order: Order, context: Context, prepared: Prepared | None, run: Run) -> Position:
    def say(text: str) -> None:
        context.progress.count += 1
        context.tell({"kind": "phase", "text": text})

    code = order.code or own_code.collect(order.job)
    with code.in_use():
        prepared = prepared or prepare(
            order.job,
            order.max_steps,
            start=find_start(order.job, order.storage_url),
            fitted=stored_transforms(run),
            say=say,
            code=code,
        )
        return _attempt(order, context, prepared, run)


def _attempt(order: Order, context: Context, prepared: Prepared, run: Run) -> Position:
    facts = run.facts()
    if facts["fingerprint"] != prepared.source.fingerprint:
        raise JobError(
            "the data here is not the data of this run", where=run.url, fix="see data.root and data.url on every node"
        )
    if facts.get("start") != (prepared.start.digest if prepared.start is not None else None):
        raise JobError("the weights to start from are not those of this run", where=run.url, fix="see model.init_from")
    if unlogged := Columns.of_job(order.job, prepared.fitted.outputs).beyond(Columns.from_facts(facts)):
        raise JobError(
            f"this run was begun by a version that did not measure {', '.join(unlogged)}",
            where=run.url,
            fix="use another --name, or end it with the version that began it",
        )
    rank, world_size, local_rank = context.rank, context.world_size, context.local_rank
    built = build(prepared, way=run.journal.state().way, rank=rank, world_size=world_size, local_rank=local_rank)
    if context.rank != 0:
        start: Start = context.broadcast(None)
        context.progress.attempt = start.attempt
        return start.position if start.is_over else _fit(prepared, built, context, start, Reporter(context))
    attempt = _claim(run, order, context, built, prepared.code)
    context.progress.attempt = attempt.number
    if attempt.heartbeat is not None:
        context.progress.give_up = attempt.heartbeat.stop
    try:
        start = context.broadcast(_start(attempt, prepared.job.checkpoint.keep))
        if start.is_over:
            return start.position
        return _lead(prepared, built, context, start, attempt)
    finally:
        attempt.close()


def _lead(prepared: Prepared, built: Built, context: Context, start: Start, attempt: Attempt) -> Position:
    """Rank 0's part: train, keep the record, and see it through."""
    recorder = Recorder(attempt, keep=prepared.job.checkpoint.keep)
    bookkeeper = Bookkeeper(context, built.trainee, prepared.plan, recorder, attempt, prepared.fitted.to_json())
    try:
        with leaving_word(recorder, bookkeeper):
            before = prepared.code.not_stored()
            position = _fit(prepared, built, context, start, bookkeeper)
            _warn_of_code_not_stored(context, prepared.code.not_stored().keys() - before.keys())
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


def _claim(run: Run, order: Order, context: Context, built: Built, code: UserCode) -> Attempt:
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
        on_watch=lambda message: context.tell({"kind": "message", "text": message}),
    )
    for name in attempt.damaged:
        context.tell({"kind": "warning", "text": f"checkpoint {name} is damaged and not used"})
    if attempt.remark:
        context.tell({"kind": "message", "text": attempt.remark})
    before = attempt.previous_facts
    if code.files:
        run.write_code(code.archive)
    if before and (files := own_code.changed(_code_of(before), _code_of(facts))):
        text = f"code changed since the last attempt: {', '.join(files)}: the result may differ"
        context.tell({"kind": "warning", "text": text})
    for name in ("torch", "device", "cpu_capability", "threads", "world_size") if before else ():
        if before.get(name) != facts[name]:
            text = f"{name} is {facts[name]}, was {before.get(name)}: the result may differ in bits"
            context.tell({"kind": "warning", "text": text})
    return attempt


def _code_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Digests of all the user's code that an attempt named in its claim."""
    return {**facts.get("code", {}), **facts.get("code_not_stored", {})}


def _warn_of_code_not_stored(context: Context, files: Collection[str]) -> None:
    names = sorted(files)
    if names:
        more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
        text = (
            f"imported, but not stored with the run: {', '.join(names[:MOST_SHOWN])}{more}; only what the job's code "
            "names in import statements is: add one, such as `import helper`, or move it into an installed package"
        )
        context.tell({"kind": "warning", "text": text})


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
    with attempt.reading_base():
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
            "evaluations": plan.evaluation(last_step),
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
        followed = Followed(context.progress.each(batches))
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
