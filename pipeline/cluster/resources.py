"""The resources of a cluster: how many workers fit now and at most, and the wait until they fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.failure_policy import RESUME_HINT
from pipeline.cluster.ray_internals import available_resources_per_node, draining_nodes, max_cluster_resources
from pipeline.config import ScalingConfig, WorkerRange
from pipeline.context import StopSignals
from pipeline.cpus import available_cpus
from pipeline.errors import InputError, Interrupted, WorkerLostError
from pipeline.events import EventHandler, Message, WarningMessage

POLL_S = 1.0
"""Seconds between two checks while waiting for resources."""
MESSAGE_INTERVAL_S = 60.0
"""Seconds between two messages while waiting."""
WAIT_RANGE_S = 60.0
WAIT_FIXED_S = 900.0
"""What `scale.wait_s: auto` means for a range of workers and for a fixed number."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class ClusterResources:
    """The resources of a cluster's nodes, by node, at one moment."""

    total: tuple[Resources, ...]
    free: tuple[Resources, ...]
    autoscaler_max: Resources | None = None
    """What an autoscaler can provide in all; None if there is no autoscaler."""


def workers_that_fit(nodes: Iterable[Resources], per_worker: Resources) -> int:
    """Return how many workers fit. All resources of a worker are on one node."""
    return sum(int(min(node.get(name, 0) // amount for name, amount in per_worker.items())) for node in nodes)


def worker_bounds(scale: ScalingConfig) -> tuple[int, int]:
    """Return the preferred and the minimum number of workers."""
    workers = scale.workers
    return (workers.max, workers.min) if isinstance(workers, WorkerRange) else (workers, workers)


class WorkerPlacement:
    """Decides how many workers of a job can start on a cluster.

    Parameters
    ----------
    get_resources: returns the cluster's current resources.
    """

    def __init__(self, get_resources: Callable[[], ClusterResources], scale: ScalingConfig) -> None:
        self._get_resources = get_resources
        self._max_workers, self._min_workers = worker_bounds(scale)
        is_range = self._max_workers != self._min_workers
        default_wait_s = WAIT_RANGE_S if is_range else WAIT_FIXED_S
        self.wait_s = scale.wait_s if scale.wait_s != "auto" else default_wait_s
        resources = get_resources()
        with_gpus = any(node.get("GPU", 0) >= 1 for node in (*resources.total, resources.autoscaler_max or {}))
        gpus = {"GPU": 1.0} if with_gpus and scale.device in ("auto", "cuda") else {}
        self.per_worker: dict[str, float] = {"CPU": float(scale.cpus_per_worker), **gpus}
        """The resources of each worker. A GPU is among them if the cluster has any and `scale.device` is not cpu."""

    def check_feasible(self) -> None:
        """Check that the workers can start on this cluster, now or later.

        Raises
        ------
        InputError: the cluster can never hold the minimum number of workers.
        """
        resources = self._get_resources()
        max_fitting = workers_that_fit(resources.total, self.per_worker)
        if resources.autoscaler_max is not None:
            max_fitting = max(max_fitting, workers_that_fit([resources.autoscaler_max], self.per_worker))
        if max_fitting < self._min_workers:
            raise InputError(
                f"{self._min_workers} workers of {format_resources(self.per_worker)} each do not fit: the cluster has"
                f" {format_resources(sum_resources(resources.total))} on {len(resources.total)} "
                f"node{'s' * (len(resources.total) != 1)}, enough for {max_fitting}",
                where="scale.workers",
                fix="use fewer workers or a smaller scale.cpus_per_worker",
            )

    def wait_for_resources(self, signals: StopSignals, emit: EventHandler, *, after_failure: bool) -> int:
        """Wait until workers can start, and return how many.

        For the first attempt there is no limit to the wait, and a range starts with as many workers as fit at once.
        After a failure a range waits for `wait_s` before it continues with fewer workers, and a fixed number gives up
        then.

        Raises
        ------
        Interrupted: a signal asked the run to stop.
        WorkerLostError: the resources are not free after `wait_s`.
        """
        start_time, last_message_time = time.monotonic(), -MESSAGE_INTERVAL_S
        while True:
            resources = self._get_resources()
            free = min(workers_that_fit(resources.free, self.per_worker), self._max_workers)
            can_grow = (
                resources.autoscaler_max is not None
                and workers_that_fit(resources.total, self.per_worker) < self._min_workers
            )
            if free == self._max_workers or can_grow:  # an autoscaler adds nodes for pending workers
                return self._max_workers if free == self._max_workers else self._min_workers
            waited = time.monotonic() - start_time
            if free >= self._min_workers and (not after_failure or waited >= self.wait_s):
                return free
            if after_failure and waited >= self.wait_s:
                raise WorkerLostError(
                    f"no resources for {self._min_workers} workers of {format_resources(self.per_worker)} each after "
                    f"{waited:.0f} s:"
                    f" {format_resources(sum_resources(resources.free))} free of "
                    f"{format_resources(sum_resources(resources.total))}",
                    where="scale.workers",
                    fix=f"{RESUME_HINT}; scale.wait_s sets the limit",
                )
            if signals.received:
                raise Interrupted(
                    "stopped while waiting for resources", signal_number=signals.received, fix=RESUME_HINT
                )
            if waited >= 2 * POLL_S and time.monotonic() - last_message_time >= MESSAGE_INTERVAL_S:
                last_message_time = time.monotonic()
                limit = f" for up to {self.wait_s:.0f} s" if after_failure else ""
                emit(
                    Message(
                        f"waiting{limit} for resources for {self._max_workers} workers of "
                        f"{format_resources(self.per_worker)} each:"
                        f" {format_resources(sum_resources(resources.free))} free of "
                        f"{format_resources(sum_resources(resources.total))}"
                    )
                )
            time.sleep(POLL_S)


def warn_if_oversubscribed(num_cpus: int, emit: EventHandler) -> None:
    """Warn if the workers of a cluster on this machine need more CPUs than it has."""
    cores = available_cpus()
    if num_cpus > cores:
        text = f"the workers request {num_cpus} CPUs, and this machine has {cores}: they share them"
        emit(WarningMessage(text))


def cluster_resources(ray: Any) -> ClusterResources:
    """Return the resources of the nodes that are alive and not being drained."""
    draining = draining_nodes()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    usable_nodes = [node for node in nodes if node not in draining]
    free = available_resources_per_node()
    return ClusterResources(
        total=tuple(nodes[node] for node in usable_nodes),
        free=tuple(free.get(node, {}) for node in usable_nodes),
        autoscaler_max=max_cluster_resources(),
    )


def sum_resources(nodes: Iterable[Resources]) -> dict[str, float]:
    """Return the total of some nodes."""
    return {name: sum(node.get(name, 0.0) for node in (*nodes,)) for name in ("CPU", "GPU")}


def format_resources(resources: Resources) -> str:
    """Format resources as `2 CPU, 1 GPU`."""
    parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join(parts) or "0 CPU"
