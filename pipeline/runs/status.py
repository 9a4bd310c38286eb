"""The status of a run, derived from storage alone, and `run.json`, a summary of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.runs.journal.entries import AttemptSummary, BestCheckpoint, Claim, JournalState
from pipeline.runs.lease.heartbeat import STALE_AFTER_INTERVALS, HeartbeatSample, read_heartbeat
from pipeline.runs.run import SUMMARY_FILE, Run
from pipeline.runs.serialization import from_json, seconds_since, to_json

StatusName = Literal["running", "stalled", "interrupted", "failed", "finished"]

STARTUP_GRACE_S = 120.0
"""Seconds after its creation during which an unclaimed run counts as running: a cluster may need that long to start."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The status of a run. Times are UTC, ISO 8601."""

    run: str
    url: str
    status: StatusName
    step: int
    """The last committed step, from which a resume continues."""
    epoch: int
    total_steps: int | None
    attempts: int
    best: BestCheckpoint | None
    metrics: Mapping[str, float]
    error: Mapping[str, Any] | None
    """Why the last attempt failed: type and message."""
    heartbeat: HeartbeatSample | None
    """Of the last attempt until it is over: progress that is not committed yet."""
    started: str | None
    """Time of the first claim."""
    updated: str | None
    """Time of the last journal entry."""
    checkpoint: str | None
    """Name of the last committed checkpoint."""
    stopped_early: bool = False
    """Whether a finished run ended before its last step, because `best.patience` was used up."""
    evaluations_since_best: int | None = None
    """As of the last commit."""
    skipped_updates: int | None = None
    """For fp16: updates skipped up to the last commit because their gradient was not finite."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Location of the last attempt: host, world_size, device, and since when."""
    seen_s: float | None = None
    """Seconds since the last heartbeat or journal entry, by this machine's clock."""
    damaged: tuple[str, ...] = ()
    """Missing or damaged files of the run's directory, one line each; only `show` checks for them."""

    @property
    def latest_step(self) -> int:
        """The last known step: a running attempt is ahead of its last checkpoint."""
        if self.heartbeat is None or self.status not in ("running", "stalled"):
            return self.step
        return max(self.step, self.heartbeat.step)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in the form of `--json` and `run.json`."""
        tree: dict[str, Any] = from_json(to_json(asdict(self)))
        return tree


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run in a listing."""

    status: RunStatus
    job: str
    """Name of its job."""
    created_at: str
    """When the run was created; UTC, ISO 8601."""
    differs: Mapping[str, Any]
    """What distinguishes it from the other runs of its job in the same storage: fields of the job, such as
    "train.phases.0.lr", and the digests of the data if the fields of two runs are equal."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values: those of the status, and the additional fields."""
        return {**self.status.to_json(), "job": self.job, "born": self.created_at, "differs": dict(self.differs)}


def read_run_status(run: Run, now_s: float | None = None) -> RunStatus:
    """Read the status of a run.

    Parameters
    ----------
    now_s: seconds since 1970 (default: this machine's clock), by which the age of heartbeats is computed.
    """
    state = run.journal.read_state()
    claim = state.claim
    heartbeat = read_heartbeat(run.storage, claim.attempt)[1] if claim is not None and not state.is_over else None
    clock_s = time.time() if now_s is None else now_s
    update_times = [state.updated or run.created_at(), *([heartbeat.time] if heartbeat is not None else [])]
    seen_s = max(0.0, min(seconds_since(update_time, clock_s) for update_time in update_times))
    return replace(
        status_from_journal(run, state, heartbeat, _status_name(run, state, heartbeat, clock_s)),
        seen_s=round(seen_s, 1),
    )


def status_from_journal(
    run: Run, state: JournalState, heartbeat: HeartbeatSample | None, status: StatusName
) -> RunStatus:
    """Build the status from the state of the journal."""
    claim, commit, exit_entry = state.claim, state.commit, state.leave
    total_steps = run.read_metadata().get("total_steps")
    return RunStatus(
        run=run.name,
        url=run.url,
        status=status,
        step=commit.step if commit is not None else 0,
        epoch=commit.epoch if commit is not None else 0,
        total_steps=total_steps,
        attempts=claim.attempt if claim is not None else 0,
        best=commit.best if commit is not None else None,
        metrics=commit.metrics if commit is not None else {},
        error=exit_entry.error if exit_entry is not None else None,
        heartbeat=heartbeat,
        started=state.started or None,
        updated=state.updated or None,
        checkpoint=commit.checkpoint if commit is not None else None,
        stopped_early=commit is not None and commit.end and total_steps is not None and commit.step < total_steps,
        evaluations_since_best=commit.patience if commit is not None else None,
        skipped_updates=commit.skipped_updates if commit is not None else None,
        where=_location(claim) if claim is not None else {},
    )


def _location(claim: Claim) -> dict[str, Any]:
    return {"since": claim.time, **{name: claim.facts.get(name) for name in ("host", "world_size", "device")}}


def write_summary(run: Run, state: JournalState, status: StatusName) -> None:
    """Write `run.json`, a summary that can be rebuilt from the other files. Protocols read only the number of the last
    journal entry from it, as the start of their search."""
    run.storage.replace(SUMMARY_FILE, encode_summary(run, state, status))


def encode_summary(run: Run, state: JournalState, status: StatusName) -> bytes:
    """Return `run.json` as a function of the journal: the status, the metadata of the creation, and one line per recent
    attempt."""
    tree = status_from_journal(run, state, None, status).to_json()
    del tree["heartbeat"], tree["seen_s"], tree["damaged"]
    creation = {"time": run.created_at(), **run.read_metadata()}
    tree |= {"journal": state.number, "birth": creation, "history": _attempt_history(run, state.attempts)}
    return (to_json(tree, indent=1) + "\n").encode()


def _status_name(run: Run, state: JournalState, heartbeat: HeartbeatSample | None, clock_s: float) -> StatusName:
    if state.leave is not None:
        return state.leave.status
    if state.commit is not None and state.commit.end:
        return "finished"  # also while a later attempt writes the files that follow from it
    claim = state.claim
    if claim is None:
        return "running" if seconds_since(run.created_at(), clock_s) < STARTUP_GRACE_S else "interrupted"
    interval_s = heartbeat.interval_s if heartbeat is not None else claim.interval_s
    age_s = seconds_since(heartbeat.time if heartbeat is not None else claim.time, clock_s)
    return "stalled" if age_s > STALE_AFTER_INTERVALS * interval_s else "running"


def _attempt_history(run: Run, summaries: Sequence[AttemptSummary]) -> list[dict[str, Any]]:
    """Return one mapping per attempt: where it ran and the last step that it committed."""
    claims = run.journal.read_claims(summary.claim for summary in summaries)
    return [
        {
            **({"attempt": claim.attempt, "claimed": claim.time} if claim is not None else {}),
            "committed": summary.committed,
            "outcome": summary.outcome,
            **(claim.facts if claim is not None else {}),
        }
        for summary, claim in zip(summaries, claims, strict=True)
    ]
