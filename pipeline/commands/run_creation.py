"""Find the run of a job by its identity, or create it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import JobConfig, compute_identity, digest_tree, validate_name
from pipeline.config.files import dump_job, parse_job
from pipeline.errors import InputError
from pipeline.events import EventHandler, Message, RunOpened
from pipeline.runs.lease.attempt import probe_lease
from pipeline.runs.metric_log.schema import MetricSchema
from pipeline.runs.run import Run, digest_splits
from pipeline.storage import Storage
from pipeline.training.schedule import FIRST_SEGMENT_STEPS
from pipeline.user_code import UserCode, find_changed_files

if TYPE_CHECKING:  # a command that finds its run finished needs neither torch nor the data
    from pipeline.setup import PreparedData


@dataclass
class RunCreation:
    """The run of a job, to be found by its identity or created."""

    run: Run
    job: JobConfig
    code: UserCode
    name: str | None
    """The name that the user chose."""
    fingerprint: str
    """Fingerprint of the data."""
    initial_weights_digest: str | None
    """Digest of the initial weights, if they are loaded."""
    max_steps: int | None
    allow_code_change: bool
    identity: dict[str, Any]
    """What determines the weights, except the user code."""
    has_announced: bool = False
    """Whether `RunOpened` was emitted."""
    code_changes: tuple[str, ...] = ()
    """Files of the user code that changed since the run's last attempt, as the user allowed."""

    @classmethod
    def from_job(
        cls,
        job: JobConfig,
        code: UserCode,
        *,
        fingerprint: str,
        initial_weights_digest: str | None,
        name: str | None,
        storage_url: str,
        max_steps: int | None,
        allow_code_change: bool,
    ) -> RunCreation:
        """Determine the run of a job. Writes nothing.

        Raises
        ------
        InputError: `name` is not a valid name.
        """
        run_identity = compute_identity(
            job, fingerprint=fingerprint, initial_weights_digest=initial_weights_digest, max_steps=max_steps
        )
        try:
            run_name = validate_name(name) if name else _default_run_name(job, _with_code(run_identity, code.digests))
        except ValueError as error:
            raise InputError(str(error), where="--name") from None
        run = Run(Storage.open(storage_url), run_name)
        return cls(
            run, job, code, name, fingerprint, initial_weights_digest, max_steps, allow_code_change, run_identity
        )

    def with_fingerprint(self, fingerprint: str) -> RunCreation:
        """Return the run of the same job on data with another fingerprint."""
        return RunCreation.from_job(
            self.job,
            self.code,
            fingerprint=fingerprint,
            initial_weights_digest=self.initial_weights_digest,
            name=self.name,
            storage_url=self.run.open_url,
            max_steps=self.max_steps,
            allow_code_change=self.allow_code_change,
        )

    def exists(self) -> bool:
        """Return whether the run exists with this identity.

        Raises
        ------
        InputError: it exists, but its user code has changed.
        """
        if not self.run.exists():
            return False
        metadata = self.run.read_metadata()
        if metadata["identity"] != digest_tree(_with_code(self.identity, metadata.get("code") or {})):
            return False
        self._check_matches(metadata)
        return True

    def is_complete(self) -> bool:
        """Return whether the run, which must exist, has finished and none of its files are missing."""
        from pipeline.runs.integrity import is_finalized

        run = self.run
        return (
            probe_lease(run) == "finished"
            and is_finalized(run)
            and run.has_original_splits()
            and (not self.code.files or run.has_code())
        )

    def find_or_create(self, prepared: PreparedData, on_event: EventHandler) -> None:
        """Find the run, or create it, with its splits and user code.

        Raises
        ------
        InputError: a run of that name has another identity or other code; names the differences.
        """
        from pipeline.data.dataset import splits_to_table

        run, job, schedule, code = self.run, self.job, prepared.schedule, self.code
        splits = splits_to_table(prepared.splits)
        metadata = {
            "identity": digest_tree(_with_code(self.identity, code.digests)),
            "fingerprint": self.fingerprint,
            "start": self.initial_weights_digest,
            "max_steps": self.max_steps,
            "total_steps": schedule.last_step,
            "steps_per_epoch": schedule.steps_per_epoch,
            "cell_steps": schedule.segment_steps,
            "first_cell_steps": FIRST_SEGMENT_STEPS,
            "columns": MetricSchema.from_job(job, prepared.metric_columns).to_json(),
            "splits": digest_splits(splits),
            **({"code": code.digests} if code.files else {}),
        }
        is_new = run.create(dump_job(job), metadata)
        if is_new:
            self._emit_older_run_notice(on_event)
        else:
            self._check_matches(run.read_metadata())
        if is_new or not run.has_splits(splits):  # a kill right after the creation, or damage
            run.write_splits(splits)
        if code.files and (is_new or not run.has_code()):
            run.write_code(code.archive)
        if not self.has_announced:
            self.has_announced = True
            on_event(RunOpened(run.name, run.url, is_new))

    def _check_matches(self, metadata: dict[str, Any]) -> None:
        """Check that the existing run has this identity, and that its last attempt ran this code.

        Raises
        ------
        InputError: it differs; names the differences.
        """
        created_code = metadata.get("code") or {}
        if metadata["identity"] != digest_tree(_with_code(self.identity, created_code)):
            self._raise_mismatch(metadata)
        code, journal = self.code, self.run.journal
        state = journal.read_state()
        last_claim = next(iter(journal.read_claims(summary.claim for summary in state.attempts[-1:])), None)
        claim_metadata = last_claim.facts if last_claim is not None else {"code": created_code}
        modules = code.installed_module_digests()
        before = {path: sha for path, sha in claim_metadata.get("code", {}).items() if path not in modules}
        files = [
            *find_changed_files(before, code.digests),
            *code.find_edited_files(claim_metadata.get("code_not_stored", {})),
        ]
        is_finished = state.commit is not None and state.commit.end
        if files and (is_finished or not self.allow_code_change):
            hint = "" if is_finished else "; --allow-code-change resumes it nevertheless"
            raise InputError(
                f"the code changed since this run {'ended' if is_finished else 'last ran'}: {', '.join(files)}",
                where=self.run.url,
                fix=f"restore the code, or leave --name out: with other code it is a new run{hint}",
            )
        self.code_changes = tuple(files)

    def _emit_older_run_notice(self, on_event: EventHandler) -> None:
        """Emit a notice if the job has a run by an earlier version, whose identity did not include the code."""
        if not self.code.files:
            return
        older = Run(Storage.open(self.run.open_url), _default_run_name(self.job, self.identity))
        if older.name != self.run.name and older.exists():
            text = (
                f"{older.name} is a run of this job by an earlier version, which did not distinguish edits of the "
                f"code; it is not changed, and --name {older.name} resumes it"
            )
            on_event(Message(text))

    def _raise_mismatch(self, metadata: dict[str, Any]) -> None:
        stored = parse_job(self.run.read_job_yaml(), f"{self.run.url}/job.yaml")
        stored_identity = compute_identity(
            stored,
            fingerprint=metadata["fingerprint"],
            initial_weights_digest=metadata.get("start"),
            max_steps=metadata["max_steps"],
        )
        raise InputError(
            "a run of this name has another job:\n    "
            + "\n    ".join(
                list_differences(stored_identity, self.identity)
                or ["another version of Trainyard computed its identity differently"]
            ),
            where=self.run.url,
            fix="choose another --name, or leave it out",
        )


def _with_code(identity: dict[str, Any], code: Mapping[str, str]) -> dict[str, Any]:
    return {**identity, "code": dict(code)} if code else identity


def _default_run_name(job: JobConfig, identity: dict[str, Any]) -> str:
    return f"{job.name}-{digest_tree(identity)[:8]}"


def list_differences(stored: Any, current: Any, path: str = "") -> list[str]:
    """Return one line for each difference of two trees: `train.phases.0.lr: 0.5 in the run, 0.1 now`."""
    if isinstance(stored, dict) and isinstance(current, dict):
        keys = [*stored, *(key for key in current if key not in stored)]
        return [
            line
            for key in keys
            for line in list_differences(stored.get(key), current.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(stored, list) and isinstance(current, list) and len(stored) == len(current):
        return [
            line
            for number, pair in enumerate(zip(stored, current, strict=True))
            for line in list_differences(*pair, f"{path}.{number}")
        ]
    return [] if stored == current else [f"{path}: {stored} in the run, {current} now"]
