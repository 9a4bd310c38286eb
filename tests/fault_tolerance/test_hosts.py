"""Hosts that are cut off from the cluster or from storage, and come back."""

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
    """Rank 0's host, whose way to storage stays open: what it still writes is that of a zombie."""
    with short_scenario.start_driver(host_cluster) as driver:
        home, cut = short_scenario.find_node(host_cluster, of_rank_0=True), monotonic_time()
        home.is_lost = True
        network.disconnect(network.host_of(home.placement.address))
        report_recovery("host of rank 0 cut off, spare host", driver, cut)
        assert home.processes("RayTrainWorker"), "cut off, not dead"
        network.reconnect(network.host_of(home.placement.address))
        assert wait_for_exit_code(short_scenario, driver) == 0, driver.output
    assert short_scenario.world_sizes() == [2, 2]
    first, second = read_claims(short_scenario.storage)
    assert first["boot"] != second["boot"], "nothing there to prove a death by"
    short_scenario.check()


@pytest.mark.slow
@pytest.mark.parametrize("of_rank_0", [True, False], ids=["rank 0", "another"])
def test_host_disconnected_for_a_minute_rejoins(
    network: VirtualHosts, host_cluster: RayCluster, long_scenario: Scenario, of_rank_0: bool
) -> None:
    """No spare host. Its raylet ends itself when it learns that it was given up; whoever runs the host starts it
    again, as Kubernetes does."""
    host_cluster.keep_nodes(2)
    with long_scenario.start_driver(host_cluster) as driver:
        home, cut = long_scenario.find_node(host_cluster, of_rank_0=of_rank_0), monotonic_time()
        home.is_lost = True
        network.disconnect(network.host_of(home.placement.address))
        noticed = driver.wait_for(NOTICED_PATTERN, cut, WAIT_LIMIT_S)
        time.sleep(max(0.0, cut + MINUTE_S - monotonic_time()))
        network.reconnect(network.host_of(home.placement.address))
        healed = monotonic_time()
        wait_for(lambda: not home.processes(RAYLET_COMMAND), WAIT_LIMIT_S, "the raylet's end")
        gone = monotonic_time() - healed
        host_cluster.add_node(home.placement)
        returned = monotonic_time()
        again = driver.wait_for(RESUMED_PATTERN, returned, WAIT_LIMIT_S)
        print(
            f"\ncut off for a minute (of_rank_0={of_rank_0}): noticed after {noticed} s; the raylet ended {gone:.1f} s"
        )
        print(f"after the return; training again {again} s after its new start")
        assert wait_for_exit_code(long_scenario, driver) == 0, driver.output
    assert long_scenario.world_sizes() == [2, 2]
    long_scenario.check()


@pytest.mark.slow
@pytest.mark.parametrize("cut_off", ["rank 0's host", "another's host", "the storage"])
def test_storage_outage_of_a_minute_only_costs_time(
    network: VirtualHosts,
    host_cluster: RayCluster,
    s3: S3Server,
    long_scenario: Scenario,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_off: str,
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    host_cluster.head.is_lost = True  # its nodes are to know the way to storage
    host_cluster.restore()
    url = S3_URL.replace("runs", cut_off.replace(" ", "-").replace("'", ""))

    def copied() -> Path:
        s3.download(tmp_path)
        return tmp_path / url.partition("//")[2].partition("/")[2]

    long_scenario.reset()
    with running_driver(long_scenario.folder, url, host_cluster) as driver:
        driver.wait_for("step 50 ", 0.0, WAIT_LIMIT_S)
        address = read_claims(copied())[0]["facts"]["host"]
        host_number = int(address.removeprefix("host"))
        workers = {network.host_of(node.placement.address) for node in host_cluster.workers().values()}
        host = {"rank 0's host": host_number, "another's host": min(workers - {host_number}), "the storage": s3.host}[
            cut_off
        ]
        network.disconnect(host, "storage")
        time.sleep(MINUTE_S)
        assert not driver.is_over, driver.output
        network.reconnect(host, "storage")
        healed = monotonic_time()
        assert wait_for_exit_code(long_scenario, driver) == 0, driver.output
    print(f"\nstorage cut off from {cut_off} for a minute: finished {monotonic_time() - healed:.0f} s later")
    assert [claim["attempt"] for claim in read_claims(copied())] == [1]
    long_scenario.check(find_run(copied()))
