"""A check that all nodes of a cluster can read the same storage."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pipeline.cluster.failure_policy import summary_line
from pipeline.errors import InputError, TrainyardError
from pipeline.storage import Storage, credentials

NODE_TIMEOUT_S = 90
"""Timeout for a node's answer: it may have to start a process first."""
MAX_NODE_RETRIES = 2
"""How often a node tries again if the process of its check is lost."""
STORAGE_TIMEOUT_S = 20
"""Timeout of the storage on a node."""


def check_storage(ray: Any, url: str, *, include_driver: bool = False) -> None:
    """Write a file to storage and have every node of the cluster read it. A cluster of one node is not checked.

    Parameters
    ----------
    include_driver: write the file and read it in this process too, also for a cluster of one node.

    Raises
    ------
    InputError: the storage is in the memory of this process, or a node cannot read it.
    """
    if url.startswith("memory://"):
        raise InputError(
            "memory:// is in the memory of this process, which workers cannot read",
            where="storage",
            fix="use a folder or an object store",
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 and not include_driver:
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    storage, name, token = Storage.open(url), f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
    storage.replace(name, token)
    try:
        if include_driver and storage.read(name) != token:
            raise InputError(
                "a file that was written is read back with other content",
                where=storage.url,
                fix="use another storage",
            )
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
        return f"could not check it: {summary_line(error)}"


def _check_from_node(url: str, name: str, token: bytes, environment: Mapping[str, str]) -> str:
    """On a node: return what is wrong with the storage as the end of a sentence, or an empty string."""
    credentials.set_credentials(environment)
    try:
        return (
            ""
            if Storage.open(url).with_timeout(STORAGE_TIMEOUT_S).read(name) == token
            else "reads other content than was written"
        )
    except FileNotFoundError:
        return "does not have the file that was written: the storage is a folder of one machine"
    except TrainyardError as error:
        return f"cannot reach it: {error.what}"
