"""`train`: run a job, or go on with a run that was interrupted."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.assembly import Prepared, build, prepare
from pipeline.context import Alone, StopSignals, Tell
from pipeline.data.split import splits_table
from pipeline.device import leave_as_found
from pipeline.errors import BusyError, InputError, TrainyardError
from pipeline.followers.attached import AttachedFollowers
from pipeline.job import IN_PLACE_WORKERS, Job, digest, identity, plain_name
from pipeline.job_file import dump_job, parse_job, resolve_job
from pipeline.own_code import UserCode, changed, collect
from pipeline.record.attempt import peek
from pipeline.record.columns import Columns
from pipeline.record.decisions import last_claim, newest_commit
from pipeline.record.journal import Journal
from pipeline.record.run import Run
from pipeline.record.soundness import has_end
from pipeline.record.standing import Standing, standing
from pipeline.record.watch import refuse_where_it_beats
from pipeline.storage import Storage, handed
from pipeline.verbs.places import storage_url, with_whole_url
from pipeline.worker import Order, say_for_the_dead, work


def train(
    job: Job | Mapping[str, Any] | str | Path,
    *,
    set: Mapping[str, Any] | Iterable[str] = (),  # noqa: A002 - the public name of the option
    name: str | None = None,
    storage: str | None = None,
    address: str | None = None,
    max_steps: int | None = None,
    allow_code_change: bool = False,
    tell: Tell = lambda event: None,
    verbose: bool = False,
) -> Standing:
    """Run a job to its end, or resume the run that it already has.

    It leaves the calling process as it found it: torch's threads, flags, default type and random generators, the import
    path, signal handlers and environment.

    Parameters
    ----------
    job: a job file, its content as a dict (`code` and other paths relative to the working directory), or a `Job`.
    set: overrides, as a mapping or as `KEY=VALUE` words.
    name: name of the run; without one the job's name and the digest of its identity.
    storage: URL that holds the runs; else TRAINYARD_STORAGE, else the job's.
    address: a Ray cluster to use instead of one of this machine's; only with workers.
    max_steps: stop after so many steps.
    allow_code_change: go on with the run of this `name` although the user's own code was edited since; which files is
        recorded in the run.
    tell: takes events as they happen, see `pipeline.context`.

    Returns
    -------
    How the run stands: url, status, step, best, metrics, ...

    Raises
    ------
    InputError, WorkError, BusyError, Interrupted: see `pipeline.errors`.
    """
    if allow_code_change and name is None:
        raise InputError(
            "goes with --name RUN: without a name the same command is a new run after an edit of the code",
            where="--allow-code-change",
            fix="add --name RUN, or leave it out",
        )
    job = with_whole_url(resolve_job(job, _words(set) if isinstance(set, Mapping) else set))
    code = collect(job)
    with code.in_use(), leave_as_found():
        return _train(job, code, name, storage, address, max_steps, allow_code_change, tell, verbose)


def _train(
    job: Job,
    code: UserCode,
    name: str | None,
    storage: str | None,
    address: str | None,
    max_steps: int | None,
    allow_code_change: bool,
    tell: Tell,
    verbose: bool,
) -> Standing:
    root = storage_url(storage, job.storage)
    prepared = prepare(
        job, max_steps, storage_url=root, say=lambda text: tell({"kind": "phase", "text": text}), code=code
    )
    here = job.scale.workers == IN_PLACE_WORKERS
    built = build(prepared, device_kind="" if here else "cpu")  # so that what cannot be built leaves nothing behind
    begun = prepared.start.name if prepared.start is not None else ""
    misfits = [f"not taken from {begun}: {text}" for text in built.misfits]
    for text in (*prepared.warnings, *misfits):
        tell({"kind": "warning", "text": text})
    birth = _Birth.of(prepared, name, root, max_steps, allow_code_change)
    run, driver = birth.run, uuid.uuid4().hex
    order = Order(
        job=job,
        storage_url=run.open_url,
        run_name=run.name,
        driver=driver,
        max_steps=max_steps,
        code=code,
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
            order = replace(order, code_changes=birth.code_changes)
            work(order, Alone(tell, signals), prepared)
        else:
            from pipeline.cluster.driver import train_on_workers

            def ready() -> tuple[Order, Journal]:
                birth.find_or_make(tell)
                refuse_where_it_beats(run, driver)  # before workers are started, or waited for
                followers.start()
                return replace(order, code_changes=birth.code_changes), run.journal

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
    """Its identity, but for the code."""
    max_steps: int | None
    allow_code_change: bool
    told: bool = False
    code_changes: tuple[str, ...] = ()
    """Files of the user's own code that changed since the run's last attempt, which the user allowed."""

    @classmethod
    def of(
        cls, prepared: Prepared, name: str | None, root: str, max_steps: int | None, allow_code_change: bool
    ) -> _Birth:
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
            run_name = plain_name(name) if name else _name_of(prepared.job, _with_code(own, prepared.code.digests))
        except ValueError as error:
            raise InputError(str(error), where="--name") from None
        return cls(Run(Storage.open(root), run_name), prepared, own, max_steps, allow_code_change)

    def find_or_make(self, tell: Tell) -> None:
        """Have the run there, all that belongs to its birth included.

        Raises
        ------
        InputError: a run of that name with another identity, or other code; says what differs.
        """
        run, job, plan, code = self.run, self.prepared.job, self.prepared.plan, self.prepared.code
        facts = {
            "identity": digest(_with_code(self.own, code.digests)),
            "fingerprint": self.prepared.source.fingerprint,
            "start": _digest_of_start(self.prepared),
            "max_steps": self.max_steps,
            "total_steps": plan.last_step,
            "steps_per_epoch": plan.steps_per_epoch,
            "cell_steps": plan.cell_steps,
            "columns": Columns.of_job(job).to_json(),
            **({"code": code.digests} if code.files else {}),
        }
        is_new = run.birth(dump_job(job), facts)
        if is_new:
            self._tell_of_older(tell)
        else:
            self._check(run.facts())
        splits = splits_table(self.prepared.splits)
        if is_new or not run.has_splits(splits):  # a kill right after the birth, or damage
            run.write_splits(splits)
        if code.files and (is_new or not run.has_code()):
            run.write_code(code.archive)
        if not self.told:
            self.told = True
            tell({"kind": "run", "run": run.name, "url": run.url, "text": "new run" if is_new else "found"})

    def _check(self, there: dict[str, Any]) -> None:
        """Whether the run that is there is one of this job, and of the code that its last attempt ran."""
        born_with = there.get("code") or {}
        if there["identity"] != digest(_with_code(self.own, born_with)):
            self._refuse(there)
        code = self.prepared.code
        entries = self.run.journal.read()
        claim, commit = last_claim(entries), newest_commit(entries)
        facts = claim.facts if claim is not None else {"code": born_with}
        modules = code.installed()
        before = {path: sha for path, sha in facts.get("code", {}).items() if path not in modules}
        files = [*changed(before, code.digests), *code.edited(facts.get("code_not_stored", {}))]
        is_finished = commit is not None and commit.end
        if files and (is_finished or not self.allow_code_change):
            going_on = "" if is_finished else "; --allow-code-change goes on with it all the same"
            raise InputError(
                f"the code changed since this run {'ended' if is_finished else 'last ran'}: {', '.join(files)}",
                where=self.run.url,
                fix=f"restore it, or leave --name out: with other code it is a new run{going_on}",
            )
        self.code_changes = tuple(files)

    def _tell_of_older(self, tell: Tell) -> None:
        """Versions before did not count the code: say so where the same job has such a run."""
        if not self.prepared.code.files:
            return
        older = Run(Storage.open(self.run.open_url), _name_of(self.prepared.job, self.own))
        if older.name != self.run.name and older.exists():
            text = (
                f"{older.name} is a run of this job by an earlier version, which did not tell edits of the code apart; "
                f"it is left as it is, and --name {older.name} goes on with it"
            )
            tell({"kind": "message", "text": text})

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


def _with_code(identity: dict[str, Any], code: Mapping[str, str]) -> dict[str, Any]:
    return {**identity, "code": dict(code)} if code else identity


def _name_of(job: Job, identity: dict[str, Any]) -> str:
    return f"{job.name}-{digest(identity)[:8]}"


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
