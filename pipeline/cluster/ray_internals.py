"""The only module that uses what Ray does not document: private modules and attributes, environment variables, paths
of the dashboard's HTTP API.

Each function's docstring states what it is needed for, and which public interface could replace it. The upper bound of
Ray in pyproject.toml exists because of this module. Before it is raised, run `tests/cluster/test_ray_internals.py` and
the other tests on Ray with the new version, then add that version to `CHECKED_RAY_VERSIONS` and raise the bound.

Other modules depend on undocumented behavior in two ways: `driver.py` overrides a private method of Ray's trainer
(`_create_default_callbacks`), and `failure_policy.py`, `connection.py`, `submission/job_status.py` and
`submission/log_records.py` match the texts of Ray's messages, for which there is no interface.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

CHECKED_RAY_VERSIONS = ("2.60",)
"""Versions, as major.minor, on which all tests on Ray passed with this module."""

WORKER_HEALTH_CHECK_VARIABLE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""Seconds after which Ray Train gives up a worker that does not answer. A field of `ray.train.RunConfig` could replace
it."""

RAY_ENV_DEFAULTS = {
    # For a cluster that is started here. With Ray's default of 15, other processes of the machine take precedence.
    "RAY_worker_niceness": "0",
    # How often the controller polls the workers: report() and the end of a run wait for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Not used, and slows down the start: the driver itself checks for nodes that are being drained.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Silences a warning about workers without GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment variables that are set while Ray is connected, unless the user has set them. Arguments of `ray.init` and
of `ray.train.RunConfig` could replace them."""

NODES_PATH = "/nodes?view=summary"
"""The dashboard's path for the nodes, with their state and the command line of their raylet. No other interface shows
the interpreter of the workers: `ray.util.state.list_nodes` lacks it."""

CLIENT_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that log every upload. An argument of `JobSubmissionClient` could replace this."""


# ------------------------------------------------------------------------------------------------- state of a cluster


def draining_nodes() -> dict[str, int]:
    """Return the ids of the nodes that are being drained, and when they will be removed (milliseconds since 1970; 0 if
    not known).

    The workers there save before that. Public interface: none; `ray.nodes()` shows a node that is being drained as
    alive.
    """
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def available_resources_per_node() -> Mapping[str, Mapping[str, float]]:
    """Return the free resources by node id.

    A worker needs its resources on one node. Public interface: `ray.available_resources()` returns only the total.
    """
    from ray._private.state import state

    untyped_state: Any = state
    resources: Mapping[str, Mapping[str, float]] = untyped_state.available_resources_per_node()
    return resources


def max_cluster_resources() -> Mapping[str, float] | None:
    """Return the resources that a cluster's autoscaler can provide in all; None if there is no autoscaler.

    A job that does not fit yet may still fit later. Public interface: none.
    """
    from ray._private.state import state

    untyped_state: Any = state
    resources: Mapping[str, float] | None = untyped_state.get_max_resources_from_cluster_config()
    return resources


# ------------------------------------------------------------------------------------------ start and end of a cluster


@contextmanager
def listen_on_loopback() -> Iterator[None]:
    """While entered, all servers of a cluster that is started listen on loopback, so that only this machine can connect
    to it.

    On Linux Ray's servers listen on every interface, and Ray replaces an address of 127.0.0.1 as a mistake. On macOS
    Ray binds to loopback unless a setting enables clusters; here that setting is turned off. Public interface: none; an
    argument of `ray.init` for the address could replace it.
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


def reload_settings() -> None:
    """Have Ray read its environment variables again.

    It reads them when it is imported; `RAY_AUTH_MODE` is set later, when a token was found. Public interface: none; an
    argument of `ray.init` for the token could replace it.
    """
    from ray import _raylet

    settings = getattr(_raylet, "Config", None)
    if settings is not None and hasattr(settings, "initialize"):  # else another version of Ray
        settings.initialize("")


@contextmanager
def silence_raylet_output() -> Iterator[None]:
    """While entered, output of other processes is not printed to standard output.

    Ray prints a raylet's message about each lost worker there, whatever `log_to_driver` is. Public interface: none;
    `log_to_driver=False` does not cover it.
    """
    from ray._private import worker

    before = getattr(worker, "print_to_stdstream", None)
    if before is None:  # another version of Ray
        yield
        return
    worker.print_to_stdstream = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


# ------------------------------------------------------------------------------------------------------- the Jobs API


def make_client_class(timeout: tuple[float, float]) -> Any:
    """Return a subclass of Ray's `JobSubmissionClient` with timeouts for every request: for connecting and for the
    answer, in seconds.

    Without them a client waits for ever for a head that was disconnected. Public interface: none; an argument `timeout`
    could replace the overridden method.
    """
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc, unused-ignore]
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": timeout, **kwargs})

    return Client


def silence_jobs_client() -> None:
    """Have a client of the Jobs API log errors only. See `CLIENT_LOGGERS`."""
    for name in CLIENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def server_ray_version(client: Any) -> str:
    """Return the version of Ray on a client's cluster; empty if the cluster did not send it.

    The versions are compared before anything is sent. Public interface: none; `JobSubmissionClient.get_version` returns
    the version of the Jobs API instead.
    """
    return client._server_ray_version or ""


def request(client: Any, method: str, path: str, **body: Any) -> Any:
    """Send a request with the address, headers and token of a client of the Jobs API; returns a `requests.Response`.

    Public interface: none for `NODES_PATH` and `package_path`.
    """
    return client._do_request(method, path, **body)


def node_interpreter(node: Mapping[str, Any]) -> str:
    """Return the Python interpreter of a node's workers from an entry of `NODES_PATH`; empty if the head does not have
    it yet.

    The `python` of a cluster's PATH may lack Ray. Public interface: none.
    """
    for word in node.get("cmdline") or []:
        option, _, value = str(word).partition("=")
        if option == "--python_worker_command":
            return value.split(" ")[0].strip("'\"")
    return ""


# ------------------------------------------------------------------------ a payload in the memory of a cluster's head


def new_package_name() -> str:
    """Return a name that cannot be guessed, in the format of Ray's packages, the only one that Ray accepts.

    A payload for the entry point is stored under it in the memory of the cluster's head: see `submission/payload.py`.
    Public interface: none that keeps values out of logs and of the job's information; a way to pass secrets to a job
    could replace this function and the next three.
    """
    return f"_ray_pkg_{secrets.token_hex(16)}.zip"


def is_package_name(name: str) -> bool:
    """Return whether a name has the format of `new_package_name`."""
    return re.fullmatch(r"_ray_pkg_[0-9a-f]{32}\.zip", name) is not None


def package_path(name: str) -> str:
    """Return the dashboard's path for the upload of a package, for `request`."""
    return f"/api/packages/gcs/{name}"


def fetch_package(name: str) -> bytes | None:
    """On the cluster: return the content of a package and delete it; None if there is none."""
    from ray import _raylet

    key = f"gcs://{name}".encode()
    raylet: Any = _raylet  # without annotations
    client = raylet.GcsClient(address=os.environ["RAY_ADDRESS"])
    content: bytes | None = client.internal_kv_get(key, None)
    if content is not None:
        client.internal_kv_del(key, False, None)
    return content


# -------------------------------------------------------------------------------------------------------------- errors


def unwrap_user_exception(error: BaseException) -> BaseException | None:
    """Return the exception of a training function that Ray Train wrapped in another one; None for other exceptions.

    The wrapped ones are in the public `TrainingFailedError.worker_failures`. Public interface: none.
    """
    inner = getattr(error, "_base_exc", None)
    return inner if isinstance(inner, BaseException) else None
