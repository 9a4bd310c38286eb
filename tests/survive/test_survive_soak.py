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

from tests.faults.fault_evidence import Watcher, wait_for
from tests.survive.nodes import RayCluster, loopback_places
from tests.survive.survive_jobs import Driver, claims, commits, driving
from tests.survive.survive_scenes import PATIENCE_S, Scene, ended, now, scene

MINUTES = float(os.environ.get("TRAINYARD_SOAK_MINUTES", "20"))
SEED = int(os.environ.get("TRAINYARD_TEST_SEED", "1"))
TRAINING_BETWEEN_KILLS_S = (5, 20)
PAUSE_S = 0.05
"""A step. About 26 steps an epoch."""
BACK_S = 15
"""At the least between a kill and training again: what is trained in so many minutes cannot be more."""
LEFT_ALONE_S = 1500
"""For what the kills have left to do."""
VICTIMS = ("RayTrainWorker", "RayTrainWorker", "TrainController", "driver")


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 1800)
def test_a_run_that_is_killed_at_random_again_and_again_finishes_exactly(tmp_path: Path) -> None:
    """Workers, the controller and now and then the driver, which is then started again."""
    draw = random.Random(SEED)
    most_s = MINUTES * 60 * TRAINING_BETWEEN_KILLS_S[1] / (TRAINING_BETWEEN_KILLS_S[1] + BACK_S)
    made = scene(tmp_path, epochs=max(4, round(most_s / PAUSE_S / 26)), pause_s=PAUSE_S)
    made.anew()
    head, node = loopback_places(2)
    kills: dict[str, int] = {}
    with RayCluster(head, [node], cpus=2) as cluster, Watcher(made.storage):
        until, seen = now() + MINUTES * 60, 0
        while now() < until:
            with driving(made.folder, made.storage, cluster) as driver:
                victim = ""
                while victim != "driver" and now() < until:
                    wait_for(partial(trains_again, made, seen, driver), PATIENCE_S, "training again")
                    assert not driver.is_over, driver.said
                    time.sleep(draw.uniform(*TRAINING_BETWEEN_KILLS_S))
                    seen, victim = len(claims(made.storage)), draw.choice(VICTIMS)
                    kill(victim, cluster, driver.pid, draw)
                    kills[victim] = kills.get(victim, 0) + 1
                if victim != "driver":
                    assert ended(made, driver, LEFT_ALONE_S) == 0, driver.said
        with driving(made.folder, made.storage, cluster) as driver:
            assert ended(made, driver, LEFT_ALONE_S) == 0, driver.said
    attempts = len(claims(made.storage))
    print(f"\n{MINUTES:g} minutes: {kills}, {attempts} attempts, {len(commits(made.storage))} checkpoints")
    assert attempts > sum(kills.values()) / 2
    made.check()


def trains_again(made: Scene, seen: int, driver: Driver) -> bool:
    """Whether an attempt after the first `seen` has made a checkpoint, or nothing will."""
    attempts = claims(made.storage)
    return driver.is_over or (len(attempts) > seen and bool(commits(made.storage, attempt=attempts[-1]["attempt"])))


def kill(victim: str, cluster: RayCluster, driver: int, draw: random.Random) -> None:
    """SIGKILL one process of that kind."""
    of_kind = {pid for node in cluster.nodes.values() for pid in node.processes(victim)}
    os.kill(driver if victim == "driver" else draw.choice(sorted(of_kind)), signal.SIGKILL)
