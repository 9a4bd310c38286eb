"""Hosts that are cut off from the cluster or from storage, and come back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.fault_evidence import only_run, wait_for
from tests.survive.hosts import S3, S3_URL, Hosts
from tests.survive.nodes import RAYLET, RayCluster
from tests.survive.survive_jobs import claims, driving
from tests.survive.survive_scenes import AGAIN, NOTICED, PATIENCE_S, Scene, ended, now, tell_figures

pytestmark = pytest.mark.timeout(1200)
MINUTE_S = 60


def test_a_host_cut_off_from_the_cluster_is_replaced_and_harms_nothing_when_it_is_back(
    network: Hosts, on_hosts: RayCluster, short: Scene
) -> None:
    """Rank 0's host, whose way to storage stays open: what it still writes is that of a zombie."""
    with short.begun(on_hosts) as driver:
        home, cut = short.home(on_hosts, of_rank_0=True), now()
        home.lost = True
        network.cut(network.host_of(home.place.address))
        tell_figures("host of rank 0 cut off, spare host", driver, cut)
        assert home.processes("RayTrainWorker"), "cut off, not dead"
        network.heal(network.host_of(home.place.address))
        assert ended(short, driver) == 0, driver.said
    assert short.world_sizes() == [2, 2]
    first, second = claims(short.storage)
    assert first["boot"] != second["boot"], "nothing there to prove a death by"
    short.check()


@pytest.mark.slow
@pytest.mark.parametrize("of_rank_0", [True, False], ids=["rank 0", "another"])
def test_a_host_cut_off_for_a_minute_takes_part_again(
    network: Hosts, on_hosts: RayCluster, longer: Scene, of_rank_0: bool
) -> None:
    """No spare host. Its raylet ends itself when it learns that it was given up; whoever runs the host starts it
    again, as Kubernetes does."""
    on_hosts.only(2)
    with longer.begun(on_hosts) as driver:
        home, cut = longer.home(on_hosts, of_rank_0=of_rank_0), now()
        home.lost = True
        network.cut(network.host_of(home.place.address))
        noticed = driver.wait_for(NOTICED, cut, PATIENCE_S)
        time.sleep(max(0.0, cut + MINUTE_S - now()))
        network.heal(network.host_of(home.place.address))
        healed = now()
        wait_for(lambda: not home.processes(RAYLET), PATIENCE_S, "the raylet's end")
        gone = now() - healed
        on_hosts.start(home.place)
        returned = now()
        again = driver.wait_for(AGAIN, returned, PATIENCE_S)
        print(
            f"\ncut off for a minute (of_rank_0={of_rank_0}): noticed after {noticed} s; the raylet ended {gone:.1f} s"
        )
        print(f"after the return; training again {again} s after its new start")
        assert ended(longer, driver) == 0, driver.said
    assert longer.world_sizes() == [2, 2]
    longer.check()


@pytest.mark.slow
@pytest.mark.parametrize("cut_off", ["rank 0's host", "another's host", "the storage"])
def test_storage_out_of_reach_for_a_minute_costs_only_time(
    network: Hosts,
    on_hosts: RayCluster,
    s3: S3,
    longer: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_off: str,
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    on_hosts.head.lost = True  # its nodes are to know the way to storage
    on_hosts.restore()
    url = S3_URL.replace("runs", cut_off.replace(" ", "-").replace("'", ""))

    def copied() -> Path:
        s3.copy(tmp_path)
        return tmp_path / url.partition("//")[2].partition("/")[2]

    longer.anew()
    with driving(longer.folder, url, on_hosts) as driver:
        driver.wait_for("step 50 ", 0.0, PATIENCE_S)
        address = claims(copied())[0]["facts"]["host"]
        host_number = int(address.removeprefix("host"))
        workers = {network.host_of(node.place.address) for node in on_hosts.workers().values()}
        host = {"rank 0's host": host_number, "another's host": min(workers - {host_number}), "the storage": s3.host}[cut_off]
        network.cut(host, "storage")
        time.sleep(MINUTE_S)
        assert not driver.is_over, driver.said
        network.heal(host, "storage")
        healed = now()
        assert ended(longer, driver) == 0, driver.said
    print(f"\nstorage cut off from {cut_off} for a minute: finished {now() - healed:.0f} s later")
    assert [claim["attempt"] for claim in claims(copied())] == [1]
    longer.check(only_run(copied()))
