"""What several rooms' tests share: a real S3 server on loopback."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

BUCKET = "trainyard-tests"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server (moto's) with one bucket; the environment points every S3 library at it."""
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
    host, port = server.get_host_and_port()
    environment["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    client.close()
    yield environment["AWS_ENDPOINT_URL"]
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """An empty folder of that server's bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
