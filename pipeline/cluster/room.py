"""How many workers a cluster has room for, now and ever, and the wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.ray_internals import available_resources_per_node, max_cluster_resources
from pipeline.context import StopSignals
from pipeline.cpus import available_cpus
from pipeline.errors import InputError, Interrupted, WorkerLostError
from pipeline.events import EventHandler, Message, WarningMessage
from pipeline.job import Scale, WorkerRange

POLL_S = 1.0
"""Seconds between two looks at the cluster while waiting for room."""
SAY_S = 60.0
"""Seconds between two lines that say what is waited for."""
WAIT_RANGE_S = 60.0
WAIT_FIXED_S = 900.0
"""`scale.wait_s: auto`, for a range of workers and for a fixed number."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Seen:
    """One look at a cluster: what its nodes have, what is free of it, and what an autoscaler could make of it."""

    total: tuple[Resources, ...]
    free: tuple[Resources, ...]
    possible: Resources | None = None
    """None: no autoscaler, so what there is now."""


def fitting(nodes: Iterable[Resources], per_worker: Resources) -> int:
    """How many workers fit, each of them on one node."""
    return sum(int(min(node.get(name, 0) // amount for name, amount in per_worker.items())) for node in nodes)


def most_and_least(scale: Scale) -> tuple[int, int]:
    """The workers that are wanted, and those that will do."""
    workers = scale.workers
    return (workers.max, workers.min) if isinstance(workers, WorkerRange) else (workers, workers)


class Room:
    """Room for the workers of one job on one cluster.

    Parameters
    ----------
    look: gives the cluster as it is now.
    """

    def __init__(self, look: Callable[[], Seen], scale: Scale) -> None:
        self._look = look
        self._most, self._least = most_and_least(scale)
        waits = scale.wait_s
        self.wait_s = waits if waits != "auto" else WAIT_FIXED_S if self._most == self._least else WAIT_RANGE_S
        resources = look()
        with_gpus = any(node.get("GPU", 0) >= 1 for node in (*resources.total, resources.possible or {}))
        gpus = {"GPU": 1.0} if with_gpus and scale.device in ("auto", "cuda") else {}
        self.per_worker: dict[str, float] = {"CPU": float(scale.cpus_per_worker), **gpus}
        """What each worker takes: a GPU where the cluster has any and the job does not say cpu."""

    def check(self) -> None:
        """Whether the workers can ever start here.

        Raises
        ------
        InputError: the cluster can never hold so many.
        """
        resources = self._look()
        max_fitting = fitting(resources.total, self.per_worker)
        if resources.possible is not None:
            max_fitting = max(max_fitting, fitting([resources.possible], self.per_worker))
        if max_fitting < self._least:
            raise InputError(
                f"{self._least} workers of {words(self.per_worker)} each do not fit: the cluster has"
                f" {words(added(resources.total))} on {len(resources.total)} node{'s' * (len(resources.total) != 1)}, room for {max_fitting}",
                where="scale.workers",
                fix="ask for fewer workers or a smaller scale.cpus_per_worker",
            )

    def wait(self, signals: StopSignals, tell: EventHandler, *, after_loss: bool) -> int:
        """How many workers to start: as many as are wanted, once there is room for them.

        At the first start a busy cluster is waited for without a limit, and a range takes what is free. After a loss
        `scale.wait_s` pass before a range goes on with fewer, or a fixed number gives up.

        Raises
        ------
        Interrupted: a signal asked to stop.
        WorkerLostError: after the limit there is still no room.
        """
        began, last_message_time = time.monotonic(), -SAY_S
        while True:
            resources = self._look()
            free = min(fitting(resources.free, self.per_worker), self._most)
            can_grow = resources.possible is not None and fitting(resources.total, self.per_worker) < self._least
            if free == self._most or can_grow:  # an autoscaler adds nodes for workers that wait
                return self._most if free == self._most else self._least
            waited = time.monotonic() - began
            if free >= self._least and (not after_loss or waited >= self.wait_s):
                return free
            if after_loss and waited >= self.wait_s:
                raise WorkerLostError(
                    f"no room for {self._least} workers of {words(self.per_worker)} each after {waited:.0f} s:"
                    f" {words(added(resources.free))} free of {words(added(resources.total))}",
                    where="scale.workers",
                    fix="the same command goes on from the last checkpoint; scale.wait_s sets the limit",
                )
            if signals.received:
                raise Interrupted(
                    "stopped while waiting for room",
                    signal_number=signals.received,
                    fix="the same command goes on from the last checkpoint",
                )
            if waited >= 2 * POLL_S and time.monotonic() - last_message_time >= SAY_S:
                last_message_time = time.monotonic()
                limit = f" for up to {self.wait_s:.0f} s" if after_loss else ""
                tell(
                    Message(
                        f"waiting{limit} for room for {self._most} workers of {words(self.per_worker)} each:"
                        f" {words(added(resources.free))} free of {words(added(resources.total))}"
                    )
                )
            time.sleep(POLL_S)


def warn_of_few_cores(cpus: int, tell: EventHandler) -> None:
    """Say so where the workers of a cluster of this machine's own ask for more than it has."""
    cores = available_cpus()
    if cpus > cores:
        text = f"the workers ask for {cpus} CPUs, and this machine has {cores}: they share them"
        tell(WarningMessage(text))


def look_at(ray: Any, *, draining: Callable[[], Mapping[str, int]]) -> Seen:
    """The nodes that are alive and not about to go.

    Parameters
    ----------
    draining: ids of the nodes that are being drained.
    """
    draining_nodes = draining()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    usable_nodes = [node for node in nodes if node not in draining_nodes]
    free = available_resources_per_node()
    return Seen(
        total=tuple(nodes[node] for node in usable_nodes),
        free=tuple(free.get(node, {}) for node in usable_nodes),
        possible=max_cluster_resources(),
    )


def added(nodes: Iterable[Resources]) -> dict[str, float]:
    """What nodes have together."""
    return {name: sum(node.get(name, 0.0) for node in (*nodes,)) for name in ("CPU", "GPU")}


def words(resources: Resources) -> str:
    """`2 CPU, 1 GPU`"""
    parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join(parts) or "0 CPU"
