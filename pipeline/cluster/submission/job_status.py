"""The status of a submitted job, and following its log to the end through connections that break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.cluster.failure_policy import match_reason
from pipeline.cluster.submission.client import ClusterClient
from pipeline.cluster.submission.log_records import find_last_record, human_lines, strip_ray_actor_death
from pipeline.errors import ClusterError, WorkError

CONNECTION_LOST_TIMEOUT_S = 120.0
"""Seconds without an answer from the cluster until following a job is given up."""
IDLE_CHECK_S = 5.0
"""Seconds without new output until the connection is checked."""
RECONNECT_INTERVAL_S = 1.0
"""Seconds between two attempts to connect."""

LOST_ERROR_TYPES = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")
"""Ray's names for the loss of the process that started an entry point, and with it of the entry point."""

TERMINAL_EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 143}
"""Exit codes of jobs, by Ray's status, if the entry point did not report its own."""


@dataclass(frozen=True)
class JobStatus:
    """The status of a job: Ray's details, and what its entry point wrote to the log."""

    id: str
    ray_status: str
    message: str
    started: float | None
    """Seconds since 1970, by the cluster's clock."""
    ended: float | None
    driver_exit_code: int | None
    error_type: str = ""
    """Ray's name of an error outside the entry point."""
    run: str = ""
    """The name of the run; empty until the entry point has reported it. So is `url`."""
    url: str = ""
    outcome: dict[str, Any] | None = None
    """The entry point's last record; None if the job is still running, or was killed."""

    @property
    def is_over(self) -> bool:
        """Whether the job has ended. Ray reports that some seconds after the entry point's last record."""
        return self.outcome is not None or self.ray_status in TERMINAL_EXIT_CODES

    @property
    def failure(self) -> str:
        """What ended the job from outside, before it could report an outcome: another submission resumes its run. Empty
        if nothing did, or if the job was asked to stop."""
        if self.outcome is not None or self.ray_status != "FAILED":
            return ""
        code = self.driver_exit_code
        if code is not None:
            return f"its entry point was killed by signal {-code}" if code < 0 else ""
        reason = match_reason(self.message) or "no reason was given"
        return f"Ray's process that started it was lost ({reason})" if self.error_type in LOST_ERROR_TYPES else ""

    @property
    def exit_code(self) -> int | None:
        """The exit code, as of `trainyard train`; None while the job is running."""
        if self.outcome is not None:
            return int(self.outcome["exit_code"])
        if not self.is_over:
            return None
        code = self.driver_exit_code
        return code if code is not None and code > 0 else TERMINAL_EXIT_CODES[self.ray_status]

    @property
    def status(self) -> str:
        """As the status of runs: pending, running, interrupted, failed or finished."""
        if not self.is_over:
            return self.ray_status.lower()
        code = self.exit_code
        return "finished" if code == 0 else "interrupted" if code in (130, 143) else "failed"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        result = (self.outcome or {}).get("result") or {}
        return {
            **result,
            "job": self.id,
            "run": self.run or None,
            "url": self.url or None,
            "status": self.status,
            "exit_code": self.exit_code,
            "submitted": _format_timestamp(self.started),
            "seconds": self.ended - self.started if self.started and self.ended else None,
        }


def _format_timestamp(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None


def status_from(info: Any, log: str) -> JobStatus:
    """Combine Ray's details of a job and its log."""
    run = find_last_record(log, "run") or {}
    return JobStatus(
        id=info.submission_id,
        ray_status=str(info.status.value),
        message=info.message or "",
        started=info.start_time / 1000 if info.start_time else None,
        ended=info.end_time / 1000 if info.end_time else None,
        driver_exit_code=info.driver_exit_code,
        error_type=str(getattr(info, "error_type", None) or ""),
        run=run.get("run", ""),
        url=run.get("url", ""),
        outcome=find_last_record(log, "end"),
    )


def get_status(cluster: ClusterClient, job_id: str) -> JobStatus:
    """Return the current status of a job.

    Raises
    ------
    WorkError: the cluster has no such job.
    """
    info = cluster.get_job_info(job_id)
    if info is None:
        raise WorkError(
            f"the cluster has no job {job_id}",
            where=cluster.url,
            fix="a restarted cluster has lost its jobs: the same submit command resumes the run",
        )
    has_begun = str(info.status.value) != "PENDING"
    return status_from(info, cluster.get_job_logs(job_id) if has_begun else "")


def tail_until_done(
    cluster: ClusterClient, job_id: str, on_line: Callable[[str], None], on_progress: Callable[[str], None]
) -> JobStatus:
    """Follow a job's log until the job ends.

    Parameters
    ----------
    on_line: called with each line of the log.
    on_progress: called with messages on the connection.

    Returns
    -------
    The job's final status.

    Raises
    ------
    WorkError: the cluster did not answer for CONNECTION_LOST_TIMEOUT_S, or does not have the job any more.
    KeyboardInterrupt: Ctrl-C was pressed; the job goes on.
    """
    cursor = LogCursor(on_line)
    silent_since: float | None = None
    while True:
        shown_before, reason = cursor.num_shown, ""
        with suppress(Exception):  # the connection may break in many ways; get_status decides what follows
            asyncio.run(_stream_log(cluster, job_id, cursor))
        try:
            status = get_status(cluster, job_id)
            if status.is_over:
                cursor.finish(cluster.get_job_logs(job_id))
                return status
            silent_since = None
        except ClusterError as error:
            reason = error.what
        if reason:
            if silent_since is None or cursor.num_shown > shown_before:
                silent_since = time.monotonic()
                on_progress(
                    f"lost the connection to the cluster ({reason}): trying again for {CONNECTION_LOST_TIMEOUT_S:.0f} s"
                )
            if time.monotonic() - silent_since > CONNECTION_LOST_TIMEOUT_S:
                raise WorkError(
                    f"no answer from the cluster for {CONNECTION_LOST_TIMEOUT_S:.0f} s",
                    where=f"{job_id} on {cluster.url}",
                    fix="the job goes on if the cluster does; the same submit command attaches to it or resumes it",
                )
        time.sleep(RECONNECT_INTERVAL_S)


async def _stream_log(cluster: ClusterClient, job_id: str, cursor: LogCursor) -> None:
    """Read the log until it ends, or until the cluster does not answer other requests."""
    chunks = aiter(cluster.tail_job_logs(job_id))
    cursor.rewind()
    while True:
        chunk = asyncio.ensure_future(anext(chunks, None))
        # A host that was disconnected does not close the connection.
        while not (await asyncio.wait([chunk], timeout=IDLE_CHECK_S))[0]:
            try:
                info = await asyncio.to_thread(cluster.get_job_info, job_id)
            except ClusterError:
                info = None
            if info is None:
                chunk.cancel()
                return
        text = await chunk
        if text is None or cursor.feed(text):
            return


class LogCursor:
    """The position in a job's log. Every connection sends the log from its start; each line is shown once."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.num_shown = 0
        """How many characters were shown, up to the last complete line."""
        self._on_line = on_line
        self._text = ""

    def rewind(self) -> None:
        self._text = ""

    def feed(self, text: str) -> bool:
        """Add text and show the new complete lines. Returns whether the entry point's last record is among them."""
        self._text += text  # whole, since Ray's paragraph may come in several pieces
        visible = strip_ray_actor_death(self._text)
        end = visible.rfind("\n") + 1
        new = visible[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        for line in human_lines(new):
            self._on_line(line)
        return find_last_record(new, "end") is not None

    def finish(self, log: str) -> None:
        """Show what is left of the complete log, at the end."""
        self.rewind()
        self.feed(log if log.endswith("\n") or not log else f"{log}\n")
