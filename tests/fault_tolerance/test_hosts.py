"""Hosts that are disconnected from the cluster or from storage, and are connected again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fault_tolerance.hosts import S3_URL, S3Server, VirtualHosts
from tests.fault_tolerance.jobs import read_claims, running_driver
from tests.fault_tolerance.nodes import RAYLET_COMMAND, RayCluster
from tests.fault_tolerance.scenarios import (
    NOTICED_PATTERN,
    RESUMED_PATTERN,
    WAIT_LIMIT_S,
    Scenario,
    monotonic_time,
    report_recovery,
    wait_for_exit_code,
)
from tests.process_kill.run_assertions import find_run, wait_for

pytestmark = pytest.mark.timeout(1200)
MINUTE_S = 60


def test_disconnected_host_is_replaced_and_harmless_when_back(
    network: VirtualHosts, host_cluster: RayCluster, short_scenario: Scenario
) -> None:
    """It is rank 0's host, still connected to storage: its worker is a stale writer."""
    with short_scenario.start_driver(host_cluster) as driver:
        node, disconnected = short_scenario.find_node(host_cluster, of_rank_0=True), monotonic_time()
        node.is_lost = True
        network.disconnect(network.host_of(node.placement.address))
        report_recovery("host of rank 0 disconnected, spare host", driver, disconnected)
        assert node.processes("RayTrainWorker"), "the worker is disconnected, but still runs"
        network.reconnect(network.host_of(node.placement.address))
        assert wait_for_exit_code(short_scenario, driver) == 0, driver.output
    assert short_scenario.world_sizes() == [2, 2]
    first, second = read_claims(short_scenario.storage)
    assert first["boot"] != second["boot"], "the boot ids cannot prove that the first process has ended"
    short_scenario.check()


@pytest.mark.slow
@pytest.mark.parametrize("of_rank_0", [True, False], ids=["rank 0", "another"])
def test_host_disconnected_for_a_minute_rejoins(
    network: VirtualHosts, host_cluster: RayCluster, long_scenario: Scenario, of_rank_0: bool
) -> None:
    """Without a spare host. The raylet ends itself when it is connected again, as the cluster has given it up. Then a
    new one is started, as Kubernetes does."""
    host_cluster.keep_nodes(2)
    with long_scenario.start_driver(host_cluster) as driver:
        node, disconnected = long_scenario.find_node(host_cluster, of_rank_0=of_rank_0), monotonic_time()
        node.is_lost = True
        network.disconnect(network.host_of(node.placement.address))
        noticed = driver.wait_for(NOTICED_PATTERN, disconnected, WAIT_LIMIT_S)
        time.sleep(max(0.0, disconnected + MINUTE_S - monotonic_time()))
        network.reconnect(network.host_of(node.placement.address))
        reconnected = monotonic_time()
        wait_for(lambda: not node.processes(RAYLET_COMMAND), WAIT_LIMIT_S, "the raylet's end")
        raylet_end_s = monotonic_time() - reconnected
        host_cluster.add_node(node.placement)
        returned = monotonic_time()
        resumed = driver.wait_for(RESUMED_PATTERN, returned, WAIT_LIMIT_S)
        print(
            f"\ndisconnected for a minute (of_rank_0={of_rank_0}): noticed after {noticed} s; the raylet ended "
            f"{raylet_end_s:.1f} s after the reconnection; training again {resumed} s after its new start"
        )
        assert wait_for_exit_code(long_scenario, driver) == 0, driver.output
    assert long_scenario.world_sizes() == [2, 2]
    long_scenario.check()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rank 0's host", "another's host", "the storage"])
def test_storage_outage_of_a_minute_only_costs_time(
    network: VirtualHosts,
    host_cluster: RayCluster,
    s3: S3Server,
    long_scenario: Scenario,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    host_cluster.head.is_lost = True  # so that its nodes are started with the environment of the storage
    host_cluster.restore()
    url = S3_URL.replace("runs", target.replace(" ", "-").replace("'", ""))

    def download_storage() -> Path:
        s3.download(tmp_path)
        return tmp_path / url.partition("//")[2].partition("/")[2]

    long_scenario.reset()
    with running_driver(long_scenario.folder, url, host_cluster) as driver:
        driver.wait_for("step 50 ", 0.0, WAIT_LIMIT_S)
        address = read_claims(download_storage())[0]["facts"]["host"]
        host_number = int(address.removeprefix("host"))
        workers = {network.host_of(node.placement.address) for node in host_cluster.workers().values()}
        hosts = {"rank 0's host": host_number, "another's host": min(workers - {host_number}), "the storage": s3.host}
        host = hosts[target]
        network.disconnect(host, "storage")
        time.sleep(MINUTE_S)
        assert not driver.is_over, driver.output
        network.reconnect(host, "storage")
        reconnected = monotonic_time()
        assert wait_for_exit_code(long_scenario, driver) == 0, driver.output
    print(f"\nstorage disconnected ({target}) for a minute: finished {monotonic_time() - reconnected:.0f} s later")
    assert [claim["attempt"] for claim in read_claims(download_storage())] == [1]
    long_scenario.check(find_run(download_storage()))
