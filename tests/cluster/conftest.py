"""Ray clusters that the tests share: one to connect to, and one for submitted jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.submission_cluster import JobsCluster, start_cluster

CPUS = 3


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Ray, connected to a cluster on this machine with `CPUS` CPUs."""
    from pipeline.cluster.ray_internals import RAY_ENV_DEFAULTS

    environment = {**RAY_ENV_DEFAULTS, "RAY_metrics_report_interval_ms": "300"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, **quiet)
    yield ray
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def jobs_cluster() -> Iterator[JobsCluster]:
    """Another cluster, with a dashboard and token authentication. This process is not connected to it."""
    with start_cluster() as cluster:
        yield cluster
