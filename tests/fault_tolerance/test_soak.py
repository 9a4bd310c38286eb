"""A run whose processes are killed at random for some minutes, and which then finishes.

TRAINYARD_SOAK_MINUTES=20 pytest -m slow -s tests/fault_tolerance/test_soak.py
"""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.fault_tolerance.jobs import DriverProcess, read_claims, read_commits, running_driver
from tests.fault_tolerance.nodes import RayCluster, loopback_placements
from tests.fault_tolerance.scenarios import WAIT_LIMIT_S, Scenario, make_scenario, monotonic_time, wait_for_exit_code
from tests.process_kill.run_assertions import RunReader, wait_for

MINUTES = float(os.environ.get("TRAINYARD_SOAK_MINUTES", "20"))
SEED = int(os.environ.get("TRAINYARD_TEST_SEED", "1"))
TRAINING_BETWEEN_KILLS_S = (5, 20)
PAUSE_S = 0.05
"""Per step. An epoch has about 26 steps."""
MIN_RECOVERY_S = 15
"""The minimum of seconds between a kill and training again. It bounds the number of steps in these minutes."""
FINISH_LIMIT_S = 1500
"""Timeout for the rest of the run after the last kill."""
VICTIMS = ("RayTrainWorker", "RayTrainWorker", "TrainController", "driver")


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 1800)
def test_randomly_killed_run_finishes_bit_identically(tmp_path: Path) -> None:
    """Kills workers, the controller and sometimes the driver, which is then started again."""
    rng = random.Random(SEED)
    max_training_s = MINUTES * 60 * TRAINING_BETWEEN_KILLS_S[1] / (TRAINING_BETWEEN_KILLS_S[1] + MIN_RECOVERY_S)
    scenario = make_scenario(tmp_path, epochs=max(4, round(max_training_s / PAUSE_S / 26)), pause_s=PAUSE_S)
    scenario.reset()
    head, node = loopback_placements(2)
    kills: dict[str, int] = {}
    with RayCluster(head, [node], cpus=2) as cluster, RunReader(scenario.storage):
        deadline, num_attempts = monotonic_time() + MINUTES * 60, 0
        while monotonic_time() < deadline:
            with running_driver(scenario.folder, scenario.storage, cluster) as driver:
                victim = ""
                while victim != "driver" and monotonic_time() < deadline:
                    wait_for(partial(has_resumed, scenario, num_attempts, driver), WAIT_LIMIT_S, "training again")
                    assert not driver.is_over, driver.output
                    time.sleep(rng.uniform(*TRAINING_BETWEEN_KILLS_S))
                    num_attempts, victim = len(read_claims(scenario.storage)), rng.choice(VICTIMS)
                    kill_victim(victim, cluster, driver.pid, rng)
                    kills[victim] = kills.get(victim, 0) + 1
                if victim != "driver":
                    assert wait_for_exit_code(scenario, driver, FINISH_LIMIT_S) == 0, driver.output
        with running_driver(scenario.folder, scenario.storage, cluster) as driver:
            assert wait_for_exit_code(scenario, driver, FINISH_LIMIT_S) == 0, driver.output
    attempts = len(read_claims(scenario.storage))
    print(f"\n{MINUTES:g} minutes: {kills}, {attempts} attempts, {len(read_commits(scenario.storage))} checkpoints")
    assert attempts > sum(kills.values()) / 2
    scenario.check()


def has_resumed(scenario: Scenario, num_attempts: int, driver: DriverProcess) -> bool:
    """Return whether an attempt after the first `num_attempts` has made a checkpoint, or the driver has ended."""
    attempts = read_claims(scenario.storage)
    return driver.is_over or (
        len(attempts) > num_attempts and bool(read_commits(scenario.storage, attempt=attempts[-1]["attempt"]))
    )


def kill_victim(victim: str, cluster: RayCluster, driver: int, rng: random.Random) -> None:
    """Kill one process of this kind with SIGKILL."""
    pids = {pid for node in cluster.nodes.values() for pid in node.processes(victim)}
    os.kill(driver if victim == "driver" else rng.choice(sorted(pids)), signal.SIGKILL)
