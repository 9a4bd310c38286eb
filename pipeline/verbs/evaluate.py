"""`evaluate`: exact metrics of a saved checkpoint."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline import loop
from pipeline.assembly import build, eval_loader, prepare
from pipeline.context import Alone
from pipeline.errors import InputError
from pipeline.job import Job, digest, identity
from pipeline.job_file import override_job, parse_job
from pipeline.own_code import named_in
from pipeline.record.checkpoint import find_checkpoint
from pipeline.record.reads import record_read
from pipeline.record.run import Run
from pipeline.verbs.places import find_run

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint is worth on a split."""

    run: str
    url: str
    checkpoint: str
    step: int
    split: str
    metrics: dict[str, float]
    """loss, accuracy, correct and samples, named `split/column`."""

    def to_json(self) -> dict[str, Any]:
        metrics = {name: None if value != value else value for name, value in self.metrics.items()}
        return {**self.__dict__, "metrics": metrics, "error": None}

    def lines(self) -> list[str]:
        at = {name.partition("/")[2]: value for name, value in self.metrics.items()}
        words = [f"{self.split} loss {at['loss']:.4f}"]
        if at["accuracy"] == at["accuracy"]:
            words.append(f"accuracy {at['accuracy']:.4f} ({at['correct']:,.0f} of {at['samples']:,.0f})")
        return [f"{self.run} at step {self.step}: {', '.join(words)}"]


def evaluate(
    run: str,
    *,
    split: str = "val",
    checkpoint: str = "best",
    set: Iterable[str] = (),  # noqa: A002 - the public name of the option
    storage: str | None = None,
    trust: bool = False,
) -> Evaluation:
    """Evaluate a run's checkpoint on a whole split. A read of the test split is recorded before it happens.

    Parameters
    ----------
    checkpoint: best, last, or the number of a step.
    set: overrides of where and how, such as data.root or scale.device; what determines the weights cannot change.
    trust: let the stored job import the modules that it names.

    Raises
    ------
    InputError: no such run, checkpoint or split, or data that is not the run's.
    """
    if split not in SPLITS:
        raise InputError(f"{split!r} is no split", where="--split", fix="train, val or test")
    found = find_run(run, storage)
    saved = find_checkpoint(found, checkpoint)
    job = _stored_job(found, list(set), trust)
    prepared = prepare(job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"limit": None})}))
    if prepared.source.fingerprint != found.facts()["fingerprint"]:
        raise InputError("the data here is not the data of this run", where=found.url, fix="see --set data.root=DIR")
    if split not in prepared.splits:
        there = ", ".join(prepared.splits)
        raise InputError(f"this run has no {split} split", where=found.url, fix=f"it has: {there}")
    built = build(prepared)
    built.trainee.flat.load(saved.weights())
    if split == "test":
        facts = {"checkpoint": saved.name, "step": saved.step, "host": socket.gethostname(), "pid": os.getpid()}
        record_read(found, facts)
    alone = Alone(lambda event: None)
    result = loop.evaluate(built.trainee, eval_loader(prepared, built, split), alone)
    metrics = {f"{split}/{name}": value for name, value in result.items()}
    return Evaluation(found.name, found.url, saved.name, saved.step, split, metrics)


def _stored_job(run: Run, overrides: list[str], trust: bool) -> Job:
    """The job as stored with the run, with overrides of where and how.

    Raises
    ------
    InputError: it names modules and is not trusted, or an override changes what the run is.
    """
    where = f"{run.url}/job.yaml"
    stored = parse_job(run.job_yaml(), where)
    named = named_in(stored)
    if named and not trust:
        raise InputError(
            f"this job would import {', '.join(named)}", where=where, fix="--trust allows it, if you trust this storage"
        )
    job = override_job(stored, overrides)
    if digest(identity(job, fingerprint="")) != digest(identity(stored, fingerprint="")):
        raise InputError(
            "an override may not change what was trained", where=f"--set {' '.join(overrides)}", fix="train a new run"
        )
    return job
