"""`follow`: tell TensorBoard and MLflow of a run, while it goes on or afterwards."""

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
"""Between two looks at the metric log."""
RETRY_LIMIT_S = 60.0
"""How long what is away when the run is over is tried again."""


@dataclass(frozen=True)
class FollowResult:
    """What was told to whom."""

    run: str
    url: str
    status: StatusName
    segments: Mapping[str, int]
    """By follower: parts of the metric log that were told now."""
    locations: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        trackers = {
            name: {"where": self.locations[name], "cells": num_segments} for name, num_segments in self.segments.items()
        }
        return {"run": self.run, "url": self.url, "status": self.status, "followers": trackers}

    def format_lines(self) -> list[str]:
        """For people."""
        words = {"tensorboard": "tensorboard --logdir", "mlflow": "at"}
        return [
            f"{name}: {num_segments} new part{'' if num_segments == 1 else 's'} of {self.run}; {words[name]} "
            f"{self.locations[name]}"
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
    """Tell followers what they do not know yet of a run, until it is over or as it is now.

    Parameters
    ----------
    to: who; else whom the run's job names.
    once: look once, whatever becomes of the run.
    driven: set when whoever drives the run is done or dead: that decides then, and not how the run stands; and what
        fails is told as one warning, not raised.

    Raises
    ------
    InputError: no such run; nobody to tell; a library is missing, or a server refuses.
    WorkError: a tracker stayed away for so long after the run's end, or at the one look.
    """
    opened_run = find_run(run, storage)
    log = MetricLogReader(opened_run)
    names = _parse_tracker_names(to or parse_job(opened_run.read_job_yaml(), f"{opened_run.url}/{JOB_FILE}").follow)
    if not names:
        raise InputError(
            "the job names no follower",
            where=opened_run.url,
            fix="say --to tensorboard or --to mlflow, or follow: in the job",
        )
    watched = [
        _TrackerSync(name, log, on_event, is_lenient=driver_done is not None, will_retry=not once) for name in names
    ]
    poller = _RunStatusPoller(opened_run)
    statuses: Iterator[StatusName]
    if driver_done is not None:
        statuses = _poll_while_driven(poller, driver_done)
    elif once:
        statuses = iter([poller.poll()])
    else:
        statuses = _poll_until_over(poller, watched, on_event)
    for status in statuses:
        for tracker in watched:
            tracker.catch_up(log, status)
    for tracker in watched:
        if tracker.error is not None and driver_done is None:
            raise tracker.error
        if tracker.error is not None and not tracker.has_failed_permanently:
            on_event(
                WarningMessage(f"{tracker.name} does not know all; `trainyard follow {opened_run.name}` tells the rest")
            )
    segments: dict[str, int] = {tracker.name: tracker.num_segments for tracker in watched}
    return FollowResult(
        opened_run.name, opened_run.url, status, segments, {tracker.name: tracker.location for tracker in watched}
    )


def _parse_tracker_names(words: Sequence[str]) -> list[TrackerName]:
    unknown = [word for word in words if word not in get_args(TrackerName)]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no follower", where="--to", fix=" or ".join(get_args(TrackerName)))
    return list(dict.fromkeys(cast("Sequence[TrackerName]", words)))


def _poll_while_driven(poller: _RunStatusPoller, driver_done: threading.Event) -> Iterator[StatusName]:
    """How the run stands, look by look; the last one after the driver is gone, whose run is over by that."""
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
    """How the run stands, look by look, until it is over and all is told, or was tried for long enough."""
    over_since: float | None = None
    before: StatusName = "running"
    while True:
        status = poller.poll()
        if status == "stalled" != before:
            on_event(Message("no sign of life from the run; waiting for it to go on"))
        before = status
        yield status
        if poller.is_over or status == "finished":  # whoever wrote its end may have died before the last cells
            over_since = over_since or time.monotonic()
            is_caught_up = poller.is_over and all(tracker.error is None for tracker in trackers)
            if is_caught_up or time.monotonic() - over_since > RETRY_LIMIT_S:
                return
        time.sleep(POLL_INTERVAL_S)


class _RunStatusPoller:
    """How a run stands, as storage tells; while storage is away, as it last told."""

    def __init__(self, run: Run) -> None:
        self._run = run.with_timeout(TRACKER_STORAGE_LIMIT_S)
        self._status: StatusName = "running"
        self.is_over = False
        """Nothing more comes, unless somebody resumes it."""

    def poll(self) -> StatusName:
        try:
            self._status = read_run_status(self._run).status
            self.is_over = self._status in ("failed", "interrupted") or self._run.has_result()
        except WorkError:
            pass
        return self._status


@dataclass
class _TrackerSync:
    """One follower, and what is wrong with it: said once when it begins, and once when it is over."""

    name: TrackerName
    log: MetricLogReader
    on_event: EventHandler
    is_lenient: bool
    """Whether even what is hopeless is only a warning."""
    will_retry: bool
    num_segments: int = 0
    error: TrainyardError | None = None
    has_failed_permanently: bool = False
    location: str = ""
    _tracker: Tracker | None = field(default=None, init=False)

    def catch_up(self, log: MetricLogReader, status: StatusName) -> None:
        if self.has_failed_permanently:
            return
        try:
            self._tracker = self._tracker or create_tracker(self.name, log)
            self.location = self._tracker.location
            self.num_segments += self._tracker.catch_up(log, log.read_view(status))
        except InputError as error:
            if not self.is_lenient:
                raise
            self.error, self.has_failed_permanently = error, True
            self._emit(WarningMessage, f"{_format_error(error)}; the run goes on without it. {error.fix}".rstrip())
        except WorkError as error:
            if self.error is None and self.is_lenient:
                self._emit(
                    WarningMessage, f"{_format_error(error)}; the run goes on, and what is missing is told later"
                )
            elif self.error is None and self.will_retry:
                self._emit(Message, f"{_format_error(error)}; trying again")
            self.error = error
        else:
            if self.error is not None:
                self._emit(Message, "back, and all is told")
            self.error = None

    def _emit(self, kind: type[Message] | type[WarningMessage], text: str) -> None:
        self.on_event(kind(f"{self.name}: {text}"))


def _format_error(error: TrainyardError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
