"""A local cluster that only this machine can reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def on_loopback() -> Iterator[None]:
    """While a cluster of this machine's own is started: all its servers listen on loopback.

    On Linux Ray's own listen on every interface, and an address of 127.0.0.1 is taken for a mistake and changed. On
    macOS it binds to loopback by itself, unless a setting says otherwise: that setting's value is what is set here.
    """
    from ray._private import ray_constants

    if not hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):  # another version of Ray
        yield
        return
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
