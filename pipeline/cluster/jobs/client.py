"""The client of a cluster's Jobs API: Ray's own, with a limit on every wait and with errors for people."""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.cluster.jobs.tokens import WAYS, find_token
from pipeline.cluster.ray_internals import (
    NODES_PATH,
    jobs_client_class,
    new_package_name,
    node_interpreter,
    package_path,
    request,
    server_ray_version,
    silence_jobs_client,
)
from pipeline.errors import ClusterError, InputError
from pipeline.storage.faults import scrub

T = TypeVar("T")

CONNECT_S, ANSWER_S = 5.0, 60.0
"""Limits for a connection to the head, and for its answer."""
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
EXAMPLE = "--address http://HEAD:8265, the address of the cluster's dashboard"


@dataclass(frozen=True)
class Node:
    """A node that is alive, as the head shows it."""

    id: str
    is_head: bool
    python: str
    """The interpreter of its workers, with its folder; empty where the head does not know it yet."""


class Cluster:
    """A cluster whose Jobs API answers. `url` is its address, `ray_version` what it runs.

    Every method raises ClusterError where the cluster does not answer any more.
    """

    def __init__(self, client: Any, url: str) -> None:
        self._client = client
        self.url = url
        self.ray_version: str = server_ray_version(client)

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        tree = self._request("GET", NODES_PATH).json()
        return [
            Node(node["raylet"]["nodeId"], bool(node["raylet"].get("isHeadNode")), node_interpreter(node))
            for node in tree["data"]["summary"]
            if node.get("raylet", {}).get("state") == "ALIVE"
        ]

    def post(self, sealed: bytes) -> str:
        """Put a letter into the head's memory; the name to take it out by."""
        name = new_package_name()
        self._request("PUT", package_path(name), data=sealed)
        return name

    def submit(
        self, job_id: str, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> bool:
        """Start a job; False where there is one of that id."""
        try:
            self._ask(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            )
        except ClusterError:
            if self.info(job_id) is not None:  # perhaps of another who submits the same at this moment
                return False
            raise
        return True

    def infos(self) -> list[Any]:
        """Ray's `JobDetails` of every submitted job, oldest first."""
        jobs = [info for info in self._ask(self._client.list_jobs) or [] if info.submission_id]
        return sorted(jobs, key=lambda info: info.start_time or 0)

    def info(self, job_id: str) -> Any | None:
        """Ray's `JobDetails` of a job, or None where there is no such job."""
        return self._ask(lambda: self._client.get_job_info(job_id), missing="404")

    def logs(self, job_id: str) -> str:
        """All that a job has written so far."""
        return str(self._ask(lambda: self._client.get_job_logs(job_id)) or "")

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """What a job has written, from its beginning, and what it writes until it ends; raises whatever breaks it."""
        chunks: AsyncIterator[str] = self._client.tail_job_logs(job_id)
        return chunks

    def stop(self, job_id: str) -> bool:
        """Ask a job to stop; False where it has ended."""
        return bool(self._ask(lambda: self._client.stop_job(job_id)))

    def _request(self, method: str, path: str, **body: Any) -> Any:
        reply: Any = self._ask(lambda: request(self._client, method, path, **body))
        if reply.status_code != 200:
            raise ClusterError(
                f"the cluster answered {reply.status_code} to {path.partition('?')[0]}: {scrub(reply.text)[:200]}",
                where=self.url,
                fix="see the dashboard's logs on the head",
            )
        return reply

    def _ask(self, action: Callable[[], T], missing: str = "") -> T | None:
        """The answer; None where the server's complaint holds `missing`."""
        with _errors_for_people(self.url, missing):
            return action()
        return None


def connect(address: str | None, token_file: str | None = None, *, verbose: bool = False) -> Cluster:
    """A cluster whose Jobs API answers, and takes our token where it asks for one.

    Parameters
    ----------
    address: URL of the dashboard; else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    Raises
    ------
    InputError: no address, or one of another kind; no token, or a wrong one; nobody answers.
    """
    url = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if url is None:
        raise InputError("no cluster is named", where="--address", fix=f"{EXAMPLE}; or RAY_API_SERVER_ADDRESS")
    if url.startswith("ray://"):
        raise InputError(f"{url} is an address of the Ray Client, not of the Jobs API", where="--address", fix=EXAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.exceptions import AuthenticationError
    if not verbose:
        silence_jobs_client()
    make = jobs_client_class((CONNECT_S, ANSWER_S))
    with _errors_for_people(url), _named():
        try:
            return Cluster(make(url), url)  # where it asks for no token it gets none
        except AuthenticationError:
            token = find_token(token_file)
        if token is None:
            raise ClusterError("the cluster asks for a token, and there is none", where=url, fix=f"give it by {WAYS}")
        try:
            return Cluster(make(url, headers={"Authorization": f"Bearer {token.value}"}), url)
        except AuthenticationError:
            raise ClusterError(
                f"the cluster refuses the token of {token.source}", where=url, fix=f"give the right one by {WAYS}"
            ) from None


@contextmanager
def _named() -> Iterator[None]:
    """Ray's client takes these variables before the address that it is given; ours takes the flag first."""
    before = {name: os.environ.pop(name, None) for name in ADDRESS_VARIABLES}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _errors_for_people(url: str, missing: str = "") -> Iterator[None]:
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise ClusterError("the cluster takes our token no longer", where=url, fix=f"give it by {WAYS}") from None
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError, TimeoutError):
        raise ClusterError("no Ray cluster answers there", where=url, fix=f"check the address: {EXAMPLE}") from None
    except (requests.exceptions.RequestException, RuntimeError, ValueError, KeyError) as error:
        if missing and f"status code {missing}" in str(error):
            return
        raise ClusterError(
            f"what answers there is no Jobs API, or refuses ({_reason(error)})",
            where=url,
            fix=f"check the address: {EXAMPLE}",
        ) from None


def _reason(error: Exception) -> str:
    """The line that says it: the last of a traceback that the server sends, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return scrub(lines[-1] if "Traceback" in lines[0] else lines[0])[:300]
