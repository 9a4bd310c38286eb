"""Determine whether the attempt that holds a run is alive: by proof if there is one, else by its heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.errors import BusyError
from pipeline.runs.journal.entries import Claim
from pipeline.runs.lease import process_lock
from pipeline.runs.lease.heartbeat import STALE_AFTER_INTERVALS, read_heartbeat
from pipeline.runs.run import Run
from pipeline.runs.serialization import seconds_since

READS_PER_INTERVAL = 5
"""Reads of a watched heartbeat per interval."""


def is_proven_stopped(last_claim: Claim, driver: str, known_dead_attempt: int | None) -> bool:
    """Whether the last attempt has certainly stopped: its process is gone, or its driver has ended it."""
    return (known_dead_attempt == last_claim.attempt and last_claim.driver == driver) or process_lock.is_held(
        last_claim
    ) is False


def watch_heartbeat(run: Run, last_claim: Claim, claimant_interval_s: float, on_watch: Callable[[str], None]) -> None:
    """Watch a heartbeat for three intervals of this machine's clock.

    Raises
    ------
    BusyError: it changes, or a process of this machine holds the run and its heartbeat is fresh.
    """
    if process_lock.is_held(last_claim) and is_heartbeat_fresh(run, last_claim):
        raise make_busy_error(run, last_claim, "is writing this run")
    first_data, _ = read_heartbeat(run.storage, last_claim.attempt)
    interval_s = max(claimant_interval_s, last_claim.interval_s)
    limit_s = STALE_AFTER_INTERVALS * interval_s
    on_watch(
        f"attempt {last_claim.attempt} {_describe_process(last_claim)} may still be writing: watching its heartbeat "
        f"for {limit_s:.0f} s"
    )
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        time.sleep(interval_s / READS_PER_INTERVAL)
        if read_heartbeat(run.storage, last_claim.attempt)[0] != first_data:
            raise make_busy_error(run, last_claim, "is writing this run")
        if process_lock.is_held(last_claim) is False:
            return


def raise_if_alive(run: Run, driver: str) -> None:
    """Watch a fresh heartbeat for a change during 1.5 intervals. This is faster than a claim, which must be certain
    that there is no change.

    Raises
    ------
    BusyError: the heartbeat changes.
    """
    state = run.journal.read_state()
    last_claim = state.claim
    if last_claim is None or last_claim.driver == driver or state.is_over or not is_heartbeat_fresh(run, last_claim):
        return
    first_data, began = read_heartbeat(run.storage, last_claim.attempt)[0], time.monotonic()
    while time.monotonic() - began < 1.5 * last_claim.interval_s and process_lock.is_held(last_claim) is not False:
        time.sleep(last_claim.interval_s / READS_PER_INTERVAL)
        if read_heartbeat(run.storage, last_claim.attempt)[0] != first_data:
            raise make_busy_error(run, last_claim, "is writing this run")


def is_heartbeat_fresh(run: Run, last_claim: Claim) -> bool:
    """Whether the heartbeat of a process of this machine is fresh, by their common clock."""
    heartbeat = read_heartbeat(run.storage, last_claim.attempt)[1]
    timestamp = heartbeat.time if heartbeat is not None else last_claim.time
    return abs(seconds_since(timestamp)) < STALE_AFTER_INTERVALS * last_claim.interval_s


def make_busy_error(run: Run, claim: Claim, activity: str) -> BusyError:
    """Build the error that describes which process writes the run."""
    heartbeat = read_heartbeat(run.storage, claim.attempt)[1]
    age = (
        f"; its last heartbeat is {max(0.0, seconds_since(heartbeat.time)):.0f} s old, at step {heartbeat.step}"
        if heartbeat
        else ""
    )
    return BusyError(
        f"attempt {claim.attempt} {_describe_process(claim)} {activity}{age}",
        where=run.url,
        fix="wait for it, or end that process; then run the same command again",
    )


def _describe_process(claim: Claim) -> str:
    host, pid = claim.facts.get("host"), claim.facts.get("pid")
    parts = [f"on {host}" if host else "", f"(process {pid})" if pid else ""]
    return " ".join(part for part in parts if part) or "elsewhere"
