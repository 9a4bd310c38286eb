"""Following a job: what it writes, as it writes it, through connections that break, to its end."""

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
"""How long a cluster may stay silent while a job is followed."""
IDLE_CHECK_S = 5.0
"""A connection that brings nothing for so long is checked."""
RECONNECT_INTERVAL_S = 1.0
"""Between two attempts to reach a cluster."""

LOST_ERROR_TYPES = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")
"""What Ray calls the loss of the process that starts an entry point, and ends with it."""

TERMINAL_EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 143}
"""Exit codes of jobs whose entry point could not tell its own."""


@dataclass(frozen=True)
class JobStatus:
    """What is known of a job: Ray's details, and what its entry point said.

    run, url: empty until the entry point has told them.
    outcome: its last word, or None: it goes on, or was killed.
    """

    id: str
    ray_status: str
    message: str
    started: float | None
    """Seconds since 1970, by the cluster's clock."""
    ended: float | None
    driver_exit_code: int | None
    error_type: str = ""
    """Ray's name for what went wrong, where that was not the entry point."""
    run: str = ""
    url: str = ""
    outcome: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come. Ray knows it some seconds after the entry point has said so."""
        return self.outcome is not None or self.ray_status in TERMINAL_EXIT_CODES

    @property
    def failure(self) -> str:
        """What ended the job from outside, before it could say how it ended: a new start goes on with its run. Empty
        where nothing did, or where it was asked to stop."""
        if self.outcome is not None or self.ray_status != "FAILED":
            return ""
        code = self.driver_exit_code
        if code is not None:
            return f"its entry point was killed by signal {-code}" if code < 0 else ""
        reason = match_reason(self.message) or "no reason was given"
        return f"the process that Ray ran it from was lost ({reason})" if self.error_type in LOST_ERROR_TYPES else ""

    @property
    def exit_code(self) -> int | None:
        """As `trainyard train` has them; None while the job goes on."""
        if self.outcome is not None:
            return int(self.outcome["exit_code"])
        if not self.is_over:
            return None
        code = self.driver_exit_code
        return code if code is not None and code > 0 else TERMINAL_EXIT_CODES[self.ray_status]

    @property
    def status(self) -> str:
        """In the words that runs have: pending, running, interrupted, failed, finished."""
        if not self.is_over:
            return self.ray_status.lower()
        code = self.exit_code
        return "finished" if code == 0 else "interrupted" if code in (130, 143) else "failed"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
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
    """What Ray's details and the log of a job say together."""
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
    """A job as it stands now.

    Raises
    ------
    WorkError: the cluster does not know the job.
    """
    info = cluster.get_job_info(job_id)
    if info is None:
        raise WorkError(
            f"the cluster knows no job {job_id}",
            where=cluster.url,
            fix="a cluster that was started anew has forgotten its jobs: the same submit again goes on with the run",
        )
    has_begun = str(info.status.value) != "PENDING"
    return status_from(info, cluster.get_job_logs(job_id) if has_begun else "")


def tail_until_done(
    cluster: ClusterClient, job_id: str, on_line: Callable[[str], None], on_progress: Callable[[str], None]
) -> JobStatus:
    """Show what a job writes until it ends.

    Parameters
    ----------
    show: takes a line of its log.
    say: takes a line on the connection.

    Returns
    -------
    How it ended.

    Raises
    ------
    WorkError: the cluster was silent for LOST_S, or does not know the job any more.
    KeyboardInterrupt: as pressed; the job goes on.
    """
    cursor = _LogCursor(on_line)
    silent_since: float | None = None
    while True:
        shown_before, reason = cursor.num_shown, ""
        with suppress(Exception):  # whatever breaks a connection: what the cluster says next is what counts
            asyncio.run(_stream_log(cluster, job_id, cursor))
        try:
            now = get_status(cluster, job_id)
            if now.is_over:
                cursor.finish(cluster.get_job_logs(job_id))
                return now
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
                    fix="the job goes on if the cluster does; the same submit again attaches to it, or resumes its run",
                )
        time.sleep(RECONNECT_INTERVAL_S)


async def _stream_log(cluster: ClusterClient, job_id: str, cursor: _LogCursor) -> None:
    """Show the log until it ends, or until the cluster does not answer beside it."""
    chunks = aiter(cluster.tail_job_logs(job_id))
    cursor.rewind()
    while True:
        chunk = asyncio.ensure_future(anext(chunks, None))
        while not (await asyncio.wait([chunk], timeout=IDLE_CHECK_S))[0]:  # a host that was cut off closes nothing
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


class _LogCursor:
    """What a job has written. Every new connection brings it from the start; it is shown once."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.num_shown = 0
        """Characters that were shown, up to the last whole line."""
        self._on_line = on_line
        self._text = ""

    def rewind(self) -> None:
        self._text = ""

    def feed(self, text: str) -> bool:
        """Take what comes next, and show the whole lines of it that are new; whether the last word is among them."""
        self._text = strip_ray_actor_death(self._text + text)
        end = self._text.rfind("\n") + 1
        new = self._text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        for line in human_lines(new):
            self._on_line(line)
        return find_last_record(new, "end") is not None

    def finish(self, log: str) -> None:
        """Take all of it, at the end."""
        self.rewind()
        self.feed(log if log.endswith("\n") or not log else f"{log}\n")
