"""Is the attempt that holds a run alive? Proof where there is one, else the heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.errors import BusyError
from pipeline.record import lock
from pipeline.record.entries import Claim
from pipeline.record.heartbeat import INTERVALS_OF_SILENCE, read_beat
from pipeline.record.run import Run
from pipeline.record.values import seconds_since

LOOKS_AN_INTERVAL = 5
"""How often a watched heartbeat is read."""


def is_proven_dead(last: Claim, driver: str, dead: int | None) -> bool:
    """Whether the last attempt does no more: its process is gone, or its own driver says so."""
    return (dead == last.attempt and last.driver == driver) or lock.is_held(last) is False


def watch(run: Run, last: Claim, own_interval_s: float, on_watch: Callable[[str], None]) -> None:
    """Watch a heartbeat for three intervals of this machine's own clock.

    Raises
    ------
    BusyError: it changes, or a process of this machine holds the run and its heart beats.
    """
    if lock.is_held(last) and beats(run, last):
        raise busy(run, last, "is writing this run")
    first_data, _ = read_beat(run.storage, last.attempt)
    interval_s = max(own_interval_s, last.interval_s)
    limit_s = INTERVALS_OF_SILENCE * interval_s
    on_watch(f"attempt {last.attempt} {_place(last)} may still be writing: watching its heartbeat for {limit_s:.0f} s")
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        time.sleep(interval_s / LOOKS_AN_INTERVAL)
        if read_beat(run.storage, last.attempt)[0] != first_data:
            raise busy(run, last, "is writing this run")
        if lock.is_held(last) is False:
            return


def refuse_where_it_beats(run: Run, driver: str) -> None:
    """Look for a change of a young heartbeat, for a little more than its interval: sooner than a claim would, which
    has to be certain of the opposite.

    Raises
    ------
    BusyError: there is one.
    """
    state = run.journal.state()
    last_claim = state.claim
    if last_claim is None or last_claim.driver == driver or state.is_over or not beats(run, last_claim):
        return
    first_data, began = read_beat(run.storage, last_claim.attempt)[0], time.monotonic()
    while time.monotonic() - began < 1.5 * last_claim.interval_s and lock.is_held(last_claim) is not False:
        time.sleep(last_claim.interval_s / LOOKS_AN_INTERVAL)
        if read_beat(run.storage, last_claim.attempt)[0] != first_data:
            raise busy(run, last_claim, "is writing this run")


def beats(run: Run, last: Claim) -> bool:
    """Whether the heartbeat of a process of this machine is young, by the clock that both share."""
    heartbeat = read_beat(run.storage, last.attempt)[1]
    timestamp = heartbeat.time if heartbeat is not None else last.time
    return abs(seconds_since(timestamp)) < INTERVALS_OF_SILENCE * last.interval_s


def busy(run: Run, other: Claim, does: str) -> BusyError:
    """The error that says who has the run."""
    heartbeat = read_beat(run.storage, other.attempt)[1]
    age = f"; its last heartbeat is {max(0.0, seconds_since(heartbeat.time)):.0f} s old, at step {heartbeat.step}" if heartbeat else ""
    return BusyError(
        f"attempt {other.attempt} {_place(other)} {does}{age}",
        where=run.url,
        fix="wait for it, or end that process; then run the same command again",
    )


def _place(claim: Claim) -> str:
    host, pid = claim.facts.get("host"), claim.facts.get("pid")
    parts = [f"on {host}" if host else "", f"(process {pid})" if pid else ""]
    return " ".join(part for part in parts if part) or "elsewhere"
