"""Which storage a cluster and its submitter can both mean."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from pipeline.errors import InputError

OBJECT_STORE_EXAMPLE = "--storage s3://BUCKET/runs, or any object store"
MOUNTED = "file:///FOLDER for a folder that is mounted on every node"


def resolve_cluster_storage(url: str, address: str, num_nodes: int) -> str:
    """The storage URL as the cluster is to read it.

    Parameters
    ----------
    url: as the user wrote it: a path, or any URL.
    address: the cluster's.
    nodes: how many it has.

    Raises
    ------
    InputError: a path of one machine where several take part, or of a machine that is not this one.
    """
    if url.startswith("memory://"):
        raise InputError("it lives in one process", where=f"storage: {url}", fix=f"use {OBJECT_STORE_EXAMPLE}")
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
            "a path that starts where you are, and the cluster is on another machine",
            where=f"storage: {url}",
            fix=f"use {OBJECT_STORE_EXAMPLE}, or an absolute path on the cluster's node",
        )
    return path


def is_folder_of_this_machine(url: str, address: str) -> bool:
    """Whether a storage URL means a folder of this very machine: then the cluster must be on it."""
    return "://" not in url and is_loopback(address)


def make_other_machine_error(path: str) -> InputError:
    """For a cluster that is reached through loopback and is elsewhere, as behind a forwarded port."""
    return InputError(
        "a path of this machine, and the cluster is on another one, behind a forwarded port",
        where=f"storage: {path}",
        fix=f"use {OBJECT_STORE_EXAMPLE}, or file:///FOLDER for a folder of the cluster's",
    )


def is_loopback(address: str) -> bool:
    """Whether a URL leads to this machine itself."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"
