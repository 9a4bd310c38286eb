"""Fixtures for several test folders, such as an S3 server on loopback, and the distribution of tests to processes."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("any machine", deadline=None)  # a test may be slow under load
settings.load_profile("any machine")

BUCKET = "trainyard-tests"
RAY_FOLDERS = ("cluster", "fault_tolerance")
"""Folders whose tests share clusters."""


class _RayOnOneWorker(LoadScopeScheduling):  # type: ignore[misc]
    """With two processes, one runs all tests on Ray, and the other the rest, one file at a time. (The loadgroup mode of
    xdist ignores groups under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if file.split("/")[-2] in RAY_FOLDERS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _RayOnOneWorker(config, log)


@pytest.fixture(scope="session", autouse=True)
def _isolated_spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checkpoints that runs save locally when storage is lost stay below pytest's temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINYARD_SPOOL", str(tmp_path_factory.mktemp("spool")))
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server (moto) with one bucket; the environment points every S3 library to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = _AtomicCreates(server._server.app)
    host, port = server.get_host_and_port()
    environment["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    previous = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    client.close()
    yield environment["AWS_ENDPOINT_URL"]
    server.stop()
    for name, value in previous.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class _AtomicCreates:
    """Serializes conditional writes. moto checks for a name and then writes it, in several threads, so that two racing
    requests could both succeed, which never happens on S3."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        with self._lock if environ.get("HTTP_IF_NONE_MATCH") else nullcontext():
            return self._app(environ, start_response)


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """The URL of an empty folder in the bucket of that server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
