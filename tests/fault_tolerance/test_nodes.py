"""Nodes of a real Ray cluster that are killed, replaced or stopped for a while, and a killed head."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.fault_tolerance.jobs import read_claims, read_commits, running_driver
from tests.fault_tolerance.nodes import RayCluster
from tests.fault_tolerance.scenarios import (
    NOTICED_PATTERN,
    RESUMED_PATTERN,
    WAIT_LIMIT_S,
    Scenario,
    monotonic_time,
    report_recovery,
    wait_for_exit_code,
)
from tests.process_kill.run_assertions import find_run, hash_committed_files, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("of_rank_0", [True, False], ids=["rank 0", "another"])
def test_killed_raylet_is_replaced_by_a_spare_node(
    nodes: RayCluster, short_scenario: Scenario, of_rank_0: bool
) -> None:
    with short_scenario.start_driver(nodes) as driver:
        killed = monotonic_time()
        short_scenario.find_node(nodes, of_rank_0=of_rank_0).kill_raylet()
        report_recovery(f"raylet killed, spare node, of_rank_0={of_rank_0}", driver, killed)
        assert wait_for_exit_code(short_scenario, driver) == 0, driver.output
    assert short_scenario.world_sizes() == [2, 2]
    short_scenario.check()


def test_killed_node_is_recovered_when_it_returns(nodes: RayCluster, three_worker_scenario: Scenario) -> None:
    with three_worker_scenario.start_driver(nodes) as driver:
        killed, node = monotonic_time(), three_worker_scenario.find_node(nodes, of_rank_0=False)
        node.kill()
        noticed = driver.wait_for(NOTICED_PATTERN, killed, WAIT_LIMIT_S)
        nodes.add_node(node.placement)
        returned = monotonic_time()
        resumed = driver.wait_for(RESUMED_PATTERN, returned, WAIT_LIMIT_S)
        print(f"\nnode of three workers killed: noticed after {noticed} s, training again {resumed} s after its return")
        assert wait_for_exit_code(three_worker_scenario, driver) == 0, driver.output
    assert three_worker_scenario.world_sizes() == [3, 3]
    three_worker_scenario.check()


def test_fixed_worker_count_waits_for_a_returning_node(nodes: RayCluster, short_scenario: Scenario) -> None:
    nodes.keep_nodes(2)
    with short_scenario.start_driver(nodes) as driver:
        killed = monotonic_time()
        node = short_scenario.find_node(nodes, of_rank_0=False)
        node.kill()
        driver.wait_for("waiting for up to 900 s for resources for 2 workers", killed, WAIT_LIMIT_S)
        time.sleep(10)
        assert len(read_claims(short_scenario.storage)) == 1
        nodes.add_node(node.placement)
        returned = monotonic_time()
        resumed = driver.wait_for(RESUMED_PATTERN, returned, WAIT_LIMIT_S)
        noticed = driver.seconds_to(NOTICED_PATTERN, killed)
        print(f"\nnode killed and returned: noticed after {noticed} s, training again {resumed} s after the return")
        assert wait_for_exit_code(short_scenario, driver) == 0, driver.output
    short_scenario.check()


def test_node_that_never_returns_times_out_and_the_command_resumes(nodes: RayCluster, short_scenario: Scenario) -> None:
    nodes.keep_nodes(2)
    with short_scenario.start_driver(nodes, "--set", "scale.wait_s=5") as driver:
        node = short_scenario.find_node(nodes, of_rank_0=True)
        node.kill()
        assert driver.wait_for_exit(WAIT_LIMIT_S) == 1
        assert "same command" in driver.output
        assert "Traceback" not in driver.output
    nodes.add_node(node.placement)
    with running_driver(short_scenario.folder, short_scenario.storage, nodes) as driver:
        assert wait_for_exit_code(short_scenario, driver) == 0, driver.output
        assert "resuming after step" in driver.output
    short_scenario.check()


def test_worker_range_continues_with_fewer_and_grows_at_a_restart(nodes: RayCluster, long_scenario: Scenario) -> None:
    nodes.keep_nodes(2)
    with long_scenario.start_driver(nodes, "--workers", "1..2", "--set", "scale.wait_s=10") as driver:
        killed = monotonic_time()
        node = long_scenario.find_node(nodes, of_rank_0=True)
        node.kill()
        report_recovery("node killed, {min: 1, max: 2}, wait_s 10", driver, killed)
        wait_for(
            lambda: read_commits(long_scenario.storage, attempt=2) or driver.is_over,
            WAIT_LIMIT_S,
            "a checkpoint by one worker",
        )
        nodes.add_node(node.placement)
        worker_killed = monotonic_time()
        os.kill(long_scenario.rank_0, signal.SIGKILL)
        driver.wait_for(RESUMED_PATTERN, worker_killed, WAIT_LIMIT_S)
        assert wait_for_exit_code(long_scenario, driver) == 0, driver.output
    assert long_scenario.world_sizes() == [2, 1, 2]
    long_scenario.check(bit_identical=False)


def test_stale_node_during_the_next_attempt_is_harmless(nodes: RayCluster, long_scenario: Scenario) -> None:
    """The whole node is stopped until the cluster has given it up, and then continues."""
    with long_scenario.start_driver(nodes) as driver:
        node, stopped = long_scenario.find_node(nodes, of_rank_0=True), monotonic_time()
        assert node.signal(signal.SIGSTOP)
        report_recovery("node of rank 0 stopped", driver, stopped)
        wait_for(
            lambda: read_commits(long_scenario.storage, attempt=2) or driver.is_over,
            WAIT_LIMIT_S,
            "a checkpoint of the second attempt",
        )
        before = hash_committed_files(find_run(long_scenario.storage))
        node.signal(signal.SIGCONT)
        wait_for(lambda: not node.processes("RayTrainWorker"), WAIT_LIMIT_S, "the end of the stale worker")
        after = hash_committed_files(find_run(long_scenario.storage))
        for name in ("journal", "metrics"):
            expected = {file: digest for file, digest in before.items() if file.startswith(name)}
            assert expected == {file: after.get(file) for file in expected}
        assert wait_for_exit_code(long_scenario, driver) == 0, driver.output
    assert {entry["attempt"] for entry in read_commits(long_scenario.storage)} == {1, 2}
    long_scenario.check()


def test_killed_head_ends_the_driver_and_the_command_resumes(nodes: RayCluster, short_scenario: Scenario) -> None:
    with short_scenario.start_driver(nodes) as driver:
        killed = monotonic_time()
        nodes.head.kill()
        code = driver.wait_for_exit(WAIT_LIMIT_S)
        print(
            f"\nhead killed: the driver exited after {monotonic_time() - killed:.0f} s with {code}\n{driver.lines[-3:]}"
        )
        assert code == 1, driver.output
        assert "the head of the cluster has not answered" in driver.output
        assert "same command" in driver.output
        assert "Traceback" not in driver.output
    nodes.restore()
    start_time = monotonic_time()
    with running_driver(short_scenario.folder, short_scenario.storage, nodes) as driver:
        print(
            f"\nhead killed: training again {driver.wait_for(RESUMED_PATTERN, start_time, WAIT_LIMIT_S)} s after the "
            "same command"
        )
        assert wait_for_exit_code(short_scenario, driver) == 0, driver.output
        assert "resuming after step" in driver.output
    short_scenario.check()


def test_one_of_two_concurrent_drivers_runs(nodes: RayCluster, short_scenario: Scenario) -> None:
    short_scenario.reset()
    half = ("--set", "scale.cpus_per_worker=0.5")  # resources for both
    with (
        running_driver(short_scenario.folder, short_scenario.storage, nodes, *half) as first,
        running_driver(short_scenario.folder, short_scenario.storage, nodes, *half) as other,
    ):
        wait_for(lambda: first.is_over or other.is_over, WAIT_LIMIT_S, "the end of one driver")
        codes = {driver: wait_for_exit_code(short_scenario, driver) for driver in (first, other)}
    assert sorted(codes.values()) == [0, 3], first.output + other.output
    (refused,) = [driver for driver, code in codes.items() if code == 3]
    assert "this run" in refused.output
    assert "Traceback" not in refused.output
    assert len(read_claims(short_scenario.storage)) == 1
    short_scenario.check()


def test_more_workers_than_the_nodes_are_rejected_at_once(nodes: RayCluster, short_scenario: Scenario) -> None:
    short_scenario.reset()
    with running_driver(short_scenario.folder, short_scenario.storage, nodes, "--workers", "9") as driver:
        assert driver.wait_for_exit(WAIT_LIMIT_S) == 2
    assert "9 workers of 1 CPU each do not fit: the cluster has 3 CPU" in driver.output
    assert list(short_scenario.storage.iterdir()) == []
