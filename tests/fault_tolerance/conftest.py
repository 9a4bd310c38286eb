"""Clusters of several nodes and hosts, which the fault tests share. All nodes run at the start of each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fault_tolerance.hosts import S3Server, VirtualHosts, unavailable_reason
from tests.fault_tolerance.nodes import RayCluster, loopback_placements
from tests.fault_tolerance.scenarios import Scenario, make_scenario

WORKER_HOSTS = 3
STORAGE_HOST = WORKER_HOSTS + 1


@pytest.fixture(scope="session")
def short_scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """A minute of training with pauses."""
    return make_scenario(tmp_path_factory.mktemp("short"), epochs=24, pause_s=0.1)


@pytest.fixture(scope="session")
def long_scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Three minutes of training with pauses."""
    return make_scenario(tmp_path_factory.mktemp("longer"), epochs=70, pause_s=0.1)


@pytest.fixture(scope="session")
def three_worker_scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """The short scenario, on three workers."""
    return make_scenario(tmp_path_factory.mktemp("three"), epochs=24, pause_s=0.1, workers=3)


@pytest.fixture(scope="session")
def _nodes() -> Iterator[RayCluster]:
    head, *placements = loopback_placements(1 + 3)
    with RayCluster(head, placements) as cluster:
        yield cluster


@pytest.fixture
def nodes(_nodes: RayCluster) -> RayCluster:
    """A cluster of a head and three nodes with one CPU each."""
    _nodes.restore()
    return _nodes


@pytest.fixture(scope="session")
def _network() -> Iterator[VirtualHosts]:
    if unavailable_reason():
        pytest.skip(unavailable_reason())
    with VirtualHosts(1 + WORKER_HOSTS + 1) as hosts:
        yield hosts


@pytest.fixture
def network(_network: VirtualHosts) -> VirtualHosts:
    """Host 0 for the head and drivers, `WORKER_HOSTS` for workers, and one for storage; all are connected."""
    _network.reconnect_all()
    return _network


@pytest.fixture(scope="session")
def _host_cluster(_network: VirtualHosts) -> Iterator[RayCluster]:
    with RayCluster(
        _network.placement(0), [_network.placement(1 + number) for number in range(WORKER_HOSTS)]
    ) as cluster:
        yield cluster


@pytest.fixture
def host_cluster(_host_cluster: RayCluster, network: VirtualHosts) -> RayCluster:
    """A cluster with a head on host 0 and a node with one CPU on each of the hosts for workers."""
    _host_cluster.restore()
    return _host_cluster


@pytest.fixture
def s3(network: VirtualHosts) -> Iterator[S3Server]:
    """An S3 server on the host for storage."""
    with S3Server(network, STORAGE_HOST) as server:
        yield server
