"""What must hold before anything of the user's is sent to a cluster; each failure is one message."""

from __future__ import annotations

import platform
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.cluster.resources import format_resources
from pipeline.cluster.submission.client import ClusterClient, ClusterNode
from pipeline.cluster.submission.job_status import status_from
from pipeline.cluster.submission.log_records import find_last_record, human_lines
from pipeline.cluster.submission.packaging import stage_package
from pipeline.cluster.submission.payload import SubmissionPayload
from pipeline.cluster.submission.storage_url import is_folder_of_this_machine, resolve_cluster_storage
from pipeline.config import ScalingConfig
from pipeline.errors import ClusterError, InputError
from pipeline.runs.lease.process_lock import read_boot_id

HEAD_READY_TIMEOUT_S = 30.0
"""How long a cluster that has just been started may need to know its own head."""
PROBE_TIMEOUT_S = 300.0
"""How long the probe may take: a process must start on every node, and storage may be slow."""
POLL_S = 0.2


@dataclass(frozen=True)
class PreflightResult:
    """All is well: what a submission needs to know of the cluster."""

    storage: str
    """As the cluster is to read it."""
    python_executable: str
    """The cluster's interpreter."""
    description: str
    """The cluster, in a line for people."""


def run_preflight(
    cluster: ClusterClient,
    *,
    storage: str,
    scale: ScalingConfig,
    environment: Mapping[str, str],
    on_progress: Callable[[str], None],
) -> PreflightResult:
    """Look at a cluster, from here and from inside.

    Parameters
    ----------
    storage: as the user wrote it.
    environment: what storage needs there.
    say: takes what is being done, where it takes long.

    Raises
    ------
    InputError: versions that do not go together, too few resources, or storage that the cluster does not see.
    """
    _check_ray_version(cluster)
    nodes, python = _wait_for_head(cluster)
    url = resolve_cluster_storage(storage, cluster.url, len(nodes))
    on_progress("looking at the cluster from inside")
    payload = SubmissionPayload(
        storage=url,
        environment=environment,
        probe={
            "scale": scale.model_dump(mode="json"),
            "boot_id": read_boot_id() if is_folder_of_this_machine(storage, cluster.url) else None,
        },
    )
    versions, cluster_info = _run_probe(cluster, python, payload, scale.retries, on_progress)
    count = cluster_info["nodes"]
    resolve_cluster_storage(
        storage, cluster.url, max(count, 2) if cluster_info["grows"] else count
    )  # the dashboard's list may be old
    text = (
        f"{cluster.url}: {count} node{'s' * (count != 1)}, {format_resources(cluster_info['has'])}; Ray "
        f"{cluster.ray_version},"
        f" Python {versions['python']}"
    )
    return PreflightResult(url, python, text)


def _check_ray_version(cluster: ClusterClient) -> None:
    import ray

    if _major_minor(ray.__version__) != _major_minor(cluster.ray_version):
        raise ClusterError(
            f"the cluster runs Ray {cluster.ray_version}, and here is Ray {ray.__version__}",
            where=cluster.url,
            fix=f"pip install 'ray[default,train]=={cluster.ray_version}' here, or upgrade the cluster",
        )


def _wait_for_head(cluster: ClusterClient) -> tuple[list[ClusterNode], str]:
    """The nodes, once the head among them has told which interpreter it uses."""
    began = time.monotonic()
    while True:
        nodes = cluster.list_nodes()
        for node in nodes:
            if node.is_head and node.python_executable:
                return nodes, node.python_executable
        if time.monotonic() - began > HEAD_READY_TIMEOUT_S:
            raise ClusterError(
                f"the head did not tell of itself within {HEAD_READY_TIMEOUT_S:.0f} s",
                where=cluster.url,
                fix="start the cluster with ray[default], and see dashboard_agent.log on the head",
            )
        time.sleep(POLL_S)


def _run_probe(
    cluster: ClusterClient, python: str, payload: SubmissionPayload, retries: int, on_progress: Callable[[str], None]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the probe found: versions, and the cluster. One that was lost is sent again."""
    job_id = f"trainyard-probe-{secrets.token_hex(4)}"
    with stage_package({}) as package:
        payload_name = cluster.upload_payload(payload.to_bytes())
        command = f"exec '{python}' -m pipeline.cluster.submission.probe {payload_name}"
        cluster.submit_job(job_id, command, runtime_env=package.runtime_env(), metadata={})
    info = _wait_for_job(cluster, job_id)
    log = cluster.get_job_logs(job_id)
    versions, cluster_info, refusal = (find_last_record(log, kind) for kind in ("versions", "cluster", "refused"))
    if versions is not None:
        _check_versions(cluster, versions)
    if refusal is not None:
        raise InputError(refusal["what"], where=refusal["where"], fix=refusal["fix"])
    if versions is None or cluster_info is None:
        failure = status_from(info, log).failure
        if failure and retries:
            on_progress(f"a first small job was lost: {failure}; trying again")
            return _run_probe(cluster, python, payload, retries - 1, on_progress)
        output_lines = [line for line in human_lines(log) if line.strip()] or [info.message or str(info.status)]
        output_lines = [failure] if failure else [line.partition("\n")[0] for line in output_lines]
        raise ClusterError(
            f"a first small job failed there: {output_lines[-1].strip()[:300]}",
            where=cluster.url,
            fix=f"is Trainyard's environment on every node? The interpreter is {python}",
        )
    return versions, cluster_info


def _wait_for_job(cluster: ClusterClient, job_id: str) -> Any:
    began = time.monotonic()
    while True:
        info = cluster.get_job_info(job_id)
        if info is not None and info.status.is_terminal():
            return info
        if info is None or time.monotonic() - began > PROBE_TIMEOUT_S:
            cluster.stop_job(job_id)
            raise ClusterError(
                f"a first small job did not end within {PROBE_TIMEOUT_S:.0f} s",
                where=cluster.url,
                fix=f"see its state: trainyard status {job_id} --address {cluster.url}",
            )
        time.sleep(POLL_S)


def _check_versions(cluster: ClusterClient, versions: Mapping[str, Any]) -> None:
    if _major_minor(versions["python"]) != _major_minor(platform.python_version()):
        raise ClusterError(
            f"the cluster runs Python {versions['python']}, and here is Python {platform.python_version()}",
            where=cluster.url,
            fix="submit from an environment with the cluster's Python",
        )
    missing = [
        f"{need} ({'not there' if installed_version is None else installed_version})"
        for need in list_requirements()
        if (installed_version := versions["installed"].get(canonicalize_name(need.name))) is None
        or not need.specifier.contains(installed_version, prereleases=True)
    ]
    if missing:
        raise ClusterError(
            f"the cluster's environment lacks {', '.join(missing)}",
            where=cluster.url,
            fix=f"pip install them there, for {sys.implementation.name} {versions['python']}, on every node",
        )


def list_requirements() -> list[Requirement]:
    """What Trainyard itself needs to be installed, extras aside; nothing where it is not installed itself."""
    try:
        declared = metadata.requires("trainyard") or []
    except metadata.PackageNotFoundError:
        return []
    all_requirements = [Requirement(line) for line in declared]
    return [
        requirement
        for requirement in all_requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def _major_minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
