"""`follow`: send a run's metrics to TensorBoard and MLflow, while it runs or afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from pipeline.config.files import parse_job
from pipeline.errors import InputError, TrainyardError, WorkError
from pipeline.events import EventHandler, Message, WarningMessage, ignore_event
from pipeline.runs.locate import find_run
from pipeline.runs.run import JOB_FILE, Run
from pipeline.runs.status import StatusName, read_run_status
from pipeline.trackers import MetricLogReader, Tracker, TrackerName, create_tracker
from pipeline.trackers.metric_reader import TRACKER_STORAGE_LIMIT_S

POLL_INTERVAL_S = 5.0
"""Seconds between two reads of the metric log."""
RETRY_LIMIT_S = 60.0
"""Seconds after the end of the run for which failing trackers are retried."""


@dataclass(frozen=True)
class FollowResult:
    """What was sent to which trackers."""

    run: str
    url: str
    status: StatusName
    segments: Mapping[str, int]
    """Number of segments of the metric log that were sent now, by tracker."""
    locations: Mapping[str, str]
    """Destination by tracker."""
    location_hints: Mapping[str, str]
    """See `Tracker.location_hint`, by tracker."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        trackers = {
            name: {"where": self.locations[name], "cells": num_segments} for name, num_segments in self.segments.items()
        }
        return {"run": self.run, "url": self.url, "status": self.status, "followers": trackers}

    def format_lines(self) -> list[str]:
        """Format the result as lines of text."""
        return [
            f"{name}: {num_segments} new segment{'' if num_segments == 1 else 's'} of {self.run}; "
            f"{self.location_hints[name]} {self.locations[name]}"
            for name, num_segments in self.segments.items()
        ]


def follow(
    run: str,
    *,
    to: Sequence[str] = (),
    storage: str | None = None,
    once: bool = False,
    driver_done: threading.Event | None = None,
    on_event: EventHandler = ignore_event,
) -> FollowResult:
    """Send the metrics of a run that its trackers do not have yet, until the run is over or once.

    Parameters
    ----------
    to: names of the trackers; default: those of the run's job.
    once: send what is there now, and do not wait for the end of the run.
    driver_done: set when the driver of the run has finished or exited. If given, it decides when the run is over, not
        the run's status; and a failure is one warning instead of an exception.

    Raises
    ------
    InputError: no such run; no trackers; a library is missing, or a server denies access.
    WorkError: a tracker was unavailable until `RETRY_LIMIT_S` after the run's end, or when `once` is set.
    """
    opened_run = find_run(run, storage)
    log = MetricLogReader(opened_run)
    names = _parse_tracker_names(to or parse_job(opened_run.read_job_yaml(), f"{opened_run.url}/{JOB_FILE}").follow)
    if not names:
        raise InputError(
            "the job names no tracker",
            where=opened_run.url,
            fix=f"use {' or '.join(f'--to {name}' for name in get_args(TrackerName))}, or set follow: in the job",
        )
    trackers = [
        _TrackerSync(name, log, on_event, is_lenient=driver_done is not None, will_retry=not once) for name in names
    ]
    poller = _RunStatusPoller(opened_run)
    statuses: Iterator[StatusName]
    if driver_done is not None:
        statuses = _poll_while_driven(poller, driver_done)
    elif once:
        statuses = iter([poller.poll()])
    else:
        statuses = _poll_until_over(poller, trackers, on_event)
    for status in statuses:
        for tracker in trackers:
            tracker.catch_up(log, status)
    for tracker in trackers:
        if tracker.error is not None and driver_done is None:
            raise tracker.error
        if tracker.error is not None and not tracker.has_failed_permanently:
            text = f"{tracker.name} does not have all metrics; `trainyard follow {opened_run.name}` sends the rest"
            on_event(WarningMessage(text))
    return FollowResult(
        opened_run.name,
        opened_run.url,
        status,
        segments={tracker.name: tracker.num_segments for tracker in trackers},
        locations={tracker.name: tracker.location for tracker in trackers},
        location_hints={tracker.name: tracker.location_hint for tracker in trackers},
    )


def _parse_tracker_names(names: Sequence[str]) -> list[TrackerName]:
    unknown = [name for name in names if name not in get_args(TrackerName)]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no tracker", where="--to", fix=" or ".join(get_args(TrackerName)))
    return list(dict.fromkeys(cast("Sequence[TrackerName]", names)))


def _poll_while_driven(poller: _RunStatusPoller, driver_done: threading.Event) -> Iterator[StatusName]:
    """Yield the status of the run at each poll. The last one is after the driver's exit, which ends the run."""
    while True:
        is_last = driver_done.is_set()
        status = poller.poll()
        yield "interrupted" if is_last and status in ("running", "stalled") else status
        if is_last:
            return
        driver_done.wait(POLL_INTERVAL_S)


def _poll_until_over(
    poller: _RunStatusPoller, trackers: Sequence[_TrackerSync], on_event: EventHandler
) -> Iterator[StatusName]:
    """Yield the status of the run at each poll, until the run is over and all is sent or `RETRY_LIMIT_S` has passed."""
    over_since: float | None = None
    before: StatusName = "running"
    while True:
        status = poller.poll()
        if status == "stalled" != before:
            on_event(Message("the run has no heartbeat; waiting for it to continue"))
        before = status
        yield status
        if poller.is_over or status == "finished":  # its writer may have been killed before the last segments
            over_since = over_since or time.monotonic()
            is_caught_up = poller.is_over and all(tracker.error is None for tracker in trackers)
            if is_caught_up or time.monotonic() - over_since > RETRY_LIMIT_S:
                return
        time.sleep(POLL_INTERVAL_S)


class _RunStatusPoller:
    """Reads the status of a run; while storage is unavailable, returns the last one."""

    def __init__(self, run: Run) -> None:
        self._run = run.with_timeout(TRACKER_STORAGE_LIMIT_S)
        self._status: StatusName = "running"
        self.is_over = False
        """No more rows will be written, unless the run is resumed."""

    def poll(self) -> StatusName:
        try:
            self._status = read_run_status(self._run).status
            self.is_over = self._status in ("failed", "interrupted") or self._run.has_result()
        except WorkError:
            pass
        return self._status


@dataclass
class _TrackerSync:
    """One tracker and its current error, which is reported once when it starts and once when it is over."""

    name: TrackerName
    log: MetricLogReader
    on_event: EventHandler
    is_lenient: bool
    """Whether permanent errors are warnings too."""
    will_retry: bool
    num_segments: int = 0
    error: TrainyardError | None = None
    has_failed_permanently: bool = False
    location: str = ""
    location_hint: str = ""
    _tracker: Tracker | None = field(default=None, init=False)

    def catch_up(self, log: MetricLogReader, status: StatusName) -> None:
        if self.has_failed_permanently:
            return
        try:
            self._tracker = self._tracker or create_tracker(self.name, log)
            self.location, self.location_hint = self._tracker.location, self._tracker.location_hint
            self.num_segments += self._tracker.catch_up(log, log.read_view(status))
        except InputError as error:
            if not self.is_lenient:
                raise
            self.error, self.has_failed_permanently = error, True
            self._emit(WarningMessage, f"{_format_error(error)}; the run goes on without it. {error.fix}".rstrip())
        except WorkError as error:
            if self.error is None and self.is_lenient:
                self._emit(
                    WarningMessage, f"{_format_error(error)}; the run goes on, and missing metrics are sent later"
                )
            elif self.error is None and self.will_retry:
                self._emit(Message, f"{_format_error(error)}; trying again")
            self.error = error
        else:
            if self.error is not None:
                self._emit(Message, "available again, and all metrics are sent")
            self.error = None

    def _emit(self, kind: type[Message] | type[WarningMessage], text: str) -> None:
        self.on_event(kind(f"{self.name}: {text}"))


def _format_error(error: TrainyardError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
