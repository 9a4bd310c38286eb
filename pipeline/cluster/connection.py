"""Joining a cluster that is there: with the token of whoever joins, and in words of ours where that fails.

The connection of a driver to a Ray cluster: one that is there, or one of this machine's own.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from pipeline.cluster.auth import find_token
from pipeline.cluster.failure_policy import format_error_line
from pipeline.cluster.ray_internals import (
    RAY_ENV_DEFAULTS,
    WORKER_HEALTH_CHECK_VARIABLE,
    draining_nodes,
    listen_on_loopback,
    reload_settings,
    silence_raylet_output,
)
from pipeline.cluster.resources import warn_if_oversubscribed, worker_bounds
from pipeline.config import ScalingConfig
from pipeline.context import stop_signal_numbers
from pipeline.errors import InputError
from pipeline.events import EventHandler

TOKEN_REFUSED = "InvalidAuthToken"  # noqa: S105 - no token
"""What Ray's own lines say where a cluster wants a token, or another one; its exception only says that it failed."""


@contextmanager
def ray_auth(address: str, *, verbose: bool) -> Iterator[None]:
    """While `ray.init` joins a cluster: a token that the user has is shown to it, and Ray's native lines are kept back.

    Ray itself starts clusters that ask for a token wherever there is one, but shows it to none unless told to.

    Raises
    ------
    InputError: the cluster refuses the token, or wants one.
    """
    token = find_token(None)
    if token is not None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        reload_settings()
    with tempfile.TemporaryFile() as captured_stderr:
        try:
            with _redirect_stderr(captured_stderr.fileno()):
                yield
        except (ConnectionError, RuntimeError, ValueError):
            captured_stderr.seek(0)
            if TOKEN_REFUSED.encode() in captured_stderr.read():
                what = (
                    f"the cluster refuses the token of {token.source}"
                    if token is not None
                    else "the cluster wants a token"
                )
                fix = (
                    "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file; on the head `ray get-auth-token` tells it"
                )
                raise InputError(what, where=address, fix=fix) from None
            raise
        finally:
            if verbose:
                captured_stderr.seek(0)
                print(captured_stderr.read().decode(errors="replace"), end="", file=sys.stderr)


@contextmanager
def _redirect_stderr(file: int) -> Iterator[None]:
    """Standard error of this whole process into a file: Ray's native part writes there past Python."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


HEAD_POLL_S = 1.0
"""Seconds between two questions to the cluster's head."""
DISCONNECT_TIMEOUT_S = 10.0
"""How long the end of a connection may take."""
HEAD_TIMEOUT_S = 30.0
"""After so long without an answer from the head the cluster is taken for lost; Ray ends the process after 60."""


RAY_ENV_SET_LATER = ("RAY_AUTH_MODE", WORKER_HEALTH_CHECK_VARIABLE)
"""What is set for Ray while it is connected."""


@contextmanager
def _ray_environment() -> Iterator[None]:
    """While entered, the environment holds what Ray is to read there; afterwards it is the caller's again."""
    before = {name: os.environ.get(name) for name in (*RAY_ENV_DEFAULTS, *RAY_ENV_SET_LATER)}
    os.environ.update({name: value for name, value in RAY_ENV_DEFAULTS.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def ray_connection(address: str | None, scale: ScalingConfig, emit: EventHandler, verbose: bool) -> Iterator[Any]:
    """Ray, connected: to `address`, to the cluster this process already has, or to a new one of this machine's.

    Raises
    ------
    InputError: there is no such cluster.
    """
    with _ray_environment(), _connect(address, scale, emit, verbose) as ray:
        yield ray


@contextmanager
def _connect(address: str | None, scale: ScalingConfig, emit: EventHandler, verbose: bool) -> Iterator[Any]:
    address = address or os.environ.get("RAY_ADDRESS") or None
    _raise_if_url(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "error"}
    handlers = {number: signal.getsignal(number) for number in stop_signal_numbers()}
    try:
        if address is None:
            num_cpus = math.ceil(
                worker_bounds(scale)[0] * scale.cpus_per_worker
            )  # Ray starts a process for each at once
            warn_if_oversubscribed(num_cpus, emit)
            with listen_on_loopback(), _block_sighup():
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
        else:
            with ray_auth(address, verbose=verbose):
                ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            format_error_line(error), where=address or "a local Ray cluster", fix="see --address and RAY_ADDRESS"
        ) from None
    if threading.current_thread() is threading.main_thread():  # Ray's own SIGTERM ends the process at once
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        with nullcontext() if verbose else silence_raylet_output():
            yield ray
    finally:
        _disconnect(ray)


@contextmanager
def _block_sighup() -> Iterator[None]:
    """What is started meanwhile never gets SIGHUP: a terminal that is closed sends it to every process of its job, and
    the run could not save without its cluster. One that comes to this process is delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise_if_url(address: str | None) -> None:
    if address is not None and "://" in address:
        raise InputError(
            "not an address that a driver can use",
            where=address,
            fix="on a machine of the cluster use --address auto or HEAD:6379; from elsewhere"
            " `trainyard submit JOB --address http://HEAD:8265`",
        )


def _disconnect(ray: Any) -> None:
    """Disconnect. A cluster that is gone lets nobody go: then the end of this process will have to do."""
    thread = threading.Thread(target=ray.shutdown, name="trainyard-leave", daemon=True)
    thread.start()
    thread.join(DISCONNECT_TIMEOUT_S)


class HeadMonitor:
    """Asks the cluster's head every second which nodes are being drained, in a thread: an answer may never come."""

    def __init__(self) -> None:
        self.draining_nodes: Mapping[str, int] = {}
        """By node id: when it will be gone, in milliseconds since 1970; 0 where that is not known."""
        self._last_response_time = time.monotonic()
        self._has_responded = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainyard-head", daemon=True)
        self._thread.start()

    @property
    def last_seen_s(self) -> float:
        """Seconds since the head's last answer."""
        return time.monotonic() - self._last_response_time

    def wait_for_response(self) -> bool:
        """Whether the head answers (again) before it counts as lost."""
        self._has_responded.clear()
        return self._has_responded.wait(HEAD_TIMEOUT_S)

    def close(self) -> None:
        """Ask no more. Does not wait for an answer that is under way."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(HEAD_POLL_S):
            try:
                self.draining_nodes = get_draining_nodes()
            except Exception:  # noqa: S112 - whatever it is: no answer
                continue
            self._last_response_time = time.monotonic()
            self._has_responded.set()


def get_draining_nodes() -> Mapping[str, int]:
    """The nodes that are being drained, and when they will be gone (milliseconds since 1970, 0: not known)."""
    return draining_nodes()
