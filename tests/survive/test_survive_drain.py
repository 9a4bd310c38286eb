"""A node that is to be drained: what a preemption notice of a cloud, or a Kubernetes autoscaler, becomes in Ray."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.fault_evidence import entries, evidence, only_run, wait_for
from tests.survive.nodes import RAY, Node, RayCluster, loopback_places
from tests.survive.survive_jobs import commits, driving, untouched, write_job

pytestmark = pytest.mark.timeout(600)

DRAINED_IN_S = 60


def drain(cluster: RayCluster, node: Node) -> None:
    """The notice: this node will be gone soon."""
    command = cluster.command(
        [
            *(RAY, "drain-node", "--address", cluster.address, "--node-id", node_id(cluster, node)),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"),
            *("--deadline-remaining-seconds", str(DRAINED_IN_S)),
        ]
    )
    completed = subprocess.run(command, env=cluster.environment(), capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stdout + completed.stderr


def node_id(cluster: RayCluster, node: Node) -> str:
    code = (
        "import ray\n"
        f"ray.init({cluster.address!r}, log_to_driver=False, logging_level='error')\n"
        f"print([one['NodeID'] for one in ray.nodes() if one['NodeManagerAddress'] == {node.place.address!r}][0])"
    )
    words = cluster.command([RAY.removesuffix("ray") + "python", "-c", code])
    completed = subprocess.run(words, env=cluster.environment(), capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.split()[-1]


@pytest.mark.slow
def test_a_drained_node_is_left_with_a_checkpoint_inside_the_notice(tmp_path: Path) -> None:
    write_job(tmp_path, epochs=24, pause_s=0.05)
    head, *places = loopback_places(4)
    with RayCluster(head, places) as cluster, driving(tmp_path, tmp_path / "runs", cluster) as driver:
        wait_for(lambda: commits(tmp_path / "runs") or driver.is_over, 240, "a checkpoint")
        assert not driver.is_over, driver.said
        leaving = next(iter(cluster.workers().values()))
        drain(cluster, leaving)
        notice_time = time.monotonic()
        noticed = driver.wait_for(r"will be gone within \d+ s: saving", notice_time - 30, 60)
        saved = driver.wait_for(r"stopped at step \d+ of 624, and saved; starting again", notice_time - 30, 60)
        again = driver.wait_for(r"resuming after step", notice_time - 30, 240)
        assert saved - 30 < DRAINED_IN_S
        assert leaving not in cluster.workers().values(), "the new workers are elsewhere"
        leaving.kill()
        assert driver.end() == 0, driver.said
    print(f"\ndrained: noticed {noticed - 30:.1f} s, saved {saved - 30:.1f} s, training {again - 30:.1f} s after")
    run = only_run(tmp_path / "runs")
    *_, commit, leave = [entry for entry in entries(run) if entry["attempt"] == 1]
    assert (commit["kind"], leave["kind"], leave["status"]) == ("commit", "leave", "interrupted")
    assert commit["step"] == leave["step"]
    assert [entry["attempt"] for entry in entries(run) if entry["kind"] == "claim"] == [1, 2]
    assert evidence(run) == evidence(untouched(tmp_path, tmp_path / "untouched"))
