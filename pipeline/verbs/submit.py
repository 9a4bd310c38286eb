"""`submit`: run a job on a Ray cluster through its Jobs API, and follow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline import own_code
from pipeline.cluster.jobs.client import Cluster, connect
from pipeline.cluster.jobs.environment import environment_of
from pipeline.cluster.jobs.following import Progress, follow, look
from pipeline.cluster.jobs.identity import key_of, numbered
from pipeline.cluster.jobs.letter import Letter
from pipeline.cluster.jobs.preflight import Clearance, clear
from pipeline.cluster.jobs.shipping import CODE_FOLDER, ENTRYPOINT_MODULE, staged
from pipeline.errors import InputError
from pipeline.job import Job, plain_name
from pipeline.job_file import dump_job, resolve_job
from pipeline.redaction import hide
from pipeline.verbs.places import storage_url

POLL_S = 0.5
STOP_WAIT_S = 300
"""How long a job that is stopped may take to save and leave, before Ray kills it. (Ray's default is 3.)"""


def submit(
    job: Job | Mapping[str, Any] | str | Path,
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
    say: Callable[[str], None] = lambda text: None,
    show: Callable[[str], None] = lambda line: None,
    on_job: Callable[[str], None] = lambda job_id: None,
) -> Progress:
    """Run a job on a cluster, or attach to the same submission where it goes on there.

    Parameters
    ----------
    job: a job file, its content as a dict, or a `Job`.
    address: URL of the cluster's dashboard.
    set: overrides for the job file.
    name, storage, max_steps, allow_code_change: as for `train`; a path is one of this machine, where the cluster is on
        it too.
    env: names of variables of this environment to set for the job there; they stay out of everything that is written.
    env_files: files of such variables.
    token_file: holds the cluster's token.
    wait: follow the job to its end, and start it again where it is lost, up to `scale.retries` times.
    say: takes lines on what is being done.
    show: takes lines of the job's log.
    on_job: takes the job's id as soon as there is one.

    Returns
    -------
    How the job stands: at its end, or when it was started.

    Raises
    ------
    InputError: the job file, the cluster, the token, the versions, the room or the storage is not as it must be.
    WorkError: the cluster was lost while the job was followed.
    KeyboardInterrupt: as pressed; a job that was started goes on.
    """
    resolved_job = resolve_job(job, set)
    code = own_code.collect(resolved_job)
    environment = environment_of(env, env_files)
    hide(environment)
    if name is not None:
        _plain(name)
    cluster = connect(address, token_file, verbose=verbose)
    storage_argument = storage_url(storage, resolved_job.storage)
    preflight = clear(cluster, storage=storage_argument, scale=resolved_job.scale, environment=environment, say=say)
    say(f"cluster {preflight.text}")
    key = key_of(resolved_job, storage=preflight.storage, name=name, max_steps=max_steps, code=code.digests)
    packaged_job = resolved_job.model_copy(update={"code": CODE_FOLDER if code.files else None})
    payload = Letter(
        dump_job(packaged_job), preflight.storage, name, max_steps, verbose, environment, allow_code_change=allow_code_change
    )
    num_failures = 0
    while True:
        job_id = _start_or_attach(cluster, preflight, key, payload, code.files, resolved_job, say)
        on_job(job_id)
        if not wait:
            return look(cluster, job_id)
        job_status = follow(cluster, job_id, show, say)
        if not job_status.loss or num_failures == resolved_job.scale.retries:
            return job_status
        num_failures += 1
        say(f"warning: {job_id}: {job_status.loss}; starting again ({num_failures} of {resolved_job.scale.retries})")


def _start_or_attach(
    cluster: Cluster,
    clearance: Clearance,
    key: str,
    letter: Letter,
    code: dict[str, bytes],
    job: Job,
    say: Callable[[str], None],
) -> str:
    """The id of the one job of this key that goes on."""
    with staged(code) as package:
        while True:
            jobs = {info.submission_id: info for info in cluster.infos()}
            numbered_ids = numbered(key, jobs)
            active_ids = [one for one in numbered_ids.values() if not jobs[one].status.is_terminal()]
            if active_ids and look(cluster, active_ids[-1]).is_over:  # it said so, and Ray has not seen it yet
                time.sleep(POLL_S)
                continue
            if active_ids:
                say("the same submission goes on there: attached to it")
                return active_ids[-1]
            job_id = f"{key}-{max(numbered_ids, default=0) + 1}"
            say(f"ships {package.words()}")
            payload_name = cluster.post(letter.sealed())
            if cluster.submit(
                job_id,
                f"exec '{clearance.python}' -m {ENTRYPOINT_MODULE} {payload_name}",
                runtime_env={**package.runtime_env(), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                metadata={"trainyard_job": job.name, "trainyard_run": letter.name or ""},
            ):
                return job_id


def _plain(name: str) -> None:
    try:
        plain_name(name)
    except ValueError as error:
        raise InputError(str(error), where="--name") from None
