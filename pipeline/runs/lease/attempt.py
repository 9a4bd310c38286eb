"""Attempts: taking a run over, and proving that nobody else writes it."""

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
    """One life of a run, from its claim on. Only rank 0 has one."""

    run: Run
    number: int
    nonce: str
    state: JournalState
    """What the journal amounts to, up to this attempt's own last entry."""
    resume_checkpoint: ResumeCheckpoint | None = None
    """The checkpoint to go on from; None: begin at step 0."""
    retained: tuple[CheckpointPair, ...] = ()
    """What the commit before the next one kept and this attempt still counts on, newest first."""
    damaged_checkpoints: list[str] = field(default_factory=list)
    """Checkpoints that the journal names but that are not sound, for a message to the user."""
    local_checkpoint: Checkpoint | None = None
    """What an earlier attempt on this machine saved when storage was lost: to go on from in place of the base, and to
    commit first."""
    local_checkpoint_message: str = ""
    """What to tell the user of it."""
    previous_metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the attempt before this one said of its surroundings; empty for the first."""
    heartbeat: Heartbeat | None = None
    lock: lock.ProcessLock | None = None

    @property
    def end_step(self) -> int | None:
        """The step of an end that binds this attempt."""
        return self.state.ended_at

    @property
    def highest_step(self) -> int:
        """The journal's highest committed step; no early stop below it."""
        return self.state.highest_step

    def append(self, entry: JournalEntry) -> None:
        """Create this attempt's next entry.

        Raises
        ------
        SupersededError: another attempt took the number; from here on this one writes nothing.
        """
        while not self.run.journal.append(entry):
            taken = self.run.journal.read_entry(entry.number)
            if taken.nonce != self.nonce:
                raise self._superseded_error()
            # An earlier entry of this attempt, given up when storage was away, did arrive.
            self.state = decisions.apply_entry(self.state, taken)
            entry = replace(entry, number=entry.number + 1, before=self.state)
        self.state = decisions.apply_entry(self.state, entry)

    @contextmanager
    def reading_resume_checkpoint(self) -> Iterator[None]:
        """While entered, the base is read. One that vanishes may have been deleted by a later attempt.

        Raises
        ------
        SupersededError: so it is.
        DamagedError: it is damaged.
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
            f"attempt {self.number} was taken for dead, and a later one has taken over",
            where=self.run.url,
            fix="nothing is lost; `trainyard show` says how the run stands",
        )

    def next_entry_fields(self) -> dict[str, Any]:
        """What this attempt's next entry has in common with all others."""
        common = {"nonce": self.nonce, "time": utc_now(), "attempt": self.number}
        return {"number": self.state.number + 1, "before": self.state, **common}

    def update_heartbeat(self, step: int, loss: float | None) -> None:
        """What the next heartbeat says. Costs nothing."""
        if self.heartbeat is not None:
            self.heartbeat.update(step, loss)

    def close(self) -> None:
        """Stop the heartbeat and let go of the lock."""
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
    """Take a run over: at once if nobody writes it for certain, else after watching its heartbeat in vain.

    Parameters
    ----------
    driver: nonce of the driving process.
    facts: host, pid, world size, versions, ...; stored with the claim.
    dead: number of an attempt of this driver's that it has proven dead itself.
    on_watch: takes one line where it comes to watching.

    Raises
    ------
    BusyError: another process writes the run, or was quicker.
    InputError: an earlier version wrote its checkpoints (see `refuse_pickled_state`).
    """
    nonce = secrets.token_hex(16)
    interval_s = get_interval_s()
    try:
        own_lock = lock.ProcessLock(nonce)  # held before the claim can be seen, so that a free one is proof
    except OSError:
        own_lock = None  # without a temporary folder others have to watch instead
    attempt: Attempt | None = None
    try:
        template = Claim(
            number=0,
            nonce=nonce,
            time="",
            attempt=0,
            driver=driver,
            boot=lock.read_boot_id() if own_lock is not None else "",
            lock=own_lock.path if own_lock is not None else "",
            interval_s=interval_s,
            facts=dict(metadata),
        )
        attempt = append_claim(run, template, known_dead_attempt, on_watch)
        attempt.lock = own_lock
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
        elif own_lock is not None:
            # Only who was refused for certain has no claim that needs the proof.
            own_lock.release(remove=isinstance(error, BusyError) or type(error) is InputError)
        raise
    return attempt


def append_claim(
    run: Run, template: Claim, known_dead_attempt: int | None = None, on_watch: Callable[[str], None] | None = None
) -> Attempt:
    """Append a claim like `template` to the journal, once that is allowed. The attempt has no base yet.

    Raises
    ------
    BusyError: another process writes the run, or was quicker.
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
        refuse_pickled_state(run, state)  # of a later commit the append below fails, and this is asked again
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
        # A commit or leave of the older attempt took the number. It lives, or did until now: look again.


def select_resume_checkpoint(attempt: Attempt) -> None:
    """Choose what to go on from: the first sound one of what the newest commit keeps.

    Only ever after the claim: from then on no older attempt can commit, so no later one is overlooked.
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

    A finished run needs no state: what is missing of its results is still completed.

    Parameters
    ----------
    state: what the run's journal amounts to; read if not given.

    Raises
    ------
    InputError: training would go on from such a checkpoint.
    """
    state = state if state is not None else run.journal.read_state()
    kept = state.commit.kept if state.commit is not None else ()
    if not (has_pickled_state(run, kept) or local_fallback.has_pickled_state(run)):
        return
    base, _ = find_first_valid(run, kept)
    found = base if base is not None else local_fallback.find_local_checkpoint(run, None, state).checkpoint
    if found is None or not found.has_pickled_state or (base is not None and base.is_final):
        return
    weights_of = run.name if base is not None else found.run_url
    raise InputError(
        "this run was begun by an earlier version of Trainyard, and this version cannot resume its checkpoints "
        f"(step {found.step} stores its optimizer state as state.pt)",
        where=found.url,
        fix="finish it with the version that began it, or start a new run from its weights with model.init_from: "
        f"{weights_of}@last",
    )


def probe_lease(run: Run, driver: str = "") -> Literal["free", "finished", "busy", "unproven"]:
    """Whether a claim would succeed, without writing or waiting.

    free: yes. finished: the newest commit is the end (what follows from it may be missing). busy: a process of this
    machine holds the run, and its heart beats. unproven: only watching will tell.
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
