"""How many workers a cluster has room for, now and ever, and the wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.ray_internals import available_resources_per_node, max_cluster_resources
from pipeline.config import ScalingConfig, WorkerRange
from pipeline.context import StopSignals
from pipeline.cpus import available_cpus
from pipeline.errors import InputError, Interrupted, WorkerLostError
from pipeline.events import EventHandler, Message, WarningMessage

POLL_S = 1.0
"""Seconds between two looks at the cluster while waiting for room."""
MESSAGE_INTERVAL_S = 60.0
"""Seconds between two lines that say what is waited for."""
WAIT_RANGE_S = 60.0
WAIT_FIXED_S = 900.0
"""`scale.wait_s: auto`, for a range of workers and for a fixed number."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class ClusterResources:
    """One look at a cluster: what its nodes have, what is free of it, and what an autoscaler could make of it."""

    total: tuple[Resources, ...]
    free: tuple[Resources, ...]
    autoscaler_max: Resources | None = None
    """None: no autoscaler, so what there is now."""


def workers_that_fit(nodes: Iterable[Resources], per_worker: Resources) -> int:
    """How many workers fit, each of them on one node."""
    return sum(int(min(node.get(name, 0) // amount for name, amount in per_worker.items())) for node in nodes)


def worker_bounds(scale: ScalingConfig) -> tuple[int, int]:
    """The workers that are wanted, and those that will do."""
    workers = scale.workers
    return (workers.max, workers.min) if isinstance(workers, WorkerRange) else (workers, workers)


class WorkerPlacement:
    """Room for the workers of one job on one cluster.

    Parameters
    ----------
    look: gives the cluster as it is now.
    """

    def __init__(self, get_resources: Callable[[], ClusterResources], scale: ScalingConfig) -> None:
        self._get_resources = get_resources
        self._max_workers, self._min_workers = worker_bounds(scale)
        waits = scale.wait_s
        self.wait_s = (
            waits if waits != "auto" else WAIT_FIXED_S if self._max_workers == self._min_workers else WAIT_RANGE_S
        )
        resources = get_resources()
        with_gpus = any(node.get("GPU", 0) >= 1 for node in (*resources.total, resources.autoscaler_max or {}))
        gpus = {"GPU": 1.0} if with_gpus and scale.device in ("auto", "cuda") else {}
        self.per_worker: dict[str, float] = {"CPU": float(scale.cpus_per_worker), **gpus}
        """What each worker takes: a GPU where the cluster has any and the job does not say cpu."""

    def check_feasible(self) -> None:
        """Whether the workers can ever start here.

        Raises
        ------
        InputError: the cluster can never hold so many.
        """
        resources = self._get_resources()
        max_fitting = workers_that_fit(resources.total, self.per_worker)
        if resources.autoscaler_max is not None:
            max_fitting = max(max_fitting, workers_that_fit([resources.autoscaler_max], self.per_worker))
        if max_fitting < self._min_workers:
            raise InputError(
                f"{self._min_workers} workers of {format_resources(self.per_worker)} each do not fit: the cluster has"
                f" {format_resources(sum_resources(resources.total))} on {len(resources.total)} "
                f"node{'s' * (len(resources.total) != 1)}, room for {max_fitting}",
                where="scale.workers",
                fix="ask for fewer workers or a smaller scale.cpus_per_worker",
            )

    def wait_for_resources(self, signals: StopSignals, emit: EventHandler, *, after_failure: bool) -> int:
        """How many workers to start: as many as are wanted, once there is room for them.

        At the first start a busy cluster is waited for without a limit, and a range takes what is free. After a loss
        `scale.wait_s` pass before a range goes on with fewer, or a fixed number gives up.

        Raises
        ------
        Interrupted: a signal asked to stop.
        WorkerLostError: after the limit there is still no room.
        """
        began, last_message_time = time.monotonic(), -MESSAGE_INTERVAL_S
        while True:
            resources = self._get_resources()
            free = min(workers_that_fit(resources.free, self.per_worker), self._max_workers)
            can_grow = (
                resources.autoscaler_max is not None
                and workers_that_fit(resources.total, self.per_worker) < self._min_workers
            )
            if free == self._max_workers or can_grow:  # an autoscaler adds nodes for workers that wait
                return self._max_workers if free == self._max_workers else self._min_workers
            waited = time.monotonic() - began
            if free >= self._min_workers and (not after_failure or waited >= self.wait_s):
                return free
            if after_failure and waited >= self.wait_s:
                raise WorkerLostError(
                    f"no room for {self._min_workers} workers of {format_resources(self.per_worker)} each after "
                    f"{waited:.0f} s:"
                    f" {format_resources(sum_resources(resources.free))} free of "
                    f"{format_resources(sum_resources(resources.total))}",
                    where="scale.workers",
                    fix="the same command goes on from the last checkpoint; scale.wait_s sets the limit",
                )
            if signals.received:
                raise Interrupted(
                    "stopped while waiting for room",
                    signal_number=signals.received,
                    fix="the same command goes on from the last checkpoint",
                )
            if waited >= 2 * POLL_S and time.monotonic() - last_message_time >= MESSAGE_INTERVAL_S:
                last_message_time = time.monotonic()
                limit = f" for up to {self.wait_s:.0f} s" if after_failure else ""
                emit(
                    Message(
                        f"waiting{limit} for room for {self._max_workers} workers of "
                        f"{format_resources(self.per_worker)} each:"
                        f" {format_resources(sum_resources(resources.free))} free of "
                        f"{format_resources(sum_resources(resources.total))}"
                    )
                )
            time.sleep(POLL_S)


def warn_if_oversubscribed(num_cpus: int, emit: EventHandler) -> None:
    """Say so where the workers of a cluster of this machine's own ask for more than it has."""
    cores = available_cpus()
    if num_cpus > cores:
        text = f"the workers ask for {num_cpus} CPUs, and this machine has {cores}: they share them"
        emit(WarningMessage(text))


def cluster_resources(ray: Any, *, get_draining_nodes: Callable[[], Mapping[str, int]]) -> ClusterResources:
    """The nodes that are alive and not about to go.

    Parameters
    ----------
    draining: ids of the nodes that are being drained.
    """
    draining_nodes = get_draining_nodes()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    usable_nodes = [node for node in nodes if node not in draining_nodes]
    free = available_resources_per_node()
    return ClusterResources(
        total=tuple(nodes[node] for node in usable_nodes),
        free=tuple(free.get(node, {}) for node in usable_nodes),
        autoscaler_max=max_cluster_resources(),
    )


def sum_resources(nodes: Iterable[Resources]) -> dict[str, float]:
    """What nodes have together."""
    return {name: sum(node.get(name, 0.0) for node in (*nodes,)) for name in ("CPU", "GPU")}


def format_resources(resources: Resources) -> str:
    """`2 CPU, 1 GPU`"""
    parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join(parts) or "0 CPU"
