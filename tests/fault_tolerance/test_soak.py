"""A run that is killed again and again, at random, and then left alone.

TRAINYARD_SOAK_MINUTES=20 pytest -m slow -s tests/survive/test_survive_soak.py
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
"""A step. About 26 steps an epoch."""
NODE_RETURN_S = 15
"""At the least between a kill and training again: what is trained in so many minutes cannot be more."""
FINISH_LIMIT_S = 1500
"""For what the kills have left to do."""
VICTIMS = ("RayTrainWorker", "RayTrainWorker", "TrainController", "driver")


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 1800)
def test_randomly_killed_run_finishes_bit_identically(tmp_path: Path) -> None:
    """Workers, the controller and now and then the driver, which is then started again."""
    draw = random.Random(SEED)
    most_s = MINUTES * 60 * TRAINING_BETWEEN_KILLS_S[1] / (TRAINING_BETWEEN_KILLS_S[1] + NODE_RETURN_S)
    made = make_scenario(tmp_path, epochs=max(4, round(most_s / PAUSE_S / 26)), pause_s=PAUSE_S)
    made.reset()
    head, node = loopback_placements(2)
    kills: dict[str, int] = {}
    with RayCluster(head, [node], cpus=2) as cluster, RunReader(made.storage):
        until, seen = monotonic_time() + MINUTES * 60, 0
        while monotonic_time() < until:
            with running_driver(made.folder, made.storage, cluster) as driver:
                victim = ""
                while victim != "driver" and monotonic_time() < until:
                    wait_for(partial(has_resumed, made, seen, driver), WAIT_LIMIT_S, "training again")
                    assert not driver.is_over, driver.output
                    time.sleep(draw.uniform(*TRAINING_BETWEEN_KILLS_S))
                    seen, victim = len(read_claims(made.storage)), draw.choice(VICTIMS)
                    kill_victim(victim, cluster, driver.pid, draw)
                    kills[victim] = kills.get(victim, 0) + 1
                if victim != "driver":
                    assert wait_for_exit_code(made, driver, FINISH_LIMIT_S) == 0, driver.output
        with running_driver(made.folder, made.storage, cluster) as driver:
            assert wait_for_exit_code(made, driver, FINISH_LIMIT_S) == 0, driver.output
    attempts = len(read_claims(made.storage))
    print(f"\n{MINUTES:g} minutes: {kills}, {attempts} attempts, {len(read_commits(made.storage))} checkpoints")
    assert attempts > sum(kills.values()) / 2
    made.check()


def has_resumed(made: Scenario, seen: int, driver: DriverProcess) -> bool:
    """Whether an attempt after the first `seen` has made a checkpoint, or nothing will."""
    attempts = read_claims(made.storage)
    return driver.is_over or (
        len(attempts) > seen and bool(read_commits(made.storage, attempt=attempts[-1]["attempt"]))
    )


def kill_victim(victim: str, cluster: RayCluster, driver: int, draw: random.Random) -> None:
    """SIGKILL one process of that kind."""
    of_kind = {pid for node in cluster.nodes.values() for pid in node.processes(victim)}
    os.kill(driver if victim == "driver" else draw.choice(sorted(of_kind)), signal.SIGKILL)
