"""How a run stands, from storage alone; and `run.json`, the view of it that lies beside the truth."""

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
"""A run that was born so recently and never claimed counts as running: a cluster may need that long to start."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How a run stands. Times are UTC, ISO 8601."""

    run: str
    url: str
    status: StatusName
    step: int
    """The last committed step, from which a resume goes on."""
    epoch: int
    total_steps: int | None
    attempts: int
    best: BestCheckpoint | None
    metrics: Mapping[str, float]
    error: Mapping[str, Any] | None
    """Why the last attempt left, where it failed: type and message."""
    heartbeat: HeartbeatSample | None
    """Of the last attempt, until it is over: what is not committed yet shows here."""
    started: str | None
    """Time of the first claim."""
    updated: str | None
    """Time of the last entry in the journal."""
    checkpoint: str | None
    """The last committed one."""
    stopped_early: bool = False
    """Of a finished run: before its last step, because `best.patience` was used up."""
    evaluations_since_best: int | None = None
    """Until the last commit."""
    skipped_updates: int | None = None
    """Of a run in fp16: how many updates were skipped until the last commit, because their gradient was not finite."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Of the last attempt: host, world_size, device, and since when."""
    seen_s: float | None = None
    """Seconds since its last sign of life, a heartbeat or an entry in the journal, by this machine's clock."""
    damaged: tuple[str, ...] = ()
    """What of the run's directory is missing or damaged, a line each; only `show` looks for it."""

    @property
    def latest_step(self) -> int:
        """The last step that is known of: a running attempt is ahead of its last checkpoint."""
        if self.heartbeat is None or self.status not in ("running", "stalled"):
            return self.step
        return max(self.step, self.heartbeat.step)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the shape of `--json` and of `run.json`."""
        tree: dict[str, Any] = from_json(to_json(asdict(self)))
        return tree


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """One run of a listing."""

    status: RunStatus
    job: str
    """Name of its job."""
    created_at: str
    """When the run was made; UTC, ISO 8601."""
    differs: Mapping[str, Any]
    """What tells it apart from the other runs of its job in the same storage: fields of the job, such as
    "train.phases.0.lr", and where they leave two runs alike the digests of the data."""

    def to_json(self) -> dict[str, Any]:
        """Plain values: those of the standing, and its own."""
        return {**self.status.to_json(), "job": self.job, "born": self.created_at, "differs": dict(self.differs)}


def read_run_status(run: Run, now_s: float | None = None) -> RunStatus:
    """How a run stands.

    Parameters
    ----------
    now: seconds since 1970 (default: this machine's clock). Heartbeats are older or younger by it: for display only.
    """
    state = run.journal.read_state()
    claim = state.claim
    heartbeat = read_heartbeat(run.storage, claim.attempt)[1] if claim is not None and not state.is_over else None
    clock = time.time() if now_s is None else now_s
    update_times = [state.updated or run.created_at(), *([heartbeat.time] if heartbeat is not None else [])]
    seen_s = max(0.0, min(seconds_since(update_time, clock) for update_time in update_times))
    return replace(
        status_from_journal(run, state, heartbeat, _status_name(run, state, heartbeat, clock)), seen_s=round(seen_s, 1)
    )


def status_from_journal(
    run: Run, state: JournalState, heartbeat: HeartbeatSample | None, status: StatusName
) -> RunStatus:
    """The standing that a journal makes."""
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
    """Write `run.json`: a view, rebuilt from the rest. A protocol takes one thing from it, the number of the journal's
    last entry, and only to begin its search there."""
    run.storage.replace(SUMMARY_FILE, encode_summary(run, state, status))


def encode_summary(run: Run, state: JournalState, status: StatusName) -> bytes:
    """`run.json`, as a function of the journal: the standing, what was fixed at birth, one line for each of the last
    attempts."""
    tree = status_from_journal(run, state, None, status).to_json()
    del tree["heartbeat"], tree["seen_s"], tree["damaged"]
    creation = {"time": run.created_at(), **run.read_metadata()}
    tree |= {"journal": state.number, "birth": creation, "history": _attempt_history(run, state.attempts)}
    return (to_json(tree, indent=1) + "\n").encode()


def _status_name(run: Run, state: JournalState, heartbeat: HeartbeatSample | None, clock_s: float) -> StatusName:
    if state.leave is not None:
        return state.leave.status
    if state.commit is not None and state.commit.end:
        return "finished"  # also while a later attempt writes what follows from the end
    claim = state.claim
    if claim is None:
        return "running" if seconds_since(run.created_at(), clock_s) < STARTUP_GRACE_S else "interrupted"
    interval_s = heartbeat.interval_s if heartbeat is not None else claim.interval_s
    age_s = seconds_since(heartbeat.time if heartbeat is not None else claim.time, clock_s)
    return "stalled" if age_s > STALE_AFTER_INTERVALS * interval_s else "running"


def _attempt_history(run: Run, summaries: Sequence[AttemptSummary]) -> list[dict[str, Any]]:
    """One line an attempt: where it ran and how far it came."""
    return [
        {
            **({"attempt": claim.attempt, "claimed": claim.time} if claim is not None else {}),
            "committed": one.committed,
            "outcome": one.outcome,
            **(claim.facts if claim is not None else {}),
        }
        for one, claim in zip(summaries, run.journal.read_claims(one.claim for one in summaries), strict=True)
    ]
