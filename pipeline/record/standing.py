"""How a run stands, from storage alone; and `run.json`, the view of it that lies beside the truth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.record import decisions
from pipeline.record.entries import BestSoFar, Claim, Commit, Entry, Leave
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
    """Of the last attempt: what is not committed yet shows here."""
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


def standing(run: Run, now: float | None = None) -> Standing:
    """How a run stands.

    Parameters
    ----------
    now: seconds since 1970 (default: this machine's clock). Heartbeats are older or younger by it: for display only.
    """
    entries = run.journal.read()
    claim = decisions.last_claim(entries)
    beat = read_beat(run.storage, claim.attempt)[1] if claim is not None else None
    clock = time.time() if now is None else now
    signs = [entries[-1].time if entries else run.born(), *([beat.time] if beat is not None else [])]
    seen_s = max(0.0, min(seconds_since(sign, clock) for sign in signs))
    return replace(stand(run, entries, beat, _status(run, entries, beat, clock)), seen_s=round(seen_s, 1))


def stand(run: Run, entries: Sequence[Entry], beat: Beat | None, status: Status) -> Standing:
    """The standing that these entries make."""
    commit = decisions.newest_commit(entries)
    claim = decisions.last_claim(entries)
    left = last_leave(entries)
    first = next((entry for entry in entries if isinstance(entry, Claim)), None)
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
        error=left.error if left is not None else None,
        heartbeat=beat,
        started=first.time if first is not None else None,
        updated=entries[-1].time if entries else None,
        checkpoint=commit.checkpoint if commit is not None else None,
        stopped_early=commit is not None and commit.end and total_steps is not None and commit.step < total_steps,
        evaluations_since_best=commit.patience if commit is not None else None,
        skipped_updates=commit.skipped_updates if commit is not None else None,
        where=_where(claim) if claim is not None else {},
    )


def _where(claim: Claim) -> dict[str, Any]:
    return {"since": claim.time, **{name: claim.facts.get(name) for name in ("host", "world_size", "device")}}


def last_leave(entries: Sequence[Entry]) -> Leave | None:
    """The leave of the last attempt, if it left."""
    last = entries[-1] if entries else None
    return last if isinstance(last, Leave) else None


def write_view(run: Run, entries: Sequence[Entry], status: Status) -> None:
    """Write `run.json`: a view, rebuilt from the rest and never read by a protocol."""
    run.storage.replace(VIEW, view_file(run, entries, status))


def view_file(run: Run, entries: Sequence[Entry], status: Status) -> bytes:
    """`run.json`, as a function of the journal: the standing, what was fixed at birth, one line for each attempt."""
    tree = stand(run, entries, None, status).to_json()
    del tree["heartbeat"], tree["seen_s"], tree["damaged"]
    facts = run.facts()
    tree |= {"birth": {"time": run.born(), **facts}, "history": [_life(claim, entries) for claim in _claims(entries)]}
    return (to_json(tree, indent=1) + "\n").encode()


def _status(run: Run, entries: Sequence[Entry], beat: Beat | None, clock: float) -> Status:
    left = last_leave(entries)
    if left is not None:
        return left.status
    commit = decisions.newest_commit(entries)
    if commit is not None and commit.end:
        return "finished"  # also while a later attempt writes what follows from the end
    claim = decisions.last_claim(entries)
    if claim is None:
        return "running" if seconds_since(run.born(), clock) < STARTING_S else "interrupted"
    interval_s = beat.interval_s if beat is not None else claim.interval_s
    age_s = seconds_since(beat.time if beat is not None else claim.time, clock)
    return "stalled" if age_s > INTERVALS_OF_SILENCE * interval_s else "running"


def _claims(entries: Sequence[Entry]) -> list[Claim]:
    return [entry for entry in entries if isinstance(entry, Claim)]


def _life(claim: Claim, entries: Sequence[Entry]) -> dict[str, Any]:
    """One attempt: where it ran and how far it came."""
    own = [entry for entry in entries[claim.number :] if entry.attempt == claim.attempt]
    steps = [entry.step for entry in own if isinstance(entry, Commit)]
    over = own[-1] if own else None
    outcome = over.status if isinstance(over, Leave) else "end" if isinstance(over, Commit) and over.end else None
    return {
        "attempt": claim.attempt,
        "claimed": claim.time,
        "committed": max(steps) if steps else None,
        "outcome": outcome,
        **claim.facts,
    }
