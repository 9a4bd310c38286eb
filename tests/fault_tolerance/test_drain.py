"""A node that is drained, as Ray does after a preemption notice of a cloud or for a Kubernetes autoscaler."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.fault_tolerance.jobs import read_commits, running_driver, train_reference, write_job
from tests.fault_tolerance.nodes import RAY, Node, RayCluster, loopback_placements
from tests.process_kill.run_assertions import final_state, find_run, read_entries, wait_for

pytestmark = pytest.mark.timeout(600)

DRAIN_DEADLINE_S = 60


def drain_node(cluster: RayCluster, node: Node) -> None:
    """Announce that this node will be removed soon."""
    command = cluster.command(
        [
            *(RAY, "drain-node", "--address", cluster.address, "--node-id", find_node_id(cluster, node)),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"),
            *("--deadline-remaining-seconds", str(DRAIN_DEADLINE_S)),
        ]
    )
    completed = subprocess.run(command, env=cluster.environment(), capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stdout + completed.stderr


def find_node_id(cluster: RayCluster, node: Node) -> str:
    code = (
        "import ray\n"
        f"ray.init({cluster.address!r}, log_to_driver=False, logging_level='error')\n"
        f"print([n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == {node.placement.address!r}][0])"
    )
    command = cluster.command([RAY.removesuffix("ray") + "python", "-c", code])
    completed = subprocess.run(command, env=cluster.environment(), capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.split()[-1]


@pytest.mark.slow
def test_drained_node_is_left_with_a_checkpoint_in_time(tmp_path: Path) -> None:
    write_job(tmp_path, epochs=24, pause_s=0.05)
    head, *placements = loopback_placements(4)
    with RayCluster(head, placements) as cluster, running_driver(tmp_path, tmp_path / "runs", cluster) as driver:
        wait_for(lambda: read_commits(tmp_path / "runs") or driver.is_over, 240, "a checkpoint")
        assert not driver.is_over, driver.output
        drained_node = next(iter(cluster.workers().values()))
        drain_node(cluster, drained_node)
        notice_time = time.monotonic()
        noticed = driver.wait_for(r"will be removed within \d+ s: saving", notice_time - 30, 60)
        saved = driver.wait_for(r"stopped at step \d+ of 624, and saved; starting again", notice_time - 30, 60)
        resumed = driver.wait_for(r"resuming after step", notice_time - 30, 240)
        assert saved - 30 < DRAIN_DEADLINE_S
        assert drained_node not in cluster.workers().values(), "the new workers are on other nodes"
        drained_node.kill()
        assert driver.wait_for_exit() == 0, driver.output
    print(f"\ndrained: noticed {noticed - 30:.1f} s, saved {saved - 30:.1f} s, training {resumed - 30:.1f} s after")
    run = find_run(tmp_path / "runs")
    *_, commit, leave = [entry for entry in read_entries(run) if entry["attempt"] == 1]
    assert (commit["kind"], leave["kind"], leave["status"]) == ("commit", "leave", "interrupted")
    assert commit["step"] == leave["step"]
    assert [entry["attempt"] for entry in read_entries(run) if entry["kind"] == "claim"] == [1, 2]
    assert final_state(run) == final_state(train_reference(tmp_path, tmp_path / "reference"))
