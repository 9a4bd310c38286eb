"""Whether all nodes of a cluster see the same storage."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pipeline.cluster.failure_policy import summary_line
from pipeline.errors import InputError, TrainyardError
from pipeline.storage import Storage, credentials

NODE_TIMEOUT_S = 90
"""Seconds for a node to answer: it may have to start a process first."""
MAX_NODE_RETRIES = 2
"""Times that a node may look again when the process that did was lost."""
STORAGE_TIMEOUT_S = 20
"""Seconds for its storage."""


def check_storage(ray: Any, url: str, *, include_driver: bool = False) -> None:
    """Put a file into storage and have every node of several read it.

    Parameters
    ----------
    from_here: read it in this process too, and where the cluster is one node.

    Raises
    ------
    InputError: storage that is this process' own, or that a node does not see.
    """
    if url.startswith("memory://"):
        raise InputError(
            "memory:// is this process' own, and workers are others", where="storage", fix="use a folder or a store"
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 and not include_driver:
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    storage, name, token = Storage.open(url), f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
    storage.replace(name, token)
    try:
        if include_driver and storage.read(name) != token:
            raise InputError("what is read is not what was written", where=storage.url, fix="use another storage")
        pending = {}
        for node in nodes if len(nodes) > 1 else ():
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=MAX_NODE_RETRIES)(_check_from_node).options(
                scheduling_strategy=strategy
            )
            pending[f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"] = task.remote(
                url, name, token, credentials.forwarded_credentials()
            )
        for node, answer in pending.items():
            problem = _get_problem(ray, answer)
            if problem:
                raise InputError(
                    f"node {node} {problem}",
                    where=f"storage: {storage.url}",
                    fix="use an object store (s3://bucket/runs), or a folder that is mounted on every node",
                )
    finally:
        storage.delete(name)


def _get_problem(ray: Any, answer: Any) -> str:
    try:
        return str(ray.get(answer, timeout=NODE_TIMEOUT_S))
    except ray.exceptions.RayError as error:
        return f"could not look at it: {summary_line(error)}"


def _check_from_node(url: str, name: str, token: bytes, environment: Mapping[str, str]) -> str:
    """Runs on a node: what is wrong with storage as seen from there, or nothing."""
    credentials.set_credentials(environment)
    try:
        return (
            ""
            if Storage.open(url).with_timeout(STORAGE_TIMEOUT_S).read(name) == token
            else "reads something else there"
        )
    except FileNotFoundError:
        return "does not see what was written there from here: it is a folder of one machine"
    except TrainyardError as error:
        return f"cannot reach it: {error.what}"
