"""Storage URLs that mean the same storage on a cluster and on the machine that submits."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from pipeline.errors import InputError

OBJECT_STORE_EXAMPLE = "--storage s3://BUCKET/runs, or any object store"
MOUNTED = "file:///FOLDER for a folder that is mounted on every node"


def resolve_cluster_storage(url: str, address: str, num_nodes: int) -> str:
    """Return the storage URL for the cluster.

    Parameters
    ----------
    url: as the user wrote it: a path, or any URL.
    address: of the cluster.
    num_nodes: how many nodes the cluster has.

    Raises
    ------
    InputError: a path and a cluster of several nodes, or a relative path and a cluster on another machine.
    """
    if url.startswith("memory://"):
        raise InputError("is in the memory of one process", where=f"storage: {url}", fix=f"use {OBJECT_STORE_EXAMPLE}")
    if "://" in url:
        return url
    if num_nodes > 1:
        raise InputError(
            f"a path of one machine, and the cluster has {num_nodes} nodes",
            where=f"storage: {url}",
            fix=f"use {OBJECT_STORE_EXAMPLE}, or {MOUNTED}",
        )
    path = os.path.expanduser(url)
    if is_loopback(address):
        return os.path.abspath(path)
    if not os.path.isabs(path):
        raise InputError(
            "a relative path, and the cluster is on another machine",
            where=f"storage: {url}",
            fix=f"use {OBJECT_STORE_EXAMPLE}, or an absolute path on the cluster's node",
        )
    return path


def is_folder_of_this_machine(url: str, address: str) -> bool:
    """Return whether a storage URL is a folder of this machine, on which the cluster then must run too."""
    return "://" not in url and is_loopback(address)


def make_other_machine_error(path: str) -> InputError:
    """Return the error for a cluster at a loopback address that is on another machine, behind a forwarded port."""
    return InputError(
        "a path of this machine, and the cluster is on another one, behind a forwarded port",
        where=f"storage: {path}",
        fix=f"use {OBJECT_STORE_EXAMPLE}, or file:///FOLDER for a folder on the cluster",
    )


def is_loopback(address: str) -> bool:
    """Return whether the host of a URL is this machine."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"
