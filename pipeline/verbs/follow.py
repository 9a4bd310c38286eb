"""`follow`: tell TensorBoard and MLflow of a run, while it goes on or afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from pipeline.errors import InputError, TrainyardError, WorkError
from pipeline.events import EventHandler, Message, WarningMessage, ignore_event
from pipeline.followers import Follower, MetricLog, Name, make
from pipeline.followers.log import STORAGE_LIMIT_S
from pipeline.job_file import parse_job
from pipeline.record.run import JOB, Run
from pipeline.record.standing import Status, standing
from pipeline.verbs.places import find_run

PAUSE_S = 5.0
"""Between two looks at the metric log."""
PATIENCE_S = 60.0
"""How long what is away when the run is over is tried again."""


@dataclass(frozen=True)
class Followed:
    """What was told to whom."""

    run: str
    url: str
    status: Status
    cells: Mapping[str, int]
    """By follower: parts of the metric log that were told now."""
    where: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        trackers = {name: {"where": self.where[name], "cells": num_segments} for name, num_segments in self.cells.items()}
        return {"run": self.run, "url": self.url, "status": self.status, "followers": trackers}

    def lines(self) -> list[str]:
        """For people."""
        words = {"tensorboard": "tensorboard --logdir", "mlflow": "at"}
        return [
            f"{name}: {num_segments} new part{'' if num_segments == 1 else 's'} of {self.run}; {words[name]} {self.where[name]}"
            for name, num_segments in self.cells.items()
        ]


def follow(
    run: str,
    *,
    to: Sequence[str] = (),
    storage: str | None = None,
    once: bool = False,
    driven: threading.Event | None = None,
    on_event: EventHandler = ignore_event,
) -> Followed:
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
    log = MetricLog(opened_run)
    names = _names(to or parse_job(opened_run.job_yaml(), f"{opened_run.url}/{JOB}").follow)
    if not names:
        raise InputError(
            "the job names no follower",
            where=opened_run.url,
            fix="say --to tensorboard or --to mlflow, or follow: in the job",
        )
    watched = [_Told(name, log, on_event, lenient=driven is not None, tries_again=not once) for name in names]
    poller = _Seen(opened_run)
    statuses: Iterator[Status]
    if driven is not None:
        statuses = _while_driven(poller, driven)
    elif once:
        statuses = iter([poller.status()])
    else:
        statuses = _until_over(poller, watched, on_event)
    for status in statuses:
        for tracker in watched:
            tracker.catch_up(log, status)
    for tracker in watched:
        if tracker.fault is not None and driven is None:
            raise tracker.fault
        if tracker.fault is not None and not tracker.is_hopeless:
            on_event(WarningMessage(f"{tracker.name} does not know all; `trainyard follow {opened_run.name}` tells the rest"))
    segments: dict[str, int] = {tracker.name: tracker.cells for tracker in watched}
    return Followed(opened_run.name, opened_run.url, status, segments, {tracker.name: tracker.where for tracker in watched})


def _names(words: Sequence[str]) -> list[Name]:
    unknown = [word for word in words if word not in get_args(Name)]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no follower", where="--to", fix=" or ".join(get_args(Name)))
    return list(dict.fromkeys(cast("Sequence[Name]", words)))


def _while_driven(seen: _Seen, driven: threading.Event) -> Iterator[Status]:
    """How the run stands, look by look; the last one after the driver is gone, whose run is over by that."""
    while True:
        is_last = driven.is_set()
        status = seen.status()
        yield "interrupted" if is_last and status in ("running", "stalled") else status
        if is_last:
            return
        driven.wait(PAUSE_S)


def _until_over(seen: _Seen, watched: Sequence[_Told], on_event: EventHandler) -> Iterator[Status]:
    """How the run stands, look by look, until it is over and all is told, or was tried for long enough."""
    over_since: float | None = None
    before: Status = "running"
    while True:
        status = seen.status()
        if status == "stalled" != before:
            on_event(Message("no sign of life from the run; waiting for it to go on"))
        before = status
        yield status
        if seen.is_over or status == "finished":  # whoever wrote its end may have died before the last cells
            over_since = over_since or time.monotonic()
            is_caught_up = seen.is_over and all(tracker.fault is None for tracker in watched)
            if is_caught_up or time.monotonic() - over_since > PATIENCE_S:
                return
        time.sleep(PAUSE_S)


class _Seen:
    """How a run stands, as storage tells; while storage is away, as it last told."""

    def __init__(self, run: Run) -> None:
        self._run = run.within(STORAGE_LIMIT_S)
        self._status: Status = "running"
        self.is_over = False
        """Nothing more comes, unless somebody resumes it."""

    def status(self) -> Status:
        try:
            self._status = standing(self._run).status
            self.is_over = self._status in ("failed", "interrupted") or self._run.has_result()
        except WorkError:
            pass
        return self._status


@dataclass
class _Told:
    """One follower, and what is wrong with it: said once when it begins, and once when it is over."""

    name: Name
    log: MetricLog
    on_event: EventHandler
    lenient: bool
    """Whether even what is hopeless is only a warning."""
    tries_again: bool
    cells: int = 0
    fault: TrainyardError | None = None
    is_hopeless: bool = False
    where: str = ""
    _follower: Follower | None = field(default=None, init=False)

    def catch_up(self, log: MetricLog, status: Status) -> None:
        if self.is_hopeless:
            return
        try:
            self._follower = self._follower or make(self.name, log)
            self.where = self._follower.where
            self.cells += self._follower.catch_up(log, log.look(status))
        except InputError as error:
            if not self.lenient:
                raise
            self.fault, self.is_hopeless = error, True
            self._emit(WarningMessage, f"{_one_line(error)}; the run goes on without it. {error.fix}".rstrip())
        except WorkError as error:
            if self.fault is None and self.lenient:
                self._emit(WarningMessage, f"{_one_line(error)}; the run goes on, and what is missing is told later")
            elif self.fault is None and self.tries_again:
                self._emit(Message, f"{_one_line(error)}; trying again")
            self.fault = error
        else:
            if self.fault is not None:
                self._emit(Message, "back, and all is told")
            self.fault = None

    def _emit(self, kind: type[Message] | type[WarningMessage], text: str) -> None:
        self.on_event(kind(f"{self.name}: {text}"))


def _one_line(error: TrainyardError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
