"""The heartbeat of an attempt: time, step and loss, written every few seconds by a thread."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from pipeline.errors import InputError, TrainyardError
from pipeline.runs.journal.entries import MAX_INTERVAL_S
from pipeline.runs.serialization import check_timestamp, from_json, to_json, utc_now
from pipeline.storage import Storage
from pipeline.watchdog import blocking_on

INTERVAL_S = 10.0
STALE_AFTER_INTERVALS = 3
"""Number of intervals without a change of the heartbeat after which an attempt is presumed dead."""


@dataclass(frozen=True)
class HeartbeatSample:
    """The content of a heartbeat."""

    time: str
    step: int
    loss: float | None
    interval_s: float


class Heartbeat:
    """Write `heartbeats/<attempt>.json` periodically until stopped; the first time immediately.

    Parameters
    ----------
    storage: the run's folder.
    attempt: number of the attempt; no other attempt writes this file.
    """

    def __init__(self, storage: Storage, attempt: int, interval_s: float) -> None:
        self._storage = storage.with_timeout(interval_s)
        self._path = heartbeat_path(attempt)
        self._interval_s = interval_s
        self._values: tuple[int, float | None] = (0, None)
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainyard-heartbeat", daemon=True)

    def start(self) -> None:
        """Start writing."""
        self._thread.start()

    def update(self, step: int, loss: float | None) -> None:
        """Set the content of the next heartbeat. Does not block."""
        self._values = (step, loss)

    @blocking_on("storage")
    def stop(self) -> None:
        """Stop writing."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            self._write()
            due = max(due + self._interval_s, time.monotonic())
            self._stop.wait(due - time.monotonic())

    def _write(self) -> None:
        step, loss = self._values
        self._count += 1
        tree = {"time": utc_now(), "step": step, "loss": loss, "count": self._count, "interval_s": self._interval_s}
        try:
            self._storage.replace(self._path, to_json(tree).encode())
        except TrainyardError:
            # A missed heartbeat does no harm: the writer uses the same storage and reports its errors.
            return


def read_heartbeat(storage: Storage, attempt: int) -> tuple[bytes, HeartbeatSample | None]:
    """Return the heartbeat file of an attempt as bytes, whose change proves that it is alive, and its content."""
    try:
        data = storage.read(heartbeat_path(attempt))
    except FileNotFoundError:
        return b"", None
    try:
        tree = from_json(data)
        loss = None if tree["loss"] is None else float(tree["loss"])
        step, interval_s = int(tree["step"]), float(tree["interval_s"])
        if step < 0 or not 0 < interval_s <= MAX_INTERVAL_S:
            return data, None
        return data, HeartbeatSample(time=check_timestamp(tree["time"]), step=step, loss=loss, interval_s=interval_s)
    except (ValueError, TypeError, KeyError, OverflowError):
        return data, None


def heartbeat_path(attempt: int) -> str:
    """Return the path of a heartbeat in the run."""
    return f"heartbeats/{attempt:04d}.json"


def get_interval_s() -> float:
    """Return the seconds between two heartbeats: TRAINYARD_HEARTBEAT_S, default 10.

    Raises
    ------
    InputError: the environment variable is not a positive number.
    """
    text = os.environ.get("TRAINYARD_HEARTBEAT_S")
    if not text:
        return INTERVAL_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_INTERVAL_S:
        raise InputError(
            f"{text!r} is not a number of seconds", where="TRAINYARD_HEARTBEAT_S", fix="unset it, or use 10"
        )
    return seconds
