"""Checks of a cluster before anything of the user's is sent to it. Each failure is one message."""

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
"""Timeout for a cluster that was just started to list its own head."""
PROBE_TIMEOUT_S = 300.0
"""Timeout of the probe: a process must start on every node, and storage may be slow."""
POLL_S = 0.2


@dataclass(frozen=True)
class PreflightResult:
    """What a submission needs from the preflight checks, which all passed."""

    storage: str
    """The storage URL for the cluster."""
    python_executable: str
    """The cluster's interpreter."""
    description: str
    """The cluster in one line, for a message."""


def run_preflight(
    cluster: ClusterClient,
    *,
    storage: str,
    scale: ScalingConfig,
    environment: Mapping[str, str],
    on_progress: Callable[[str], None],
) -> PreflightResult:
    """Check a cluster from here, and by a probe that runs on it.

    Parameters
    ----------
    storage: the storage URL or path as the user wrote it.
    environment: variables that the storage needs on the cluster.
    on_progress: called with messages on checks that take long.

    Raises
    ------
    InputError: incompatible versions, too few resources, or storage that the cluster cannot read.
    """
    _check_ray_version(cluster)
    nodes, python = _wait_for_head(cluster)
    url = resolve_cluster_storage(storage, cluster.url, len(nodes))
    on_progress("running a probe on the cluster")
    payload = SubmissionPayload(
        storage=url,
        environment=environment,
        probe={
            "scale": scale.model_dump(mode="json"),
            "boot_id": read_boot_id() if is_folder_of_this_machine(storage, cluster.url) else None,
        },
    )
    versions, cluster_info = _run_probe(cluster, python, payload, scale.retries, on_progress)
    num_nodes = cluster_info["nodes"]
    # Once more, as the dashboard's list of nodes may be outdated.
    resolve_cluster_storage(storage, cluster.url, max(num_nodes, 2) if cluster_info["grows"] else num_nodes)
    description = (
        f"{cluster.url}: {num_nodes} node{'s' * (num_nodes != 1)}, {format_resources(cluster_info['has'])}; "
        f"Ray {cluster.ray_version}, Python {versions['python']}"
    )
    return PreflightResult(url, python, description)


def _check_ray_version(cluster: ClusterClient) -> None:
    import ray

    if _major_minor(ray.__version__) != _major_minor(cluster.ray_version):
        raise ClusterError(
            f"the cluster runs Ray {cluster.ray_version}, and this environment has Ray {ray.__version__}",
            where=cluster.url,
            fix=f"pip install 'ray[default,train]=={cluster.ray_version}' here, or upgrade the cluster",
        )


def _wait_for_head(cluster: ClusterClient) -> tuple[list[ClusterNode], str]:
    """Return the nodes and the head's interpreter, as soon as the cluster lists it."""
    began = time.monotonic()
    while True:
        nodes = cluster.list_nodes()
        for node in nodes:
            if node.is_head and node.python_executable:
                return nodes, node.python_executable
        if time.monotonic() - began > HEAD_READY_TIMEOUT_S:
            raise ClusterError(
                f"the cluster did not list its head within {HEAD_READY_TIMEOUT_S:.0f} s",
                where=cluster.url,
                fix="start the cluster with ray[default], and see dashboard_agent.log on the head",
            )
        time.sleep(POLL_S)


def _run_probe(
    cluster: ClusterClient, python: str, payload: SubmissionPayload, retries: int, on_progress: Callable[[str], None]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Run the probe and return its records `versions` and `cluster`. A probe that is lost is started again, up to
    `retries` times."""
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
            on_progress(f"the probe was lost: {failure}; trying again")
            return _run_probe(cluster, python, payload, retries - 1, on_progress)
        output_lines = [line for line in human_lines(log) if line.strip()] or [info.message or str(info.status)]
        output_lines = [failure] if failure else [line.partition("\n")[0] for line in output_lines]
        raise ClusterError(
            f"the probe failed on the cluster: {output_lines[-1].strip()[:300]}",
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
                f"the probe did not end within {PROBE_TIMEOUT_S:.0f} s",
                where=cluster.url,
                fix=f"see its state: trainyard status {job_id} --address {cluster.url}",
            )
        time.sleep(POLL_S)


def _check_versions(cluster: ClusterClient, versions: Mapping[str, Any]) -> None:
    if _major_minor(versions["python"]) != _major_minor(platform.python_version()):
        raise ClusterError(
            f"the cluster runs Python {versions['python']}, and this is Python {platform.python_version()}",
            where=cluster.url,
            fix="submit from an environment with the cluster's Python",
        )
    missing = [
        f"{requirement} ({'not installed' if installed_version is None else installed_version})"
        for requirement in list_requirements()
        if (installed_version := versions["installed"].get(canonicalize_name(requirement.name))) is None
        or not requirement.specifier.contains(installed_version, prereleases=True)
    ]
    if missing:
        raise ClusterError(
            f"the cluster's environment lacks {', '.join(missing)}",
            where=cluster.url,
            fix=f"pip install them there, for {sys.implementation.name} {versions['python']}, on every node",
        )


def list_requirements() -> list[Requirement]:
    """Return Trainyard's requirements without extras; none if it is not installed as a distribution."""
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
