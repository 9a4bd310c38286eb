"""A client of a cluster's Jobs API: Ray's own, with timeouts and with error messages for users."""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.cluster.auth import TOKEN_SOURCES, find_token
from pipeline.cluster.ray_internals import (
    NODES_PATH,
    make_client_class,
    new_package_name,
    node_interpreter,
    package_path,
    request,
    server_ray_version,
    silence_jobs_client,
)
from pipeline.errors import ClusterError, InputError
from pipeline.redaction import redact

T = TypeVar("T")

CONNECT_TIMEOUT_S, RESPONSE_TIMEOUT_S = 5.0, 60.0
"""Timeouts for a connection to the head, and for its answer."""
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables with the address of a cluster; the first one that is set counts."""
ADDRESS_EXAMPLE = "--address http://HEAD:8265, the address of the cluster's dashboard"


@dataclass(frozen=True)
class ClusterNode:
    """A node that is alive, as reported by the head."""

    id: str
    is_head: bool
    python_executable: str
    """The path of its workers' interpreter; empty if the head does not have it yet."""


class ClusterClient:
    """A client of one cluster. Every method raises ClusterError if the cluster does not answer any more.

    Parameters
    ----------
    client: Ray's `JobSubmissionClient`.
    url: the address of the cluster's dashboard.
    """

    def __init__(self, client: Any, url: str) -> None:
        self._client = client
        self.url = url
        self.ray_version: str = server_ray_version(client)
        """Of the cluster."""

    def list_nodes(self) -> list[ClusterNode]:
        """Return the nodes that are alive."""
        tree = self._request("GET", NODES_PATH).json()
        return [
            ClusterNode(node["raylet"]["nodeId"], bool(node["raylet"].get("isHeadNode")), node_interpreter(node))
            for node in tree["data"]["summary"]
            if node.get("raylet", {}).get("state") == "ALIVE"
        ]

    def upload_payload(self, payload: bytes) -> str:
        """Store a payload in the head's memory, and return the name to fetch it by."""
        name = new_package_name()
        self._request("PUT", package_path(name), data=payload)
        return name

    def submit_job(
        self, job_id: str, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> bool:
        """Start a job. Returns False if a job of that id exists."""
        try:
            self._call(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            )
        except ClusterError:
            if self.get_job_info(job_id) is not None:  # perhaps another client submitted the same at this moment
                return False
            raise
        return True

    def list_jobs(self) -> list[Any]:
        """Return Ray's `JobDetails` of every submitted job, oldest first."""
        jobs = [info for info in self._call(self._client.list_jobs) or [] if info.submission_id]
        return sorted(jobs, key=lambda info: info.start_time or 0)

    def get_job_info(self, job_id: str) -> Any | None:
        """Return Ray's `JobDetails` of a job, or None if there is no such job."""
        return self._call(lambda: self._client.get_job_info(job_id), missing_status="404")

    def get_job_logs(self, job_id: str) -> str:
        """Return the whole log of a job up to now."""
        return str(self._call(lambda: self._client.get_job_logs(job_id)) or "")

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Iterate over a job's log from its beginning until the job ends. Raises any error of the connection."""
        chunks: AsyncIterator[str] = self._client.tail_job_logs(job_id)
        return chunks

    def stop_job(self, job_id: str) -> bool:
        """Ask a job to stop. Returns False if it has ended."""
        return bool(self._call(lambda: self._client.stop_job(job_id)))

    def _request(self, method: str, path: str, **body: Any) -> Any:
        reply: Any = self._call(lambda: request(self._client, method, path, **body))
        if reply.status_code != 200:
            raise ClusterError(
                f"the cluster answered {reply.status_code} to {path.partition('?')[0]}: {redact(reply.text)[:200]}",
                where=self.url,
                fix="see the dashboard's logs on the head",
            )
        return reply

    def _call(self, action: Callable[[], T], missing_status: str = "") -> T | None:
        """Return the result of a request; None if the server answers with the status `missing_status`."""
        with _translate_errors(self.url, missing_status):
            return action()
        return None


def connect(address: str | None, token_file: str | None = None, *, verbose: bool = False) -> ClusterClient:
    """Connect to a cluster's Jobs API, with the user's token if the cluster requires one.

    Parameters
    ----------
    address: URL of the dashboard; else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.
    token_file: see `find_token`.

    Raises
    ------
    InputError: no address, or not that of a dashboard; no token, or a wrong one; no cluster answers.
    """
    url = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if url is None:
        raise InputError("no cluster is given", where="--address", fix=f"{ADDRESS_EXAMPLE}; or RAY_API_SERVER_ADDRESS")
    if url.startswith("ray://"):
        raise InputError(
            f"{url} is an address of the Ray Client, not of the Jobs API", where="--address", fix=ADDRESS_EXAMPLE
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.exceptions import AuthenticationError
    if not verbose:
        silence_jobs_client()
    make = make_client_class((CONNECT_TIMEOUT_S, RESPONSE_TIMEOUT_S))
    with _translate_errors(url), _without_address_variables():
        try:
            return ClusterClient(make(url), url)  # the token is sent only if the cluster requires one
        except AuthenticationError:
            token = find_token(token_file)
        if token is None:
            raise ClusterError(
                "the cluster requires a token, and none is set", where=url, fix=f"set it by {TOKEN_SOURCES}"
            )
        try:
            return ClusterClient(make(url, headers={"Authorization": f"Bearer {token.value}"}), url)
        except AuthenticationError:
            raise ClusterError(
                f"the cluster refuses the token of {token.source}",
                where=url,
                fix=f"set the right one by {TOKEN_SOURCES}",
            ) from None


@contextmanager
def _without_address_variables() -> Iterator[None]:
    """While entered, `ADDRESS_VARIABLES` are unset: Ray's client prefers them to the address that it is given."""
    before = {name: os.environ.pop(name, None) for name in ADDRESS_VARIABLES}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _translate_errors(url: str, missing_status: str = "") -> Iterator[None]:
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise ClusterError(
            "the cluster does not accept the token any more", where=url, fix=f"set it by {TOKEN_SOURCES}"
        ) from None
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError, TimeoutError):
        raise ClusterError(
            "no Ray cluster answers at this address", where=url, fix=f"check the address: {ADDRESS_EXAMPLE}"
        ) from None
    except (requests.exceptions.RequestException, RuntimeError, ValueError, KeyError) as error:
        if missing_status and f"status code {missing_status}" in str(error):
            return
        raise ClusterError(
            f"what answers is not a Jobs API, or refuses the request ({_error_line(error)})",
            where=url,
            fix=f"check the address: {ADDRESS_EXAMPLE}",
        ) from None


def _error_line(error: Exception) -> str:
    """Return the line with the error: the last line of a traceback that the server sent, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return redact(lines[-1] if "Traceback" in lines[0] else lines[0])[:300]
