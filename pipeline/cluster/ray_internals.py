"""The one module that uses what Ray does not document: private modules and attributes, environment variables, paths of
the dashboard's HTTP API.

Each function's docstring states what needs it, and which public interface would take its place. The upper bound of Ray
in pyproject.toml exists because of this module. Before it is raised, run `tests/cluster/test_ray_internals.py` and the
other tests on Ray with the new version, then add that version to `CHECKED_RAY_VERSIONS` and raise the bound.

Two more places rest on what Ray does not document: the subclass of its trainer in `driver.py`
(`_create_default_callbacks`), and the texts of Ray's messages in `losses.py`, `joining.py` and `jobs/records.py`, which
have no interface at all.
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
"""Versions, as major.minor, on which all tests on Ray passed with this module as it is."""

WORKER_HEALTH_CHECK_VARIABLE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""Seconds after which Ray Train gives up a worker that does not answer. A field of `ray.train.RunConfig` would take its
place."""

RAY_ENV_DEFAULTS = {
    # Of a cluster started here. Ray's default, 15, leaves the processor to whatever else runs on the machine.
    "RAY_worker_niceness": "0",
    # The controller's poll: report() and the end of a run wait for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Costs start-up time and is not used: the driver itself looks for nodes that are being drained.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Silences a warning about workers without GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment variables that are set while Ray is connected, unless the user has set them. Arguments of `ray.init` and
of `ray.train.RunConfig` would take their place."""

NODES_PATH = "/nodes?view=summary"
"""Of the dashboard: the nodes with their state and the command line of their raylet. `ray.util.state.list_nodes` shows
the nodes alone, and the interpreter of the workers is shown nowhere else."""

CLIENT_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that write of every upload, also where nobody asked for Ray's own lines. An argument of `JobSubmissionClient`
would take their place."""


# ------------------------------------------------------------------------------------------------- state of a cluster


def draining_nodes() -> dict[str, int]:
    """The ids of the nodes that are being drained, and when they will be gone (milliseconds since 1970, 0: not known).

    The workers there are to save before they go. Public interface: none; `ray.nodes()` shows a node that is being
    drained as alive.
    """
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def available_resources_per_node() -> Mapping[str, Mapping[str, float]]:
    """By node id, the resources that are not taken.

    A worker needs its resources on one node. Public interface: `ray.available_resources()` gives only the sum of all.
    """
    from ray._private.state import state

    known: Any = state
    found: Mapping[str, Mapping[str, float]] = known.available_resources_per_node()
    return found


def max_cluster_resources() -> Mapping[str, float] | None:
    """The resources that a cluster's autoscaler may reach; None where there is no autoscaler.

    A job that does not fit yet may still fit later. Public interface: none.
    """
    from ray._private.state import state

    known: Any = state
    found: Mapping[str, float] | None = known.get_max_resources_from_cluster_config()
    return found


# ------------------------------------------------------------------------------------------ start and end of a cluster


@contextmanager
def listen_on_loopback() -> Iterator[None]:
    """While a cluster of this machine is started: all its servers listen on loopback, so that only this machine can
    reach it.

    On Linux Ray's own listen on every interface, and an address of 127.0.0.1 is taken for a mistake and changed. On
    macOS it binds to loopback by itself, unless a setting says otherwise: that setting's value is what is set here.
    Public interface: none; an address to listen on among the arguments of `ray.init` would take its place.
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
    argument of `ray.init` for the token would take its place.
    """
    from ray import _raylet

    settings = getattr(_raylet, "Config", None)
    if settings is not None and hasattr(settings, "initialize"):  # else another version of Ray
        settings.initialize("")


@contextmanager
def silence_raylet_output() -> Iterator[None]:
    """While entered, lines of other processes are not printed to standard output.

    Ray writes a raylet's complaint about each lost worker there, whatever `log_to_driver` says. Public interface:
    `log_to_driver=False` would be it.
    """
    from ray._private import worker

    before = getattr(worker, "print_to_stdstream", None)
    if before is None:  # another version of Ray
        yield
        return
    worker.print_to_stdstream = lambda *_args, **_named: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


# ------------------------------------------------------------------------------------------------------- the Jobs API


def make_client_class(timeout: tuple[float, float]) -> Any:
    """Ray's `JobSubmissionClient` with a limit on every request, in seconds: for the connection, and for the answer.

    Ray's own would wait for ever for a head that was cut off. Public interface: none; an argument `timeout` would take
    the place of the overridden method.
    """
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc, unused-ignore]
        def _do_request(self, method: str, endpoint: str, **named: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": timeout, **named})

    return Client


def silence_jobs_client() -> None:
    """Keep back what a client of the Jobs API logs below errors. See `CLIENT_LOGGERS`."""
    for name in CLIENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def server_ray_version(client: Any) -> str:
    """The version of Ray that a client's cluster runs; empty where it did not tell.

    The versions are compared before anything is sent. Public interface: `JobSubmissionClient.get_version` gives the
    version of the Jobs API instead.
    """
    return client._server_ray_version or ""


def request(client: Any, method: str, path: str, **body: Any) -> Any:
    """A request of a client of the Jobs API with its address, headers and token; the reply as `requests` has it.

    Public interface: none for `NODES_PATH` and `package_path`.
    """
    return client._do_request(method, path, **body)


def node_interpreter(node: Mapping[str, Any]) -> str:
    """The Python interpreter that a node's workers are started with, of an entry of `NODES_PATH`; empty where the head
    does not have it yet.

    The `python` of a cluster's PATH may lack Ray. Public interface: none.
    """
    for word in node.get("cmdline") or []:
        option, _, value = str(word).partition("=")
        if option == "--python_worker_command":
            return value.split(" ")[0].strip("'\"")
    return ""


# ------------------------------------------------------------------------ a message in the memory of a cluster's head


def new_package_name() -> str:
    """A name that nobody can guess, of the form that Ray gives to packages: it takes no other.

    Under it a message for the entry point lies in the memory of the cluster's head: see `jobs/letter.py`. Public
    interface: none that keeps values out of logs and of the job's information; secrets of the Jobs API would take the
    place of this and of the next three.
    """
    return f"_ray_pkg_{secrets.token_hex(16)}.zip"


def is_package_name(name: str) -> bool:
    """Whether a name has the form that `new_package_name` gives."""
    return re.fullmatch(r"_ray_pkg_[0-9a-f]{32}\.zip", name) is not None


def package_path(name: str) -> str:
    """Where the dashboard takes a package of that name, for `request`."""
    return f"/api/packages/gcs/{name}"


def fetch_package(name: str) -> bytes | None:
    """On the cluster: the content of a package, which is deleted there; None where there is none."""
    from ray import _raylet

    key = f"gcs://{name}".encode()
    raylet: Any = _raylet  # of no annotations
    client = raylet.GcsClient(address=os.environ["RAY_ADDRESS"])
    content: bytes | None = client.internal_kv_get(key, None)
    if content is not None:
        client.internal_kv_del(key, False, None)
    return content


# -------------------------------------------------------------------------------------------------------------- errors


def unwrap_user_exception(error: BaseException) -> BaseException | None:
    """The exception that a training function raised, of the one that Ray Train wraps it into; None for any other.

    Ray puts the wrapped ones into the public `TrainingFailedError.worker_failures`. Public interface: none.
    """
    inner = getattr(error, "_base_exc", None)
    return inner if isinstance(inner, BaseException) else None
