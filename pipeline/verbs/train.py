"""`train`: run a job, or go on with a run that was interrupted."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.assembly import Prepared, build, prepare
from pipeline.context import Alone, StopSignals, Tell
from pipeline.data.split import splits_table
from pipeline.errors import BusyError, InputError, TrainyardError
from pipeline.followers.attached import AttachedFollowers
from pipeline.job import IN_PLACE_WORKERS, Job, digest, identity, plain_name
from pipeline.job_file import dump_job, load_job, parse_job, refuse_secrets
from pipeline.learn.plan import FIRST_CELL_STEPS
from pipeline.own_code import packed, sources
from pipeline.record.attempt import peek
from pipeline.record.columns import Columns
from pipeline.record.journal import Journal
from pipeline.record.run import Run
from pipeline.record.soundness import has_end
from pipeline.record.standing import Standing, standing
from pipeline.record.watch import refuse_where_it_beats
from pipeline.storage import Storage, handed
from pipeline.verbs.places import storage_url, with_whole_url
from pipeline.worker import Order, say_for_the_dead, work


def train(
    job: Job | str | Path,
    *,
    set: Mapping[str, Any] | Iterable[str] = (),  # noqa: A002 - the public name of the option
    name: str | None = None,
    storage: str | None = None,
    address: str | None = None,
    max_steps: int | None = None,
    tell: Tell = lambda event: None,
    verbose: bool = False,
) -> Standing:
    """Run a job to its end, or resume the run that it already has.

    Parameters
    ----------
    job: a job file, or a `Job`.
    set: overrides for a job file, as a mapping or as `KEY=VALUE` words.
    name: name of the run; without one the job's name and the digest of its identity.
    storage: URL that holds the runs; else TRAINYARD_STORAGE, else the job's.
    address: a Ray cluster to use instead of one of this machine's; only with workers.
    max_steps: stop after so many steps.
    tell: takes events as they happen, see `pipeline.context`.

    Returns
    -------
    How the run stands: url, status, step, best, metrics, ...

    Raises
    ------
    InputError, WorkError, BusyError, Interrupted: see `pipeline.errors`.
    """
    if not isinstance(job, Job):
        job = load_job(job, _words(set) if isinstance(set, Mapping) else set)
    else:
        refuse_secrets(job, "job")
    job = with_whole_url(job)
    root = storage_url(storage, job.storage)
    prepared = prepare(job, max_steps, storage_url=root, say=lambda text: tell({"kind": "phase", "text": text}))
    here = job.scale.workers == IN_PLACE_WORKERS
    built = build(prepared, device_kind="" if here else "cpu")  # so that what cannot be built leaves nothing behind
    begun = prepared.start.name if prepared.start is not None else ""
    misfits = [f"not taken from {begun}: {text}" for text in built.misfits]
    for text in (*prepared.warnings, *misfits):
        tell({"kind": "warning", "text": text})
    birth = _Birth.of(prepared, name, root, max_steps)
    run, driver = birth.run, uuid.uuid4().hex
    order = Order(
        job=job,
        storage_url=run.open_url,
        run_name=run.name,
        driver=driver,
        max_steps=max_steps,
        code_folder=os.getcwd(),
        environment=handed.handed(),
    )
    state = peek(run, driver)
    if state == "finished" or state == "busy":
        birth.find_or_make(tell)
    if state == "finished" and has_end(run):
        tell({"kind": "message", "text": "already finished: nothing to do"})
        return standing(run)
    if state == "busy":
        raise BusyError("another process is writing this run", where=run.url, fix="`trainyard show` says how it stands")
    with StopSignals() as signals, AttachedFollowers(run, job.follow, tell) as followers:
        if here or state == "finished":
            birth.find_or_make(tell)
            followers.start()
            work(order, Alone(tell, signals), prepared)
        else:
            from pipeline.cluster.driver import train_on_workers

            def ready() -> tuple[Order, Journal]:
                birth.find_or_make(tell)
                refuse_where_it_beats(run, driver)  # before workers are started, or waited for
                followers.start()
                return order, run.journal

            try:
                train_on_workers(ready, job.scale, tell, signals, storage_url=root, address=address, verbose=verbose)
            except TrainyardError as error:
                say_for_the_dead(run, order, error)
                raise
    return standing(run)


def _words(overrides: Mapping[str, Any]) -> list[str]:
    """As on the command line. JSON is YAML, and keeps text, numbers and null apart."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]


@dataclass
class _Birth:
    """A run that is to be found with the same identity, or made."""

    run: Run
    prepared: Prepared
    own: dict[str, Any]
    """Its identity."""
    max_steps: int | None
    told: bool = False

    @classmethod
    def of(cls, prepared: Prepared, name: str | None, root: str, max_steps: int | None) -> _Birth:
        """The run of this job; nothing is written.

        Raises
        ------
        InputError: a name that no run can have.
        """
        own = identity(
            prepared.job,
            fingerprint=prepared.source.fingerprint,
            start=_digest_of_start(prepared),
            max_steps=max_steps,
        )
        try:
            run_name = plain_name(name) if name else f"{prepared.job.name}-{digest(own)[:8]}"
        except ValueError as error:
            raise InputError(str(error), where="--name") from None
        return cls(Run(Storage.open(root), run_name), prepared, own, max_steps)

    def find_or_make(self, tell: Tell) -> None:
        """Have the run there, all that belongs to its birth included.

        Raises
        ------
        InputError: a run of that name with another identity; says what differs.
        """
        run, job, plan = self.run, self.prepared.job, self.prepared.plan
        code = sources(job)
        facts = {
            "identity": digest(self.own),
            "fingerprint": self.prepared.source.fingerprint,
            "start": _digest_of_start(self.prepared),
            "max_steps": self.max_steps,
            "total_steps": plan.last_step,
            "steps_per_epoch": plan.steps_per_epoch,
            "cell_steps": plan.cell_steps,
            "first_cell_steps": FIRST_CELL_STEPS,
            "columns": Columns.of_job(job).to_json(),
        }
        is_new = run.birth(dump_job(job), facts)
        there = facts if is_new else run.facts()
        if there["identity"] != facts["identity"]:
            self._refuse(there)
        splits = splits_table(self.prepared.splits)
        if is_new or not run.has_splits(splits):  # a kill right after the birth, or damage
            run.write_splits(splits)
        if code and (is_new or not run.has_code()):
            run.write_code(packed(code))
        if not self.told:
            self.told = True
            tell({"kind": "run", "run": run.name, "url": run.url, "text": "new run" if is_new else "found"})

    def _refuse(self, there: dict[str, Any]) -> None:
        stored = parse_job(self.run.job_yaml(), f"{self.run.url}/job.yaml")
        theirs = identity(
            stored, fingerprint=there["fingerprint"], start=there.get("start"), max_steps=there["max_steps"]
        )
        raise InputError(
            "a run of this name has another job:\n    " + "\n    ".join(differences(theirs, self.own)),
            where=self.run.url,
            fix="choose another --name, or leave it out",
        )


def _digest_of_start(prepared: Prepared) -> str | None:
    return prepared.start.digest if prepared.start is not None else None


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Where two trees differ, one line each: `train.phases.0.lr: 0.5 there, 0.1 here`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        return [
            line
            for key in keys
            for line in differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [
            line
            for number, pair in enumerate(zip(theirs, ours, strict=True))
            for line in differences(*pair, f"{path}.{number}")
        ]
    return [] if theirs == ours else [f"{path}: {theirs} there, {ours} here"]
