"""The driver's connection to a Ray cluster: an existing one, or one that is started on this machine for the run."""

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

HEAD_POLL_S = 1.0
"""Seconds between two requests to the cluster's head."""
HEAD_TIMEOUT_S = 30.0
"""Seconds without an answer from the head until the cluster counts as lost. Ray ends the process after 60."""
DISCONNECT_TIMEOUT_S = 10.0
"""Seconds that disconnecting may take."""
RAY_ENV_SET_LATER = ("RAY_AUTH_MODE", WORKER_HEALTH_CHECK_VARIABLE)
"""Environment variables that are set for Ray while it is connected, besides `RAY_ENV_DEFAULTS`."""
TOKEN_REFUSED = "InvalidAuthToken"  # noqa: S105 - no token
"""In the output of Ray's native part if a cluster requires a token, or another one. Ray's exception does not name the
reason."""


@contextmanager
def ray_connection(address: str | None, scale: ScalingConfig, emit: EventHandler, verbose: bool) -> Iterator[Any]:
    """Connect Ray to `address`, to the cluster this process is already connected to, or to a new one on this machine.

    Raises
    ------
    InputError: there is no such cluster.
    """
    with _ray_environment(), _connect(address, scale, emit, verbose) as ray:
        yield ray


@contextmanager
def _ray_environment() -> Iterator[None]:
    """While entered, Ray's environment variables have our defaults; afterwards the environment is as before."""
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
            # Ray starts a process for each CPU at once.
            num_cpus = math.ceil(worker_bounds(scale)[0] * scale.cpus_per_worker)
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
    if threading.current_thread() is threading.main_thread():  # Ray's own SIGTERM handler ends the process at once
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        with nullcontext() if verbose else silence_raylet_output():
            yield ray
    finally:
        _disconnect(ray)


def _raise_if_url(address: str | None) -> None:
    if address is not None and "://" in address:
        raise InputError(
            "not an address that a driver can use",
            where=address,
            fix="on a machine of the cluster use --address auto or HEAD:6379; from elsewhere"
            " `trainyard submit JOB --address http://HEAD:8265`",
        )


@contextmanager
def _block_sighup() -> Iterator[None]:
    """Block SIGHUP in processes that are started meanwhile.

    A terminal that is closed sends SIGHUP to every process of its job, and the run could not save without its cluster.
    A SIGHUP to this process is delivered afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _disconnect(ray: Any) -> None:
    """Disconnect, if Ray can: it waits for a cluster that is gone. Then the connection ends with this process."""
    thread = threading.Thread(target=ray.shutdown, name="trainyard-disconnect", daemon=True)
    thread.start()
    thread.join(DISCONNECT_TIMEOUT_S)


@contextmanager
def ray_auth(address: str, *, verbose: bool) -> Iterator[None]:
    """While entered, `ray.init` sends the user's token to a cluster, and the output of Ray's native part is held back
    (with `verbose`, printed afterwards).

    If there is a token, Ray starts clusters that require it, but by default it does not send it to an existing cluster.

    Raises
    ------
    InputError: the cluster refuses the token, or requires one.
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
                    else "the cluster requires a token"
                )
                fix = (
                    "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file; `ray get-auth-token` on the head prints it"
                )
                raise InputError(what, where=address, fix=fix) from None
            raise
        finally:
            if verbose:
                captured_stderr.seek(0)
                print(captured_stderr.read().decode(errors="replace"), end="", file=sys.stderr)


@contextmanager
def _redirect_stderr(file: int) -> Iterator[None]:
    """Redirect the file descriptor of standard error: Ray's native part does not write through `sys.stderr`."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


class HeadMonitor:
    """Asks the cluster's head every second which nodes are being drained, in a thread: an answer may never come."""

    def __init__(self) -> None:
        self.draining_nodes: Mapping[str, int] = {}
        """By node id, when the node will be removed, in milliseconds since 1970; 0 if that is not known."""
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
        """Wait for the next answer. Returns False if none comes within `HEAD_TIMEOUT_S`."""
        self._has_responded.clear()
        return self._has_responded.wait(HEAD_TIMEOUT_S)

    def close(self) -> None:
        """Stop asking. Does not wait for a pending answer."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(HEAD_POLL_S):
            try:
                self.draining_nodes = draining_nodes()
            except Exception:  # noqa: S112 - whatever it is: no answer
                continue
            self._last_response_time = time.monotonic()
            self._has_responded.set()
