"""What the tests of faults have in common: a folder with a job, its untouched run, and the moments of a recovery."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fault_tolerance.jobs import (
    HURRY_FILE,
    DriverProcess,
    read_claims,
    read_commits,
    running_driver,
    train_reference,
    write_job,
)
from tests.fault_tolerance.nodes import Node, RayCluster
from tests.process_kill.run_assertions import RunReader, check_checkpoints, final_state, find_run, read_log, wait_for

WAIT_LIMIT_S = 300
"""For a machine with much else to do: it bounds hangs."""
NOTICED_PATTERN, RESUMED_PATTERN = "starting again|saving", "resuming after step|training to step"


@dataclass
class Scenario:
    """A job in a folder, and what it gives where nobody touches it."""

    folder: Path
    expected: Path
    count: int = 0

    @property
    def storage(self) -> Path:
        """The runs of the present test."""
        return self.folder / f"runs-{self.count}"

    def reset(self) -> None:
        """An empty storage, and steps that take their time."""
        self.count += 1
        self.storage.mkdir()
        (self.folder / HURRY_FILE).unlink(missing_ok=True)

    def speed_up(self) -> None:
        """From now on, steps as fast as they go."""
        (self.folder / HURRY_FILE).touch()

    @contextmanager
    def start_driver(self, cluster: RayCluster, *options: str) -> Iterator[DriverProcess]:
        """A driver whose run has made two checkpoints; the log is watched all the time."""
        self.reset()
        with RunReader(self.storage), running_driver(self.folder, self.storage, cluster, *options) as driver:
            wait_for(lambda: len(read_commits(self.storage)) > 1 or driver.is_over, WAIT_LIMIT_S, "checkpoints")
            assert not driver.is_over, driver.output
            yield driver

    @property
    def rank_0(self) -> int:
        """Process of the last attempt's rank 0."""
        return int(read_claims(self.storage)[-1]["facts"]["pid"])

    def find_node(self, cluster: RayCluster, *, of_rank_0: bool) -> Node:
        """The node that rank 0 runs on, or one of another rank."""
        nodes = [node for pid, node in cluster.workers().items() if (pid == self.rank_0) == of_rank_0]
        return nodes[0]

    def world_sizes(self) -> list[int]:
        """Of each attempt."""
        return [claim["facts"]["world_size"] for claim in read_claims(self.storage)]

    def check(self, run: Path | None = None, *, to_the_bit: bool = True) -> None:
        """The outcome is that of the untouched run: to the bit, or where the world changed its size to rounding."""
        run = run or find_run(self.storage)
        check_checkpoints(run)
        if to_the_bit:
            assert final_state(run) == final_state(self.expected)
            return
        actual, expected = read_log(run, "steps"), read_log(self.expected, "steps")
        assert actual["step"].to_pylist() == expected["step"].to_pylist()
        pairs = zip(actual["loss"].to_pylist(), expected["loss"].to_pylist(), strict=True)
        assert max(abs(one - other) for one, other in pairs) < 1e-9


def make_scenario(folder: Path, **job: Any) -> Scenario:
    """A new one."""
    write_job(folder, **job)
    return Scenario(folder, train_reference(folder, folder / "untouched"))


def wait_for_exit_code(scene: Scenario, driver: DriverProcess, limit_s: float = WAIT_LIMIT_S) -> int:
    """The exit code, after no more waiting."""
    scene.speed_up()
    return driver.wait_for_exit(limit_s)


def report_recovery(fault: str, driver: DriverProcess, since: float, noticed: str = NOTICED_PATTERN) -> None:
    """Wait until it trains again, and print in how many seconds."""
    seen = driver.wait_for(noticed, since, WAIT_LIMIT_S)
    again = driver.wait_for(RESUMED_PATTERN, since, WAIT_LIMIT_S)
    print(f"\n{fault}: noticed after {seen} s, training again after {again} s")


def monotonic_time() -> float:
    return time.monotonic()
