"""What the tests of faults have in common: a folder with a job, its untouched run, and the moments of a recovery."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.fault_evidence import Watcher, check_at_rest, evidence, only_run, read_log, wait_for
from tests.survive.nodes import Node, RayCluster
from tests.survive.survive_jobs import HURRY, Driver, claims, commits, driving, untouched, write_job

PATIENCE_S = 300
"""For a machine with much else to do: it bounds hangs."""
NOTICED, AGAIN = "starting again|saving", "resuming after step|training to step"


@dataclass
class Scene:
    """A job in a folder, and what it gives where nobody touches it."""

    folder: Path
    expected: Path
    count: int = 0

    @property
    def storage(self) -> Path:
        """The runs of the present test."""
        return self.folder / f"runs-{self.count}"

    def anew(self) -> None:
        """An empty storage, and steps that take their time."""
        self.count += 1
        self.storage.mkdir()
        (self.folder / HURRY).unlink(missing_ok=True)

    def hurry(self) -> None:
        """From now on, steps as fast as they go."""
        (self.folder / HURRY).touch()

    @contextmanager
    def begun(self, cluster: RayCluster, *options: str) -> Iterator[Driver]:
        """A driver whose run has made two checkpoints; the log is watched all the time."""
        self.anew()
        with Watcher(self.storage), driving(self.folder, self.storage, cluster, *options) as driver:
            wait_for(lambda: len(commits(self.storage)) > 1 or driver.is_over, PATIENCE_S, "checkpoints")
            assert not driver.is_over, driver.said
            yield driver

    @property
    def rank_0(self) -> int:
        """Process of the last attempt's rank 0."""
        return int(claims(self.storage)[-1]["facts"]["pid"])

    def home(self, cluster: RayCluster, *, of_rank_0: bool) -> Node:
        """The node that rank 0 runs on, or one of another rank."""
        nodes = [node for pid, node in cluster.workers().items() if (pid == self.rank_0) == of_rank_0]
        return nodes[0]

    def world_sizes(self) -> list[int]:
        """Of each attempt."""
        return [claim["facts"]["world_size"] for claim in claims(self.storage)]

    def check(self, run: Path | None = None, *, to_the_bit: bool = True) -> None:
        """The outcome is that of the untouched run: to the bit, or where the world changed its size to rounding."""
        run = run or only_run(self.storage)
        check_at_rest(run)
        if to_the_bit:
            assert evidence(run) == evidence(self.expected)
            return
        actual, expected = read_log(run, "steps"), read_log(self.expected, "steps")
        assert actual["step"].to_pylist() == expected["step"].to_pylist()
        pairs = zip(actual["loss"].to_pylist(), expected["loss"].to_pylist(), strict=True)
        assert max(abs(one - other) for one, other in pairs) < 1e-9


def scene(folder: Path, **job: Any) -> Scene:
    """A new one."""
    write_job(folder, **job)
    return Scene(folder, untouched(folder, folder / "untouched"))


def ended(scene: Scene, driver: Driver, limit_s: float = PATIENCE_S) -> int:
    """The exit code, after no more waiting."""
    scene.hurry()
    return driver.end(limit_s)


def tell_figures(fault: str, driver: Driver, since: float, noticed: str = NOTICED) -> None:
    """Wait until it trains again, and print in how many seconds."""
    seen = driver.wait_for(noticed, since, PATIENCE_S)
    again = driver.wait_for(AGAIN, since, PATIENCE_S)
    print(f"\n{fault}: noticed after {seen} s, training again after {again} s")


def now() -> float:
    return time.monotonic()
