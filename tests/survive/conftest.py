"""Clusters of several nodes and hosts, shared by the tests that harm them; each starts with all nodes whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.survive.hosts import S3, Hosts, why_not
from tests.survive.nodes import RayCluster, loopback_places
from tests.survive.survive_scenes import Scene, scene

WORKER_HOSTS = 3
STORAGE_HOST = WORKER_HOSTS + 1


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A minute of training, unless it is told to hurry."""
    return scene(tmp_path_factory.mktemp("short"), epochs=24, pause_s=0.1)


@pytest.fixture(scope="session")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Three minutes of it."""
    return scene(tmp_path_factory.mktemp("longer"), epochs=70, pause_s=0.1)


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The short one, on three workers."""
    return scene(tmp_path_factory.mktemp("three"), epochs=24, pause_s=0.1, workers=3)


@pytest.fixture(scope="session")
def _nodes() -> Iterator[RayCluster]:
    head, *places = loopback_places(1 + 3)
    with RayCluster(head, places) as cluster:
        yield cluster


@pytest.fixture
def nodes(_nodes: RayCluster) -> RayCluster:
    """A head and three nodes of one processor."""
    _nodes.restore()
    return _nodes


@pytest.fixture(scope="session")
def _network() -> Iterator[Hosts]:
    if why_not():
        pytest.skip(why_not())
    with Hosts(1 + WORKER_HOSTS + 1) as hosts:
        yield hosts


@pytest.fixture
def network(_network: Hosts) -> Hosts:
    """Host 0 for the head and drivers, `WORKER_HOSTS` for workers, and one for storage; no cable pulled."""
    _network.heal_all()
    return _network


@pytest.fixture(scope="session")
def _on_hosts(_network: Hosts) -> Iterator[RayCluster]:
    with RayCluster(_network.place(0), [_network.place(1 + number) for number in range(WORKER_HOSTS)]) as cluster:
        yield cluster


@pytest.fixture
def on_hosts(_on_hosts: RayCluster, network: Hosts) -> RayCluster:
    """A cluster with one node of one processor on each of these hosts."""
    _on_hosts.restore()
    return _on_hosts


@pytest.fixture
def s3(network: Hosts) -> Iterator[S3]:
    """An S3 server on the host for storage."""
    with S3(network, STORAGE_HOST) as server:
        yield server
