"""`status`, `logs` and `stop` for submitted jobs, by their id or by the name of their run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline.cluster.submission.client import ClusterClient, connect
from pipeline.cluster.submission.job_status import JobStatus, get_status, status_from, tail_until_done
from pipeline.cluster.submission.log_records import human_lines
from pipeline.commands.submit import JOB_METADATA_KEY, POLL_S, STOP_WAIT_S
from pipeline.errors import ClusterError, InputError, WorkError

STOP_SLACK_S = 30.0
"""Seconds after the exit of the entry point within which Ray reports the end of the job."""


def status(
    job_or_run: str | None = None, *, address: str | None = None, token_file: str | None = None
) -> tuple[str, list[JobStatus]]:
    """Return the cluster's address and the status of its submitted jobs, oldest first, or of one of them.

    Raises
    ------
    InputError: no such cluster, job or run.
    """
    cluster = connect(address, token_file)
    if job_or_run is not None:
        return cluster.url, [get_status(cluster, find_job(cluster, job_or_run))]
    statuses = [
        status_from(info, _read_log(cluster, info))
        for info in cluster.list_jobs()
        if JOB_METADATA_KEY in (info.metadata or {})
    ]
    return cluster.url, statuses


def logs(
    job_or_run: str,
    *,
    address: str | None = None,
    token_file: str | None = None,
    until_end: bool = False,
    on_line: Callable[[str], None],
    on_progress: Callable[[str], None] = lambda text: None,
    on_job: Callable[[str], None] = lambda job_id: None,
) -> JobStatus:
    """Pass the lines of a job's log to `on_line`, with `until_end` until the job ends.

    Raises
    ------
    InputError: no such cluster, job or run.
    WorkError: the connection to the cluster was lost.
    """
    cluster = connect(address, token_file)
    job_id = find_job(cluster, job_or_run)
    on_job(job_id)
    if until_end:
        return tail_until_done(cluster, job_id, on_line, on_progress)
    info = cluster.get_job_info(job_id)
    log = _read_log(cluster, info)
    for line in human_lines(log):
        on_line(line)
    return status_from(info, log)


def stop(
    job_or_run: str,
    *,
    address: str | None = None,
    token_file: str | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> JobStatus:
    """Stop a job after it has saved a checkpoint, and return its status at the end.

    Raises
    ------
    InputError: no such cluster, job or run.
    WorkError: the job did not end in time.
    """
    cluster = connect(address, token_file)
    job_id = find_job(cluster, job_or_run)
    job_status = get_status(cluster, job_id)
    if job_status.is_over:
        on_progress("the job has ended already")
        return job_status
    cluster.stop_job(job_id)
    on_progress(f"stopping {job_id}: it has {STOP_WAIT_S} s to save and exit")
    start = time.monotonic()
    while time.monotonic() - start < STOP_WAIT_S + STOP_SLACK_S:
        job_status = get_status(cluster, job_id)
        if job_status.is_over:
            return job_status
        time.sleep(POLL_S)
    raise WorkError(
        f"has not ended {STOP_WAIT_S + STOP_SLACK_S:.0f} s after the request to stop",
        where=f"{job_id} on {cluster.url}",
        fix=f"see `trainyard logs {job_id} --address {cluster.url}`",
    )


def format_outcome(job_status: JobStatus) -> str:
    """Format the outcome of a job that has ended as text, with what to do next."""
    head = f"{job_status.id}: {job_status.status}"
    if job_status.outcome is not None and "error" in job_status.outcome:
        return f"{head}: {job_status.outcome['error']['message']}"
    if job_status.outcome is not None:
        return head
    if job_status.ray_status == "STOPPED":
        return f"{head}: killed before it could save\n  the same submit resumes from the last checkpoint"
    message_lines = [line.strip() for line in job_status.message.splitlines() if line.strip()] or [
        "no reason was given"
    ]
    # The last line of the log, if the entry point ran; else the first line of Ray's message.
    reason = job_status.failure or message_lines[-1 if job_status.driver_exit_code is not None else 0]
    return f"{head}: {reason}\n  the same submit resumes from the last checkpoint"


def find_job(cluster: ClusterClient, job_or_run: str) -> str:
    """Return the id of a job, given its id, or the name of a run, whose latest job it is.

    Raises
    ------
    InputError: there is none.
    """
    if cluster.get_job_info(job_or_run) is not None:
        return job_or_run
    for info in reversed(cluster.list_jobs()):
        metadata = info.metadata or {}
        run_name = metadata.get("trainyard_run")
        if JOB_METADATA_KEY not in metadata or not job_or_run.startswith(run_name or metadata[JOB_METADATA_KEY]):
            continue
        if run_name == job_or_run or status_from(info, _read_log(cluster, info)).run == job_or_run:
            return str(info.submission_id)
    raise InputError(f"no job and no run {job_or_run!r}", where=cluster.url, fix="`trainyard status` lists the jobs")


def _read_log(cluster: ClusterClient, info: Any) -> str:
    """Return the log of a job; empty if the job has not started, or if the node with the log is gone."""
    if str(info.status.value) == "PENDING":
        return ""
    try:
        return cluster.get_job_logs(info.submission_id)
    except ClusterError:
        return ""
