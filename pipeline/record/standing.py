"""How a run stands, from storage alone; and `run.json`, the view of it that lies beside the truth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.record.entries import AttemptSummary, BestSoFar, Claim, JournalState
from pipeline.record.heartbeat import INTERVALS_OF_SILENCE, Beat, read_beat
from pipeline.record.run import VIEW, Run
from pipeline.record.values import from_json, seconds_since, to_json

Status = Literal["running", "stalled", "interrupted", "failed", "finished"]

STARTING_S = 120.0
"""A run that was born so recently and never claimed counts as running: a cluster may need that long to start."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands. Times are UTC, ISO 8601."""

    run: str
    url: str
    status: Status
    step: int
    """The last committed step, from which a resume goes on."""
    epoch: int
    total_steps: int | None
    attempts: int
    best: BestSoFar | None
    metrics: Mapping[str, float]
    error: Mapping[str, Any] | None
    """Why the last attempt left, where it failed: type and message."""
    heartbeat: Beat | None
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
    def reached(self) -> int:
        """The last step that is known of: a running attempt is ahead of its last checkpoint."""
        if self.heartbeat is None or self.status not in ("running", "stalled"):
            return self.step
        return max(self.step, self.heartbeat.step)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the shape of `--json` and of `run.json`."""
        tree: dict[str, Any] = from_json(to_json(asdict(self)))
        return tree


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One run of a listing."""

    standing: Standing
    job: str
    """Name of its job."""
    born: str
    """When the run was made; UTC, ISO 8601."""
    differs: Mapping[str, Any]
    """What tells it apart from the other runs of its job in the same storage: fields of the job, such as
    "train.phases.0.lr", and where they leave two runs alike the digests of the data."""

    def to_json(self) -> dict[str, Any]:
        """Plain values: those of the standing, and its own."""
        return {**self.standing.to_json(), "job": self.job, "born": self.born, "differs": dict(self.differs)}


def standing(run: Run, now: float | None = None) -> Standing:
    """How a run stands.

    Parameters
    ----------
    now: seconds since 1970 (default: this machine's clock). Heartbeats are older or younger by it: for display only.
    """
    state = run.journal.state()
    claim = state.claim
    heartbeat = read_beat(run.storage, claim.attempt)[1] if claim is not None and not state.is_over else None
    clock = time.time() if now is None else now
    update_times = [state.updated or run.born(), *([heartbeat.time] if heartbeat is not None else [])]
    seen_s = max(0.0, min(seconds_since(update_time, clock) for update_time in update_times))
    return replace(stand(run, state, heartbeat, _status(run, state, heartbeat, clock)), seen_s=round(seen_s, 1))


def stand(run: Run, state: JournalState, beat: Beat | None, status: Status) -> Standing:
    """The standing that a journal makes."""
    claim, commit, exit_entry = state.claim, state.commit, state.leave
    total_steps = run.facts().get("total_steps")
    return Standing(
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
        heartbeat=beat,
        started=state.started or None,
        updated=state.updated or None,
        checkpoint=commit.checkpoint if commit is not None else None,
        stopped_early=commit is not None and commit.end and total_steps is not None and commit.step < total_steps,
        evaluations_since_best=commit.patience if commit is not None else None,
        skipped_updates=commit.skipped_updates if commit is not None else None,
        where=_where(claim) if claim is not None else {},
    )


def _where(claim: Claim) -> dict[str, Any]:
    return {"since": claim.time, **{name: claim.facts.get(name) for name in ("host", "world_size", "device")}}


def write_view(run: Run, state: JournalState, status: Status) -> None:
    """Write `run.json`: a view, rebuilt from the rest. A protocol takes one thing from it, the number of the journal's
    last entry, and only to begin its search there."""
    run.storage.replace(VIEW, view_file(run, state, status))


def view_file(run: Run, state: JournalState, status: Status) -> bytes:
    """`run.json`, as a function of the journal: the standing, what was fixed at birth, one line for each of the last
    attempts."""
    tree = stand(run, state, None, status).to_json()
    del tree["heartbeat"], tree["seen_s"], tree["damaged"]
    creation = {"time": run.born(), **run.facts()}
    tree |= {"journal": state.number, "birth": creation, "history": _history(run, state.attempts)}
    return (to_json(tree, indent=1) + "\n").encode()


def _status(run: Run, state: JournalState, beat: Beat | None, clock: float) -> Status:
    if state.leave is not None:
        return state.leave.status
    if state.commit is not None and state.commit.end:
        return "finished"  # also while a later attempt writes what follows from the end
    claim = state.claim
    if claim is None:
        return "running" if seconds_since(run.born(), clock) < STARTING_S else "interrupted"
    interval_s = beat.interval_s if beat is not None else claim.interval_s
    age_s = seconds_since(beat.time if beat is not None else claim.time, clock)
    return "stalled" if age_s > INTERVALS_OF_SILENCE * interval_s else "running"


def _history(run: Run, attempts: Sequence[AttemptSummary]) -> list[dict[str, Any]]:
    """One line an attempt: where it ran and how far it came."""
    return [
        {
            **({"attempt": claim.attempt, "claimed": claim.time} if claim is not None else {}),
            "committed": one.committed,
            "outcome": one.outcome,
            **(claim.facts if claim is not None else {}),
        }
        for one, claim in zip(attempts, run.journal.claims(one.claim for one in attempts), strict=True)
    ]
