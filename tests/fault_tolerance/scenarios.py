"""What the fault tests have in common: a folder with a job, its reference run, and the times of a recovery."""

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
"""Timeout for anything that is waited for. It is long, as the machine may be busy."""
NOTICED_PATTERN, RESUMED_PATTERN = "starting again|saving", "resuming after step|training to step"


@dataclass
class Scenario:
    """A job in a folder, and its reference run."""

    folder: Path
    expected: Path
    """The reference run."""
    count: int = 0
    """How many storage folders were made."""

    @property
    def storage(self) -> Path:
        """The storage of the current test."""
        return self.folder / f"runs-{self.count}"

    def reset(self) -> None:
        """Make a new, empty storage, and have steps pause."""
        self.count += 1
        self.storage.mkdir()
        (self.folder / HURRY_FILE).unlink(missing_ok=True)

    def speed_up(self) -> None:
        """Have steps not pause any more."""
        (self.folder / HURRY_FILE).touch()

    @contextmanager
    def start_driver(self, cluster: RayCluster, *options: str) -> Iterator[DriverProcess]:
        """Start a driver and wait until its run has two checkpoints. A `RunReader` reads the run all the time."""
        self.reset()
        with RunReader(self.storage), running_driver(self.folder, self.storage, cluster, *options) as driver:
            wait_for(lambda: len(read_commits(self.storage)) > 1 or driver.is_over, WAIT_LIMIT_S, "checkpoints")
            assert not driver.is_over, driver.output
            yield driver

    @property
    def rank_0(self) -> int:
        """The process id of the latest attempt's rank 0."""
        return int(read_claims(self.storage)[-1]["facts"]["pid"])

    def find_node(self, cluster: RayCluster, *, of_rank_0: bool) -> Node:
        """Return the node of rank 0, or one of another rank."""
        nodes = [node for pid, node in cluster.workers().items() if (pid == self.rank_0) == of_rank_0]
        return nodes[0]

    def world_sizes(self) -> list[int]:
        """Return the world size of each attempt."""
        return [claim["facts"]["world_size"] for claim in read_claims(self.storage)]

    def check(self, run: Path | None = None, *, bit_identical: bool = True) -> None:
        """Check that the run matches the reference run: bit for bit, or up to rounding if the world size changed."""
        run = run or find_run(self.storage)
        check_checkpoints(run)
        if bit_identical:
            assert final_state(run) == final_state(self.expected)
            return
        actual, expected = read_log(run, "steps"), read_log(self.expected, "steps")
        assert actual["step"].to_pylist() == expected["step"].to_pylist()
        pairs = zip(actual["loss"].to_pylist(), expected["loss"].to_pylist(), strict=True)
        assert max(abs(loss - expected_loss) for loss, expected_loss in pairs) < 1e-9


def make_scenario(folder: Path, **job: Any) -> Scenario:
    """Write a job to a folder and train its reference run."""
    write_job(folder, **job)
    return Scenario(folder, train_reference(folder, folder / "reference"))


def wait_for_exit_code(scenario: Scenario, driver: DriverProcess, limit_s: float = WAIT_LIMIT_S) -> int:
    """Have steps not pause any more, wait for the driver's end, and return its exit code."""
    scenario.speed_up()
    return driver.wait_for_exit(limit_s)


def report_recovery(fault: str, driver: DriverProcess, since: float, noticed: str = NOTICED_PATTERN) -> None:
    """Wait until training continues, and print after how many seconds."""
    noticed_s = driver.wait_for(noticed, since, WAIT_LIMIT_S)
    resumed_s = driver.wait_for(RESUMED_PATTERN, since, WAIT_LIMIT_S)
    print(f"\n{fault}: noticed after {noticed_s} s, training again after {resumed_s} s")


def monotonic_time() -> float:
    return time.monotonic()
