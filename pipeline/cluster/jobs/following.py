"""Following a job: what it writes, as it writes it, through connections that break, to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.cluster.jobs.client import Cluster
from pipeline.cluster.jobs.records import last, lines_for_people, without_rays_end
from pipeline.cluster.losses import reason_in
from pipeline.errors import ClusterError, WorkError

LOST_S = 120.0
"""How long a cluster may stay silent while a job is followed."""
CHECK_S = 5.0
"""A connection that brings nothing for so long is checked."""
AGAIN_S = 1.0
"""Between two attempts to reach a cluster."""

LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")
"""What Ray calls the loss of the process that starts an entry point, and ends with it."""

ENDED = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 143}
"""Exit codes of jobs whose entry point could not tell its own."""


@dataclass(frozen=True)
class Progress:
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
        return self.outcome is not None or self.ray_status in ENDED

    @property
    def loss(self) -> str:
        """What ended the job from outside, before it could say how it ended: a new start goes on with its run. Empty
        where nothing did, or where it was asked to stop."""
        if self.outcome is not None or self.ray_status != "FAILED":
            return ""
        code = self.driver_exit_code
        if code is not None:
            return f"its entry point was killed by signal {-code}" if code < 0 else ""
        reason = reason_in(self.message) or "no reason was given"
        return f"the process that Ray ran it from was lost ({reason})" if self.error_type in LOST else ""

    @property
    def exit_code(self) -> int | None:
        """As `trainyard train` has them; None while the job goes on."""
        if self.outcome is not None:
            return int(self.outcome["exit_code"])
        if not self.is_over:
            return None
        code = self.driver_exit_code
        return code if code is not None and code > 0 else ENDED[self.ray_status]

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
            "submitted": _iso(self.started),
            "seconds": self.ended - self.started if self.started and self.ended else None,
        }


def _iso(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None


def progress_of(info: Any, log: str) -> Progress:
    """What Ray's details and the log of a job say together."""
    run = last(log, "run") or {}
    return Progress(
        id=info.submission_id,
        ray_status=str(info.status.value),
        message=info.message or "",
        started=info.start_time / 1000 if info.start_time else None,
        ended=info.end_time / 1000 if info.end_time else None,
        driver_exit_code=info.driver_exit_code,
        error_type=str(getattr(info, "error_type", None) or ""),
        run=run.get("run", ""),
        url=run.get("url", ""),
        outcome=last(log, "end"),
    )


def look(cluster: Cluster, job_id: str) -> Progress:
    """A job as it stands now.

    Raises
    ------
    WorkError: the cluster does not know the job.
    """
    info = cluster.info(job_id)
    if info is None:
        raise WorkError(
            f"the cluster knows no job {job_id}",
            where=cluster.url,
            fix="a cluster that was started anew has forgotten its jobs: the same submit again goes on with the run",
        )
    has_begun = str(info.status.value) != "PENDING"
    return progress_of(info, cluster.logs(job_id) if has_begun else "")


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None], say: Callable[[str], None]) -> Progress:
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
    cursor = _Written(show)
    silent_since: float | None = None
    while True:
        shown_before, reason = cursor.count, ""
        with suppress(Exception):  # whatever breaks a connection: what the cluster says next is what counts
            asyncio.run(_tail(cluster, job_id, cursor))
        try:
            now = look(cluster, job_id)
            if now.is_over:
                cursor.whole(cluster.logs(job_id))
                return now
            silent_since = None
        except ClusterError as error:
            reason = error.what
        if reason:
            if silent_since is None or cursor.count > shown_before:
                silent_since = time.monotonic()
                say(f"lost the connection to the cluster ({reason}): trying again for {LOST_S:.0f} s")
            if time.monotonic() - silent_since > LOST_S:
                raise WorkError(
                    f"no answer from the cluster for {LOST_S:.0f} s",
                    where=f"{job_id} on {cluster.url}",
                    fix="the job goes on if the cluster does; the same submit again attaches to it, or resumes its run",
                )
        time.sleep(AGAIN_S)


async def _tail(cluster: Cluster, job_id: str, written: _Written) -> None:
    """Show the log until it ends, or until the cluster does not answer beside it."""
    chunks = aiter(cluster.tail(job_id))
    written.from_the_start()
    while True:
        chunk = asyncio.ensure_future(anext(chunks, None))
        while not (await asyncio.wait([chunk], timeout=CHECK_S))[0]:  # a host that was cut off closes nothing
            try:
                info = await asyncio.to_thread(cluster.info, job_id)
            except ClusterError:
                info = None
            if info is None:
                chunk.cancel()
                return
        text = await chunk
        if text is None or written.more(text):
            return


class _Written:
    """What a job has written. Every new connection brings it from the start; it is shown once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.count = 0
        """Characters that were shown, up to the last whole line."""
        self._show = show
        self._text = ""

    def from_the_start(self) -> None:
        self._text = ""

    def more(self, text: str) -> bool:
        """Take what comes next, and show the whole lines of it that are new; whether the last word is among them."""
        self._text = without_rays_end(self._text + text)
        end = self._text.rfind("\n") + 1
        new = self._text[self.count : end]
        self.count = max(self.count, end)
        for line in lines_for_people(new):
            self._show(line)
        return last(new, "end") is not None

    def whole(self, log: str) -> None:
        """Take all of it, at the end."""
        self.from_the_start()
        self.more(log if log.endswith("\n") or not log else f"{log}\n")
