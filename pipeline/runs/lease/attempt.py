"""Attempts: taking over a run, after making sure that no other process writes it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.errors import BusyError, InputError, SupersededError
from pipeline.runs import local_fallback
from pipeline.runs.checkpoints.checkpoint import (
    Checkpoint,
    DamagedError,
    ResumeCheckpoint,
    find_first_valid,
    has_pickled_state,
)
from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import CheckpointPair, Claim, JournalEntry, JournalState
from pipeline.runs.lease import process_lock as lock
from pipeline.runs.lease.heartbeat import Heartbeat, get_interval_s
from pipeline.runs.lease.liveness import is_heartbeat_fresh, is_proven_stopped, make_busy_error, watch_heartbeat
from pipeline.runs.run import Run
from pipeline.runs.serialization import utc_now


@dataclass
class Attempt:
    """One attempt to train a run, from its claim on. Only rank 0 has one."""

    run: Run
    number: int
    nonce: str
    state: JournalState
    """The state of the journal after this attempt's last entry."""
    resume_checkpoint: ResumeCheckpoint | None = None
    """The checkpoint to resume from; None: start at step 0."""
    retained: tuple[CheckpointPair, ...] = ()
    """The pairs retained by the previous commit that this attempt still retains, newest first."""
    damaged_checkpoints: list[str] = field(default_factory=list)
    """Checkpoints in the journal that are not valid, for a message to the user."""
    local_checkpoint: Checkpoint | None = None
    """A checkpoint that an earlier attempt saved on this machine when storage was lost: the attempt resumes from it
    instead, and commits it first."""
    local_checkpoint_message: str = ""
    """A message to the user about the local checkpoint."""
    previous_metadata: Mapping[str, Any] = field(default_factory=dict)
    """The metadata of the previous attempt's claim; empty for the first attempt."""
    heartbeat: Heartbeat | None = None
    lock: lock.ProcessLock | None = None

    @property
    def end_step(self) -> int | None:
        """The step of a final commit, at which this attempt must end too."""
        return self.state.ended_at

    @property
    def highest_step(self) -> int:
        """The journal's highest committed step; there is no early stop below it."""
        return self.state.highest_step

    def append(self, entry: JournalEntry) -> None:
        """Create this attempt's next entry.

        Raises
        ------
        SupersededError: another attempt took the number; this one must not write any more.
        """
        while not self.run.journal.append(entry):
            taken = self.run.journal.read_entry(entry.number)
            if taken.nonce != self.nonce:
                raise self._superseded_error()
            # An earlier entry of this attempt, abandoned when storage was unavailable, was stored after all.
            self.state = decisions.apply_entry(self.state, taken)
            entry = replace(entry, number=entry.number + 1, before=self.state)
        self.state = decisions.apply_entry(self.state, entry)

    @contextmanager
    def reading_resume_checkpoint(self) -> Iterator[None]:
        """Context for reading the checkpoint to resume from, which a later attempt may delete.

        Raises
        ------
        SupersededError: a later attempt has taken over.
        DamagedError: the checkpoint is damaged.
        """
        try:
            yield
        except DamagedError:
            last_claim = self.run.journal.read_state().claim
            if last_claim is not None and last_claim.attempt > self.number:
                raise self._superseded_error() from None
            raise

    def _superseded_error(self) -> SupersededError:
        return SupersededError(
            f"attempt {self.number} was presumed dead, and a later attempt has taken over",
            where=self.run.url,
            fix="nothing is lost; `trainyard show` prints the status of the run",
        )

    def next_entry_fields(self) -> dict[str, Any]:
        """Return the common fields of this attempt's next entry."""
        common = {"nonce": self.nonce, "time": utc_now(), "attempt": self.number}
        return {"number": self.state.number + 1, "before": self.state, **common}

    def update_heartbeat(self, step: int, loss: float | None) -> None:
        """Set the content of the next heartbeat. Does not block."""
        if self.heartbeat is not None:
            self.heartbeat.update(step, loss)

    def close(self) -> None:
        """Stop the heartbeat and release the lock."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
        if self.lock is not None:
            self.lock.release(remove=self.state.is_over)


def acquire_lease(
    run: Run,
    *,
    driver: str,
    metadata: Mapping[str, Any],
    known_dead_attempt: int | None = None,
    on_watch: Callable[[str], None] | None = None,
) -> Attempt:
    """Take over a run: at once if certainly no process writes it, else after watching an unchanged heartbeat.

    Parameters
    ----------
    driver: nonce of the driver process.
    metadata: host, pid, world size, versions, ...; stored with the claim.
    known_dead_attempt: number of an attempt of this driver that the driver has proven dead.
    on_watch: receives one line if the heartbeat has to be watched.

    Raises
    ------
    BusyError: another process writes the run, or claimed it first.
    InputError: an earlier version wrote its checkpoints (see `refuse_pickled_state`).
    """
    nonce = secrets.token_hex(16)
    interval_s = get_interval_s()
    try:
        held_lock = lock.ProcessLock(nonce)  # held before the claim is visible, so that a free lock is proof
    except OSError:
        held_lock = None  # without a temporary folder, other processes have to watch the heartbeat
    attempt: Attempt | None = None
    try:
        template = Claim(
            number=0,
            nonce=nonce,
            time="",
            attempt=0,
            driver=driver,
            boot=lock.read_boot_id() if held_lock is not None else "",
            lock=held_lock.path if held_lock is not None else "",
            interval_s=interval_s,
            facts=dict(metadata),
        )
        attempt = append_claim(run, template, known_dead_attempt, on_watch)
        attempt.lock = held_lock
        attempt.heartbeat = Heartbeat(run.storage, attempt.number, interval_s)
        attempt.heartbeat.start()
        select_resume_checkpoint(attempt)
        for previous in run.journal.read_claims(summary.claim for summary in attempt.state.attempts[-2:-1]):
            attempt.previous_metadata = previous.facts if previous is not None else {}
        local_save = local_fallback.find_local_checkpoint(run, attempt.resume_checkpoint, attempt.state)
        attempt.local_checkpoint, attempt.local_checkpoint_message = local_save.checkpoint, local_save.message
        attempt.update_heartbeat(attempt.resume_checkpoint.step if attempt.resume_checkpoint is not None else 0, None)
        run.storage.remove_temporary()
    except BaseException as error:
        if attempt is not None:
            attempt.close()
        elif held_lock is not None:
            # Only after these errors is it certain that no claim was stored that needs the lock as proof.
            held_lock.release(remove=isinstance(error, BusyError) or type(error) is InputError)
        raise
    return attempt


def append_claim(
    run: Run, template: Claim, known_dead_attempt: int | None = None, on_watch: Callable[[str], None] | None = None
) -> Attempt:
    """Append a claim like `template` to the journal as soon as that is allowed. No checkpoint is selected yet.

    Raises
    ------
    BusyError: another process writes the run, or claimed it first.
    InputError: an earlier version wrote its checkpoints (see `refuse_pickled_state`).
    """
    while True:
        state = run.journal.read_state()
        last_claim = state.claim
        if (
            last_claim is not None
            and not state.is_over
            and not is_proven_stopped(last_claim, template.driver, known_dead_attempt)
        ):
            watch_heartbeat(run, last_claim, template.interval_s, on_watch or (lambda _line: None))
        refuse_pickled_state(run, state)  # if a commit comes later, the append below fails and this is checked again
        attempt = (last_claim.attempt if last_claim is not None else 0) + 1
        run.journal.raise_if_gap()
        new_claim = replace(template, number=state.number + 1, time=utc_now(), attempt=attempt, before=state)
        if run.journal.append(new_claim):
            if last_claim is not None:
                lock.delete_stale_lock(last_claim)
            return Attempt(run, attempt, new_claim.nonce, decisions.apply_entry(state, new_claim))
        winner = run.journal.read_entry(new_claim.number)
        if isinstance(winner, Claim):
            raise make_busy_error(run, winner, "has just taken over this run")
        # A commit or exit of the older attempt took the number. It was alive until now: check again.


def select_resume_checkpoint(attempt: Attempt) -> None:
    """Select the checkpoint to resume from: the first valid one of those that the newest commit retains.

    Must be called after the claim: from then on no older attempt can commit, so no newer checkpoint is missed.
    """
    commit = attempt.state.commit
    if commit is None:
        return
    attempt.resume_checkpoint, attempt.damaged_checkpoints = find_first_valid(attempt.run, commit.kept)
    attempt.retained = (
        decisions.retained_from(commit.kept, attempt.resume_checkpoint.name)
        if attempt.resume_checkpoint is not None
        else ()
    )


def refuse_pickled_state(run: Run, state: JournalState | None = None) -> None:
    """Refuse to resume from a checkpoint of an earlier version, whose optimizer state is a pickle. Nothing is written.

    A finished run needs no optimizer state: missing results are still completed.

    Parameters
    ----------
    state: the state of the run's journal; read if not given.

    Raises
    ------
    InputError: training would resume from such a checkpoint.
    """
    state = state if state is not None else run.journal.read_state()
    kept = state.commit.kept if state.commit is not None else ()
    if not (has_pickled_state(run, kept) or local_fallback.has_pickled_state(run)):
        return
    committed, _ = find_first_valid(run, kept)
    checkpoint = (
        committed if committed is not None else local_fallback.find_local_checkpoint(run, None, state).checkpoint
    )
    if checkpoint is None or not checkpoint.has_pickled_state or (committed is not None and committed.is_final):
        return
    source_run = run.name if committed is not None else checkpoint.run_url
    raise InputError(
        "this run was started by an earlier version of Trainyard, and this version cannot resume its checkpoints "
        f"(step {checkpoint.step} stores its optimizer state as state.pt)",
        where=checkpoint.url,
        fix="finish it with the version that started it, or start a new run from its weights with model.init_from: "
        f"{source_run}@last",
    )


def probe_lease(run: Run, driver: str = "") -> Literal["free", "finished", "busy", "unproven"]:
    """Whether a claim would succeed, without writing or waiting.

    free: yes. finished: the newest commit is final (files that follow from it may be missing). busy: a process of this
    machine holds the run, and its heartbeat is fresh. unproven: only watching the heartbeat can decide.
    """
    if not run.exists():
        return "free"
    state = run.journal.read_state()
    if state.commit is not None and state.commit.end:
        return "finished"
    last_claim = state.claim
    if last_claim is None or state.is_over or (driver and last_claim.driver == driver):
        return "free"
    held = lock.is_held(last_claim)
    if held is False:
        return "free"
    return "busy" if held and is_heartbeat_fresh(run, last_claim) else "unproven"
