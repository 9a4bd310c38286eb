"""The trackers of a running run, in a process beside its driver: a failure of either does not affect the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from pipeline.config.job import TrackerName
from pipeline.events import Event, EventHandler, Message, PhaseStarted, WarningMessage
from pipeline.runs.run import Run

FINISH_TIMEOUT_S = 30.0
"""Seconds after the end of the run that its trackers may take to send the rest; `trainyard follow` sends what is
missing."""
NOTICE_DELAY_S = 2.0
"""Seconds of these before a line says what the command waits for."""


class TrackerSidecar:
    """A context manager around a process that sends a run's metrics: `trainyard follow RUN --attached`.

    The process holds the other end of a pipe. When the pipe closes, because the run is over here or because this
    process was killed, it sends the rest and exits. Its failure is never more than a warning.
    """

    def __init__(self, run: Run, tracker_names: Sequence[TrackerName], on_event: EventHandler) -> None:
        self._run = run
        self._tracker_names = tuple(dict.fromkeys(tracker_names))
        self._on_event = on_event
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []
        self._errors: list[str] = []

    def start(self) -> None:
        """Start the process, if there are trackers and it has not been started. The run must exist."""
        if self._process is not None or not self._tracker_names:
            return
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = ["follow", self._run.name, "--storage", self._run.root_url, "--attached"]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own command; a run's name is a validated argument
                [
                    sys.executable,
                    "-m",
                    "pipeline",
                    *arguments,
                    *(argument for name in self._tracker_names for argument in ("--to", name)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C stops the run alone, which may take a while to save
            )
        except OSError as error:
            self._warn(str(error))
            return
        for stream, read in (
            (self._process.stdout, self._forward_events),
            (self._process.stderr, self._collect_errors),
        ):
            assert stream is not None
            self._readers.append(threading.Thread(target=read, args=(stream,), name="trainyard-trackers", daemon=True))
            self._readers[-1].start()

    def __enter__(self) -> TrackerSidecar:
        return self

    def __exit__(self, *what: object) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._wait_for_exit(NOTICE_DELAY_S)
        if code is None:
            self._on_event(PhaseStarted(f"sending the rest of the metrics to {' and '.join(self._tracker_names)}"))
            code = self._wait_for_exit(FINISH_TIMEOUT_S - NOTICE_DELAY_S)
        if code is None:
            self._process.kill()
            code = self._process.wait()
            self._errors[:] = [f"not all metrics were sent within {FINISH_TIMEOUT_S:.0f} s of the end"]
        for reader in self._readers:
            reader.join()
        if code:
            self._warn(self._errors[0] if self._errors else f"ended with exit code {code}")

    def _wait_for_exit(self, timeout_s: float) -> int | None:
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _warn(self, reason: str) -> None:
        text = f"{' and '.join(self._tracker_names)}: {reason}; `trainyard follow {self._run.name}` sends the rest"
        self._on_event(WarningMessage(text))

    def _forward_events(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                self._on_event(_decode_event(line))

    def _collect_errors(self, lines: IO[str]) -> None:
        with lines:
            self._errors += [line.removeprefix("error: ").strip() for line in lines if line.startswith("error: ")]


def watch_driver() -> threading.Event:
    """Return an event that is set when the driver has finished or exited. For that process, whose priority it also
    lowers below that of the training."""
    os.nice(5)
    driver_done = threading.Event()

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        driver_done.set()

    threading.Thread(target=wait, name="trainyard-driver", daemon=True).start()
    return driver_done


def make_driver_emitter(stream: IO[str]) -> EventHandler:
    """Return a handler that sends events to the driver, which may have exited. For that process."""

    def on_event(event: Event) -> None:
        assert isinstance(event, Message | WarningMessage)
        kind = "warning" if isinstance(event, WarningMessage) else "message"
        with suppress(BrokenPipeError):
            print(json.dumps({"kind": kind, "text": event.text}), file=stream, flush=True)

    return on_event


def _decode_event(line: str) -> Event:
    event = json.loads(line)
    return WarningMessage(event["text"]) if event["kind"] == "warning" else Message(event["text"])
