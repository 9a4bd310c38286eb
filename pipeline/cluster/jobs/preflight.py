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

from pipeline.cluster.jobs.client import Cluster, Node
from pipeline.cluster.jobs.following import progress_of
from pipeline.cluster.jobs.letter import Letter
from pipeline.cluster.jobs.places import must_be_here, storage_for
from pipeline.cluster.jobs.records import last, lines_for_people
from pipeline.cluster.jobs.shipping import staged
from pipeline.cluster.room import words
from pipeline.errors import ClusterError, InputError
from pipeline.job import Scale
from pipeline.record.lock import boot

NODES_S = 30.0
"""How long a cluster that has just been started may need to know its own head."""
PROBE_S = 300.0
"""How long the probe may take: a process must start on every node, and storage may be slow."""
POLL_S = 0.2


@dataclass(frozen=True)
class Clearance:
    """All is well: what a submission needs to know of the cluster."""

    storage: str
    """As the cluster is to read it."""
    python: str
    """The cluster's interpreter."""
    text: str
    """The cluster, in a line for people."""


def clear(
    cluster: Cluster, *, storage: str, scale: Scale, environment: Mapping[str, str], say: Callable[[str], None]
) -> Clearance:
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
    _same_ray(cluster)
    nodes, python = _head_known(cluster)
    url = storage_for(storage, cluster.url, len(nodes))
    say("looking at the cluster from inside")
    payload = Letter(
        storage=url,
        environment=environment,
        probe={
            "scale": scale.model_dump(mode="json"),
            "boot_id": boot() if must_be_here(storage, cluster.url) else None,
        },
    )
    versions, cluster_info = _probe(cluster, python, payload, scale.retries, say)
    count = cluster_info["nodes"]
    storage_for(storage, cluster.url, max(count, 2) if cluster_info["grows"] else count)  # the dashboard's list may be old
    text = (
        f"{cluster.url}: {count} node{'s' * (count != 1)}, {words(cluster_info['has'])}; Ray {cluster.ray_version},"
        f" Python {versions['python']}"
    )
    return Clearance(url, python, text)


def _same_ray(cluster: Cluster) -> None:
    import ray

    if _major_minor(ray.__version__) != _major_minor(cluster.ray_version):
        raise ClusterError(
            f"the cluster runs Ray {cluster.ray_version}, and here is Ray {ray.__version__}",
            where=cluster.url,
            fix=f"pip install 'ray[default,train]=={cluster.ray_version}' here, or upgrade the cluster",
        )


def _head_known(cluster: Cluster) -> tuple[list[Node], str]:
    """The nodes, once the head among them has told which interpreter it uses."""
    began = time.monotonic()
    while True:
        nodes = cluster.nodes()
        for node in nodes:
            if node.is_head and node.python:
                return nodes, node.python
        if time.monotonic() - began > NODES_S:
            raise ClusterError(
                f"the head did not tell of itself within {NODES_S:.0f} s",
                where=cluster.url,
                fix="start the cluster with ray[default], and see dashboard_agent.log on the head",
            )
        time.sleep(POLL_S)


def _probe(
    cluster: Cluster, python: str, question: Letter, retries: int, say: Callable[[str], None]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the probe found: versions, and the cluster. One that was lost is sent again."""
    job_id = f"trainyard-probe-{secrets.token_hex(4)}"
    with staged({}) as package:
        payload_name = cluster.post(question.sealed())
        command = f"exec '{python}' -m pipeline.cluster.jobs.probe {payload_name}"
        cluster.submit(job_id, command, runtime_env=package.runtime_env(), metadata={})
    info = _ended(cluster, job_id)
    log = cluster.logs(job_id)
    versions, cluster_info, refusal = (last(log, kind) for kind in ("versions", "cluster", "refused"))
    if versions is not None:
        _go_together(cluster, versions)
    if refusal is not None:
        raise InputError(refusal["what"], where=refusal["where"], fix=refusal["fix"])
    if versions is None or cluster_info is None:
        failure = progress_of(info, log).loss
        if failure and retries:
            say(f"a first small job was lost: {failure}; trying again")
            return _probe(cluster, python, question, retries - 1, say)
        output_lines = [line for line in lines_for_people(log) if line.strip()] or [info.message or str(info.status)]
        output_lines = [failure] if failure else [line.partition("\n")[0] for line in output_lines]
        raise ClusterError(
            f"a first small job failed there: {output_lines[-1].strip()[:300]}",
            where=cluster.url,
            fix=f"is Trainyard's environment on every node? The interpreter is {python}",
        )
    return versions, cluster_info


def _ended(cluster: Cluster, job_id: str) -> Any:
    began = time.monotonic()
    while True:
        info = cluster.info(job_id)
        if info is not None and info.status.is_terminal():
            return info
        if info is None or time.monotonic() - began > PROBE_S:
            cluster.stop(job_id)
            raise ClusterError(
                f"a first small job did not end within {PROBE_S:.0f} s",
                where=cluster.url,
                fix=f"see its state: trainyard status {job_id} --address {cluster.url}",
            )
        time.sleep(POLL_S)


def _go_together(cluster: Cluster, versions: Mapping[str, Any]) -> None:
    if _major_minor(versions["python"]) != _major_minor(platform.python_version()):
        raise ClusterError(
            f"the cluster runs Python {versions['python']}, and here is Python {platform.python_version()}",
            where=cluster.url,
            fix="submit from an environment with the cluster's Python",
        )
    missing = [
        f"{need} ({'not there' if installed_version is None else installed_version})"
        for need in requirements()
        if (installed_version := versions["installed"].get(canonicalize_name(need.name))) is None
        or not need.specifier.contains(installed_version, prereleases=True)
    ]
    if missing:
        raise ClusterError(
            f"the cluster's environment lacks {', '.join(missing)}",
            where=cluster.url,
            fix=f"pip install them there, for {sys.implementation.name} {versions['python']}, on every node",
        )


def requirements() -> list[Requirement]:
    """What Trainyard itself needs to be installed, extras aside; nothing where it is not installed itself."""
    try:
        declared = metadata.requires("trainyard") or []
    except metadata.PackageNotFoundError:
        return []
    all_requirements = [Requirement(line) for line in declared]
    return [requirement for requirement in all_requirements if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]


def _major_minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
