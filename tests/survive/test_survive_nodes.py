"""Nodes of a real Ray cluster are lost, return, wake up; its head is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.fault_evidence import committed, only_run, wait_for
from tests.survive.nodes import RayCluster
from tests.survive.survive_jobs import claims, commits, driving
from tests.survive.survive_scenes import AGAIN, NOTICED, PATIENCE_S, Scene, ended, now, tell_figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("of_rank_0", [True, False], ids=["rank 0", "another"])
def test_a_killed_raylet_is_made_good_on_a_spare_node(nodes: RayCluster, short: Scene, of_rank_0: bool) -> None:
    with short.begun(nodes) as driver:
        killed = now()
        short.home(nodes, of_rank_0=of_rank_0).kill_raylet()
        tell_figures(f"raylet killed, spare node, of_rank_0={of_rank_0}", driver, killed)
        assert ended(short, driver) == 0, driver.said
    assert short.world_sizes() == [2, 2]
    short.check()


def test_a_killed_node_of_three_workers_is_made_good_when_it_returns(nodes: RayCluster, three: Scene) -> None:
    with three.begun(nodes) as driver:
        killed, node = now(), three.home(nodes, of_rank_0=False)
        node.kill()
        seen = driver.wait_for(NOTICED, killed, PATIENCE_S)
        nodes.start(node.place)
        returned = now()
        again = driver.wait_for(AGAIN, returned, PATIENCE_S)
        print(f"\nnode of three workers killed: noticed after {seen} s, training again {again} s after its return")
        assert ended(three, driver) == 0, driver.said
    assert three.world_sizes() == [3, 3]
    three.check()


def test_a_fixed_number_of_workers_waits_for_a_node_that_returns(nodes: RayCluster, short: Scene) -> None:
    nodes.only(2)
    with short.begun(nodes) as driver:
        killed = now()
        node = short.home(nodes, of_rank_0=False)
        node.kill()
        driver.wait_for("waiting for up to 900 s for room for 2 workers", killed, PATIENCE_S)
        time.sleep(10)
        assert len(claims(short.storage)) == 1
        nodes.start(node.place)
        returned = now()
        again = driver.wait_for(AGAIN, returned, PATIENCE_S)
        seen = driver.seconds_to(NOTICED, killed)
        print(f"\nnode killed and returned: noticed after {seen} s, training again {again} s after the return")
        assert ended(short, driver) == 0, driver.said
    short.check()


def test_a_node_that_never_returns_is_given_up_after_the_stated_wait_and_the_same_command_goes_on(
    nodes: RayCluster, short: Scene
) -> None:
    nodes.only(2)
    with short.begun(nodes, "--set", "scale.wait_s=5") as driver:
        node = short.home(nodes, of_rank_0=True)
        node.kill()
        assert driver.end(PATIENCE_S) == 1
        assert "same command" in driver.said
        assert "Traceback" not in driver.said
    nodes.start(node.place)
    with driving(short.folder, short.storage, nodes) as again:
        assert ended(short, again) == 0, again.said
        assert "resuming after step" in again.said
    short.check()


def test_a_range_goes_on_with_fewer_and_takes_more_at_a_later_restart(nodes: RayCluster, longer: Scene) -> None:
    nodes.only(2)
    with longer.begun(nodes, "--workers", "1..2", "--set", "scale.wait_s=10") as driver:
        killed = now()
        node = longer.home(nodes, of_rank_0=True)
        node.kill()
        tell_figures("node killed, {min: 1, max: 2}, wait_s 10", driver, killed)
        wait_for(lambda: commits(longer.storage, attempt=2) or driver.is_over, PATIENCE_S, "a checkpoint by one worker")
        nodes.start(node.place)
        struck = now()
        os.kill(longer.rank_0, signal.SIGKILL)
        driver.wait_for(AGAIN, struck, PATIENCE_S)
        assert ended(longer, driver) == 0, driver.said
    assert longer.world_sizes() == [2, 1, 2]
    longer.check(to_the_bit=False)


def test_a_zombie_node_that_wakes_while_its_successor_trains_harms_nothing(nodes: RayCluster, longer: Scene) -> None:
    """The whole node stands still until it is taken for dead, then finds that it is."""
    with longer.begun(nodes) as driver:
        home, stopped = longer.home(nodes, of_rank_0=True), now()
        assert home.signal(signal.SIGSTOP)
        tell_figures("node of rank 0 stopped", driver, stopped)
        wait_for(lambda: commits(longer.storage, attempt=2) or driver.is_over, PATIENCE_S, "a successor's checkpoint")
        before = committed(only_run(longer.storage))
        home.signal(signal.SIGCONT)
        wait_for(lambda: not home.processes("RayTrainWorker"), PATIENCE_S, "the zombie's end")
        after = committed(only_run(longer.storage))
        for name in ("journal", "metrics"):
            kept = {file: digest for file, digest in before.items() if file.startswith(name)}
            assert kept == {file: after.get(file) for file in kept}
        assert ended(longer, driver) == 0, driver.said
    assert {entry["attempt"] for entry in commits(longer.storage)} == {1, 2}
    longer.check()


def test_a_killed_head_ends_the_driver_and_the_same_command_resumes_on_a_new_cluster(
    nodes: RayCluster, short: Scene
) -> None:
    with short.begun(nodes) as driver:
        killed = now()
        nodes.head.kill()
        code = driver.end(PATIENCE_S)
        print(f"\nhead killed: the driver left after {now() - killed:.0f} s with {code}\n{driver.lines[-3:]}")
        assert code == 1, driver.said
        assert "the head of the cluster has not answered" in driver.said
        assert "same command" in driver.said
        assert "Traceback" not in driver.said
    nodes.restore()
    began = now()
    with driving(short.folder, short.storage, nodes) as again:
        print(f"\nhead killed: training again {again.wait_for(AGAIN, began, PATIENCE_S)} s after the same command")
        assert ended(short, again) == 0, again.said
        assert "resuming after step" in again.said
    short.check()


def test_of_two_drivers_at_once_one_runs_and_the_other_is_told(nodes: RayCluster, short: Scene) -> None:
    short.anew()
    half = ("--set", "scale.cpus_per_worker=0.5")  # room for both
    with (
        driving(short.folder, short.storage, nodes, *half) as first_driver,
        driving(short.folder, short.storage, nodes, *half) as other,
    ):
        wait_for(lambda: first_driver.is_over or other.is_over, PATIENCE_S, "the loser's end")
        codes = {driver: ended(short, driver) for driver in (first_driver, other)}
    assert sorted(codes.values()) == [0, 3], first_driver.said + other.said
    (loser,) = [driver for driver, code in codes.items() if code == 3]
    assert "this run" in loser.said
    assert "Traceback" not in loser.said
    assert len(claims(short.storage)) == 1
    short.check()


def test_more_workers_than_the_nodes_hold_are_refused_at_once(nodes: RayCluster, short: Scene) -> None:
    short.anew()
    with driving(short.folder, short.storage, nodes, "--workers", "9") as driver:
        assert driver.end(PATIENCE_S) == 2
    assert "9 workers of 1 CPU each do not fit: the cluster has 3 CPU" in driver.said
    assert list(short.storage.iterdir()) == []
