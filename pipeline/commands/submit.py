"""`submit`: run a job on a Ray cluster through its Jobs API, and follow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline import user_code
from pipeline.cluster.submission.client import ClusterClient, connect
from pipeline.cluster.submission.job_status import JobStatus, get_status, tail_until_done
from pipeline.cluster.submission.packaging import CODE_FOLDER, ENTRYPOINT_MODULE, stage_package
from pipeline.cluster.submission.payload import SubmissionPayload, collect_env_vars, find_numbered_ids, submission_key
from pipeline.cluster.submission.preflight import PreflightResult, run_preflight
from pipeline.config import JobConfig, validate_name
from pipeline.config.files import dump_job, resolve_job
from pipeline.errors import InputError
from pipeline.redaction import register_secrets
from pipeline.runs.locate import resolve_storage_url

POLL_S = 0.5
"""Seconds between two requests for a job's status."""
JOB_METADATA_KEY = "trainyard_job"
"""In the metadata of every job that `submit` starts: the name of the job."""
STOP_WAIT_S = 300
"""Seconds that a stopped job may take to save and exit before Ray kills it. (Ray's default is 3.)"""


def submit(
    job: JobConfig | Mapping[str, Any] | str | Path,
    *,
    address: str | None = None,
    set: Iterable[str] = (),  # noqa: A002 - the public name of the option
    name: str | None = None,
    storage: str | None = None,
    max_steps: int | None = None,
    allow_code_change: bool = False,
    env: Iterable[str] = (),
    env_files: Iterable[str] = (),
    token_file: str | None = None,
    wait: bool = True,
    verbose: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
    on_log_line: Callable[[str], None] = lambda line: None,
    on_job: Callable[[str], None] = lambda job_id: None,
) -> JobStatus:
    """Run a job on a cluster, or attach to the same submission if it is running there.

    Parameters
    ----------
    job: a job file, its content as a dict, or a `JobConfig`.
    address: URL of the cluster's dashboard.
    set: overrides for the job file, as `KEY=VALUE`.
    name, storage, max_steps, allow_code_change: as for `train`. A path as `storage` is a path on this machine if the
        cluster runs on it, else an absolute path on the cluster's only node.
    env: names of environment variables of this process to set for the job; their values are never written or shown.
    env_files: files of such variables, in lines of KEY=VALUE.
    token_file: file with the cluster's token.
    wait: follow the job to its end, and start it again if it is lost, up to `scale.retries` times.
    verbose: show Ray's log lines and tracebacks too.
    on_progress: receives lines about the submission.
    on_log_line: receives the lines of the job's log.
    on_job: receives the job's id as soon as there is one.

    Returns
    -------
    The status of the job: at its end, or, without `wait`, after its start.

    Raises
    ------
    InputError: the job file, the cluster, the token, the versions, the resources or the storage cannot be used.
    WorkError: the connection to the cluster was lost while the job was followed.
    KeyboardInterrupt: Ctrl-C was pressed; a job that was started keeps running.
    """
    resolved_job = resolve_job(job, set)
    code = user_code.collect_user_code(resolved_job)
    environment = collect_env_vars(env, env_files)
    register_secrets(environment)
    if name is not None:
        _check_run_name(name)
    cluster = connect(address, token_file, verbose=verbose)
    storage_argument = resolve_storage_url(storage, resolved_job.storage)
    preflight = run_preflight(
        cluster, storage=storage_argument, scale=resolved_job.scale, environment=environment, on_progress=on_progress
    )
    on_progress(f"cluster {preflight.description}")
    key = submission_key(resolved_job, storage=preflight.storage, name=name, max_steps=max_steps, code=code.digests)
    packaged_job = resolved_job.model_copy(update={"code": CODE_FOLDER if code.files else None})
    payload = SubmissionPayload(
        dump_job(packaged_job),
        preflight.storage,
        name,
        max_steps,
        verbose,
        environment,
        allow_code_change=allow_code_change,
    )
    num_failures = 0
    while True:
        job_id = _start_or_attach(cluster, preflight, key, payload, code.files, resolved_job, on_progress)
        on_job(job_id)
        if not wait:
            return get_status(cluster, job_id)
        job_status = tail_until_done(cluster, job_id, on_log_line, on_progress)
        if not job_status.failure or num_failures == resolved_job.scale.retries:
            return job_status
        num_failures += 1
        on_progress(
            f"warning: {job_id}: {job_status.failure}; starting again ({num_failures} of {resolved_job.scale.retries})"
        )


def _start_or_attach(
    cluster: ClusterClient,
    preflight: PreflightResult,
    key: str,
    payload: SubmissionPayload,
    code: dict[str, bytes],
    job: JobConfig,
    on_progress: Callable[[str], None],
) -> str:
    """Return the id of the running job with this key; start one if there is none."""
    with stage_package(code) as package:
        while True:
            jobs = {info.submission_id: info for info in cluster.list_jobs()}
            numbered_ids = find_numbered_ids(key, jobs)
            active_ids = [job_id for job_id in numbered_ids.values() if not jobs[job_id].status.is_terminal()]
            if active_ids and get_status(cluster, active_ids[-1]).is_over:  # its log says so, but not yet Ray's status
                time.sleep(POLL_S)
                continue
            if active_ids:
                on_progress("the same submission is running there: attached to it")
                return active_ids[-1]
            job_id = f"{key}-{max(numbered_ids, default=0) + 1}"
            on_progress(f"uploading {package.describe()}")
            payload_name = cluster.upload_payload(payload.to_bytes())
            if cluster.submit_job(
                job_id,
                f"exec '{preflight.python_executable}' -m {ENTRYPOINT_MODULE} {payload_name}",
                runtime_env={**package.runtime_env(), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                metadata={JOB_METADATA_KEY: job.name, "trainyard_run": payload.name or ""},
            ):
                return job_id


def _check_run_name(name: str) -> None:
    try:
        validate_name(name)
    except ValueError as error:
        raise InputError(str(error), where="--name") from None
