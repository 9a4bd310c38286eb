"""What one worker does for one attempt: build, claim, restore, fit, and leave the record in order."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pipeline import __version__, own_code
from pipeline import device as devices
from pipeline.assembly import Built, Prepared, build, eval_loader, prepare, train_loader
from pipeline.bookkeeping import Bookkeeper, Reporter
from pipeline.context import Context
from pipeline.errors import (
    BusyError,
    Interrupted,
    JobError,
    StorageLostError,
    SupersededError,
    TrainyardError,
    WorkerLostError,
)
from pipeline.job import Job
from pipeline.loop import Bounds, Position, fit
from pipeline.record import decisions
from pipeline.record.attempt import Attempt, claim
from pipeline.record.decisions import first_facts
from pipeline.record.recorder import Recorder, complete
from pipeline.record.run import Run
from pipeline.storage import Storage


@dataclass(frozen=True)
class Order:
    """What a driver asks of its workers; picklable."""

    job: Job
    storage_url: str
    run_name: str
    driver: str
    """Nonce of the driving process."""
    max_steps: int | None = None
    dead_attempt: int | None = None
    """An attempt of this driver's whose workers are known to have ended."""
    code_folder: str = ""
    """Where the user's own modules lie."""


def work(order: Order, context: Context, prepared: Prepared | None = None) -> None:
    """One rank's whole part of one attempt. Rank 0 claims the attempt and keeps its record.

    Raises
    ------
    Interrupted: a signal asked to stop, and the run is saved.
    BusyError: another process is writing this run.
    TrainyardError: what else went wrong; it stands in the run's journal.
    """
    own_code.make_importable(order.job, order.code_folder)
    prepared = prepared or prepare(
        order.job,
        order.max_steps,
        storage_url=order.storage_url,
        say=lambda text: context.tell({"kind": "phase", "text": text}),
    )
    run = Run(Storage.open(order.storage_url), order.run_name)
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
        if not start.is_over:
            _fit(prepared, built, context, start, Reporter(context))
        return
    attempt = _claim(run, order, context, built)
    try:
        start = context.broadcast(_start(attempt))
        if not start.is_over:
            _lead(prepared, built, context, start, attempt, facts["cell_steps"])
    finally:
        attempt.close()


def _lead(prepared: Prepared, built: Built, context: Context, start: Start, attempt: Attempt, cell_steps: int) -> None:
    """Rank 0's part: train, keep the record, and see it through."""
    recorder = Recorder(attempt, cell_steps=cell_steps, keep=prepared.job.checkpoint.keep)
    bookkeeper = Bookkeeper(context, built.trainee, prepared.plan, recorder, attempt, prepared.fitted.to_json())
    try:
        with _leaving_word(recorder, bookkeeper):
            _fit(prepared, built, context, start, bookkeeper)
            recorder.finish()
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
    before = attempt.previous_facts
    if before and (files := own_code.changed(before.get("code", {}), facts["code"])):
        text = f"code changed since the last attempt: {', '.join(files)}: the result may differ"
        context.tell({"kind": "warning", "text": text})
    for name in ("torch", "device", "cpu_capability", "threads", "world_size") if before else ():
        if before.get(name) != facts[name]:
            text = f"{name} is {facts[name]}, was {before.get(name)}: the result may differ in bits"
            context.tell({"kind": "warning", "text": text})
    return attempt


def _start(attempt: Attempt) -> Start:
    """What the claim found to go on from. An attempt based on an end has nothing left to train."""
    bounds = Bounds(attempt.ended_at, attempt.highest_step)
    base = attempt.base
    if base is None:
        return Start(Position(), bounds)
    position = Position(**base.position)
    if base.end:
        complete(attempt)
        return Start(position, bounds, is_over=True)
    return Start(position, bounds, base.weights(), base.state())


def _fit(prepared: Prepared, built: Built, context: Context, start: Start, recorder: Reporter) -> None:
    """Train from `start` to the end.

    Raises
    ------
    Interrupted: a signal asked to stop; the recorder has saved.
    """
    if start.weights is not None:
        built.trainee.load(start.weights, start.state)
    plan = prepared.plan
    last_step = start.bounds.ended_at or plan.last_step
    workers = f"{context.world_size} workers, {built.device}" if context.world_size > 1 else str(built.device)
    context.tell({"kind": "start", "step": start.position.step, "last_step": last_step, "workers": workers})
    rank, world_size = context.rank, context.world_size
    splits = {
        split: eval_loader(prepared, built, split, rank=rank, world_size=world_size) for split in prepared.evaluated
    }
    first_step = start.position.step + 1
    with train_loader(
        prepared, built, first_step=first_step, last_step=last_step, rank=rank, world_size=world_size
    ) as batches:
        position, signal_number = fit(
            built.trainee, plan, batches, splits, recorder, context, start.position, start.bounds
        )
    if signal_number:
        raise Interrupted(
            f"stopped at step {position.step} of {last_step}, and saved",
            signal_number=signal_number,
            fix="the same command goes on from there",
        )


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
    except Exception as error:
        recorder.leave("failed", error, bookkeeper.step)
        raise


def say_for_the_dead(run: Run, order: Order, error: TrainyardError) -> None:
    """Write into the journal why a driver gives up, where its last workers died before they could, or could not know:
    as an attempt of its own, for only what has claimed a run writes its journal."""
    entries = run.journal.read()
    last = decisions.last_claim(entries)
    knows_better = isinstance(error, WorkerLostError)
    if last is None or last.driver != order.driver or (decisions.is_over(entries) and not knows_better):
        return
    with suppress(BusyError, StorageLostError):  # then another has the run, or nobody can be told
        attempt = claim(run, driver=order.driver, facts=last.facts, dead=last.attempt)
        try:
            status: Literal["interrupted", "failed"] = "interrupted" if isinstance(error, Interrupted) else "failed"
            recorder = Recorder(attempt, cell_steps=run.facts()["cell_steps"], keep=order.job.checkpoint.keep)
            recorder.leave(status, error, attempt.highest_step)
            recorder.close()
        finally:
            attempt.close()
