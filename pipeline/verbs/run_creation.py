"""The run that a command means: found with the same identity, or created."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.events import EventHandler, Message, RunOpened
from pipeline.job import Job, digest, identity, plain_name
from pipeline.job_file import dump_job, parse_job
from pipeline.learn.plan import FIRST_CELL_STEPS
from pipeline.own_code import UserCode, changed
from pipeline.record.attempt import peek
from pipeline.record.columns import Columns
from pipeline.record.run import Run, splits_digest
from pipeline.storage import Storage

if TYPE_CHECKING:  # who finds that nothing is left to do needs neither torch nor the data
    from pipeline.assembly import Prepared


@dataclass
class RunCreation:
    """A run that is to be found with the same identity, or created."""

    run: Run
    job: Job
    code: UserCode
    name: str | None
    """That the user chose."""
    fingerprint: str
    """Of the data."""
    start: str | None
    """Digest of the weights to start from, where they come from elsewhere."""
    max_steps: int | None
    allow_code_change: bool
    identity: dict[str, Any]
    """What determines the weights, but for the code."""
    announced: bool = False
    code_changes: tuple[str, ...] = ()
    """Files of the user's own code that changed since the run's last attempt, which the user allowed."""

    @classmethod
    def of(
        cls,
        job: Job,
        code: UserCode,
        *,
        fingerprint: str,
        start: str | None,
        name: str | None,
        storage_url: str,
        max_steps: int | None,
        allow_code_change: bool,
    ) -> RunCreation:
        """The run of this job; nothing is written.

        Raises
        ------
        InputError: a name that no run can have.
        """
        run_identity = identity(job, fingerprint=fingerprint, start=start, max_steps=max_steps)
        try:
            run_name = plain_name(name) if name else _name_of(job, _with_code(run_identity, code.digests))
        except ValueError as error:
            raise InputError(str(error), where="--name") from None
        run = Run(Storage.open(storage_url), run_name)
        return cls(run, job, code, name, fingerprint, start, max_steps, allow_code_change, run_identity)

    def of_data(self, fingerprint: str) -> RunCreation:
        """The same for data of another fingerprint."""
        return RunCreation.of(
            self.job,
            self.code,
            fingerprint=fingerprint,
            start=self.start,
            name=self.name,
            storage_url=self.run.open_url,
            max_steps=self.max_steps,
            allow_code_change=self.allow_code_change,
        )

    def is_there(self) -> bool:
        """Whether the run exists, with this identity and this code."""
        if not self.run.exists():
            return False
        metadata = self.run.facts()
        if metadata["identity"] != digest(_with_code(self.identity, metadata.get("code") or {})):
            return False
        self._check(metadata)
        return True

    def is_complete(self) -> bool:
        """Whether the run, which is there, has ended and nothing of what belongs to it is missing."""
        from pipeline.record.soundness import has_end

        run = self.run
        return (
            peek(run) == "finished"
            and has_end(run)
            and run.has_first_splits()
            and (not self.code.files or run.has_code())
        )

    def find_or_create(self, prepared: Prepared, on_event: EventHandler) -> None:
        """Have the run there, all that belongs to its creation included.

        Raises
        ------
        InputError: a run of that name with another identity, or other code; says what differs.
        """
        from pipeline.data.split import splits_table

        run, job, schedule, code = self.run, self.job, prepared.plan, self.code
        splits = splits_table(prepared.splits)
        metadata = {
            "identity": digest(_with_code(self.identity, code.digests)),
            "fingerprint": self.fingerprint,
            "start": self.start,
            "max_steps": self.max_steps,
            "total_steps": schedule.last_step,
            "steps_per_epoch": schedule.steps_per_epoch,
            "cell_steps": schedule.cell_steps,
            "first_cell_steps": FIRST_CELL_STEPS,
            "columns": Columns.of_job(job, prepared.fitted.outputs).to_json(),
            "splits": splits_digest(splits),
            **({"code": code.digests} if code.files else {}),
        }
        is_new = run.birth(dump_job(job), metadata)
        if is_new:
            self._tell_of_older(on_event)
        else:
            self._check(run.facts())
        if is_new or not run.has_splits(splits):  # a kill right after the creation, or damage
            run.write_splits(splits)
        if code.files and (is_new or not run.has_code()):
            run.write_code(code.archive)
        if not self.announced:
            self.announced = True
            on_event(RunOpened(run.name, run.url, is_new))

    def _check(self, there: dict[str, Any]) -> None:
        """Whether the run that is there is one of this job, and of the code that its last attempt ran."""
        created_code = there.get("code") or {}
        if there["identity"] != digest(_with_code(self.identity, created_code)):
            self._refuse(there)
        code, journal = self.code, self.run.journal
        state = journal.state()
        last_claim = next(iter(journal.claims(summary.claim for summary in state.attempts[-1:])), None)
        claim_metadata = last_claim.facts if last_claim is not None else {"code": created_code}
        modules = code.installed()
        before = {path: sha for path, sha in claim_metadata.get("code", {}).items() if path not in modules}
        files = [*changed(before, code.digests), *code.edited(claim_metadata.get("code_not_stored", {}))]
        is_finished = state.commit is not None and state.commit.end
        if files and (is_finished or not self.allow_code_change):
            hint = "" if is_finished else "; --allow-code-change goes on with it all the same"
            raise InputError(
                f"the code changed since this run {'ended' if is_finished else 'last ran'}: {', '.join(files)}",
                where=self.run.url,
                fix=f"restore it, or leave --name out: with other code it is a new run{hint}",
            )
        self.code_changes = tuple(files)

    def _tell_of_older(self, on_event: EventHandler) -> None:
        """Versions before did not count the code: say so where the same job has such a run."""
        if not self.code.files:
            return
        older = Run(Storage.open(self.run.open_url), _name_of(self.job, self.identity))
        if older.name != self.run.name and older.exists():
            text = (
                f"{older.name} is a run of this job by an earlier version, which did not tell edits of the code apart; "
                f"it is left as it is, and --name {older.name} goes on with it"
            )
            on_event(Message(text))

    def _refuse(self, there: dict[str, Any]) -> None:
        stored = parse_job(self.run.job_yaml(), f"{self.run.url}/job.yaml")
        stored_identity = identity(
            stored, fingerprint=there["fingerprint"], start=there.get("start"), max_steps=there["max_steps"]
        )
        raise InputError(
            "a run of this name has another job:\n    "
            + "\n    ".join(
                differences(stored_identity, self.identity) or ["another version of Trainyard identified it otherwise"]
            ),
            where=self.run.url,
            fix="choose another --name, or leave it out",
        )


def _with_code(identity: dict[str, Any], code: Mapping[str, str]) -> dict[str, Any]:
    return {**identity, "code": dict(code)} if code else identity


def _name_of(job: Job, identity: dict[str, Any]) -> str:
    return f"{job.name}-{digest(identity)[:8]}"


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
