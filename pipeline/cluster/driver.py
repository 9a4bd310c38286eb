"""The driver's side of Ray: start workers, carry events and signals, and start again after a loss."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from pipeline.cluster.connection import HEAD_TIMEOUT_S, HeadMonitor, get_draining_nodes, ray_connection
from pipeline.cluster.event_channel import EventChannel, EventReceiver
from pipeline.cluster.failure_policy import RESUME_HINT, FailurePolicy, WorkerHang, summary_line
from pipeline.cluster.resources import WorkerPlacement, cluster_resources
from pipeline.cluster.storage_check import check_storage
from pipeline.cluster.worker_context import EVENT_INTERVAL_S, train_function
from pipeline.config import ScalingConfig
from pipeline.context import StopSignals
from pipeline.errors import ClusterError, Interrupted, TrainyardError, WorkerLostError
from pipeline.events import Event, EventHandler, HangReported, WarningMessage
from pipeline.runs.journal.journal import Journal
from pipeline.worker import WorkerSpec, hang_limits

UNUSED_RAY_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Of Ray Train's own."""
UNLIMITED_TIMEOUT_S = 7 * 86400
"""After which a sum over ranks fails by itself, where workers may hang for as long as they like."""

CreateRunFn = Callable[[], tuple[WorkerSpec, Journal]]


def train_on_workers(
    create_run: CreateRunFn,
    scale: ScalingConfig,
    on_event: EventHandler,
    signals: StopSignals,
    *,
    storage_url: str,
    address: str | None = None,
    verbose: bool = False,
) -> None:
    """Run an order on Ray Train workers until it is done, restarting after lost workers.

    Parameters
    ----------
    ready: called once, when it is certain that the cluster can hold the workers and sees the storage; gives the order,
        and the journal of its run.

    Raises
    ------
    InputError: a cluster that cannot be reached, will never have the resources, or does not see the storage.
    Interrupted: a signal asked to stop, and the run is saved.
    WorkerLostError: more losses in a row than `scale.retries`, or no room for long after one.
    RepeatedFailureError, OutOfMemoryError: what a new start would not make good.
    TrainyardError: what a worker raised.
    """
    begun: tuple[WorkerSpec, Journal, FailurePolicy] | None = None
    while True:
        with ray_connection(address, scale, on_event, verbose) as ray:
            room = WorkerPlacement(lambda: cluster_resources(ray, get_draining_nodes=get_draining_nodes), scale)
            if begun is None:
                try:
                    room.check_feasible()
                    check_storage(ray, storage_url)
                except ray.exceptions.RayError as error:
                    fix = "the same command again; see the dashboard's logs on the head if it repeats itself"
                    raise ClusterError(summary_line(error), where=address or "Ray", fix=fix) from error
                order, journal = create_run()
                begun = order, journal, FailurePolicy(order.run_name, scale.retries, journal.read_highest_step)
            if _run_attempts(ray, room, begun, scale, on_event, signals):
                return


def _run_attempts(
    ray: Any,
    room: WorkerPlacement,
    begun: tuple[WorkerSpec, Journal, FailurePolicy],
    scale: ScalingConfig,
    on_event: EventHandler,
    signals: StopSignals,
) -> bool:
    """Run attempts until the run is done (True), or until only a new connection helps (False)."""
    from ray.train import TrainingFailedError

    order, journal, losses = begun
    while True:
        dead = journal.find_latest_attempt(order.driver)
        try:
            workers = room.wait_for_resources(signals, on_event, after_failure=losses.has_failed)
            _run_attempt(ray, replace(order, ended_attempt=dead), workers, room.per_worker, scale, on_event, signals)
            return True
        except Interrupted as interrupted:
            if signals.received:
                raise
            losses.decide_preemption()
            on_event(WarningMessage(f"{interrupted.what}; starting again"))
        except TrainyardError:
            raise
        except Exception as error:  # whatever form Ray gives to a worker failure
            is_workers = isinstance(error, (TrainingFailedError, WorkerHang))
            if not is_workers:
                _check_head(order.run_name)
            losses.decide(error, signals.received)
            on_event(WarningMessage(losses.describe(error)))
            if not is_workers:
                # Ray Train recovers nothing from the loss of its own controller, which leaves resources taken until
                # this driver's connection ends.
                return False


def _run_attempt(
    ray: Any,
    spec: WorkerSpec,
    workers: int,
    resources: dict[str, float],
    scale: ScalingConfig,
    on_event: EventHandler,
    signals: StopSignals,
) -> None:
    """Run one attempt as a fresh Ray Train run.

    Raises
    ------
    WorkerHung: a worker made no progress and ended itself.
    Interrupted: the workers agreed to stop, and the run is saved.
    Exception: what else ended the attempt, as Ray gives it.
    """
    hang_reports: list[str] = []

    def handle(event: Event) -> None:
        if isinstance(event, HangReported):
            hang_reports.append(event.text)
        else:
            on_event(event)

    desk, own_files = _start_event_channel(ray), tempfile.mkdtemp(prefix="trainyard-ray-")
    try:
        fit = _FitThread(_make_trainer(spec, desk, workers, resources, scale, own_files))
        fit.start()
        with closing(HeadMonitor()) as watch:
            _pump_events(ray, fit, desk, watch, EventReceiver(ray, desk, handle), spec.run_name, on_event, signals)
    finally:
        ray.kill(desk)
        shutil.rmtree(own_files, ignore_errors=True)
    if fit.error is not None:
        if hang_reports:
            raise WorkerHang(hang_reports[0]) from fit.error
        raise fit.error
    if "interrupted" in fit.returned:
        raise fit.returned["interrupted"]


def _start_event_channel(ray: Any) -> Any:
    """The actor between this driver and rank 0, on the driver's node: it must not be lost with a worker's."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(EventChannel).options(scheduling_strategy=here).remote()


def _make_trainer(
    spec: WorkerSpec,
    channel: Any,
    workers: int,
    resources: dict[str, float],
    scale: ScalingConfig,
    ray_storage_dir: str,
) -> Any:
    """Ray Train's trainer of one attempt. It restarts nothing by itself: which failures are worth another attempt is
    decided here (`Losses`).

    Parameters
    ----------
    resources: of each worker, such as {"CPU": 1}.
    own_files: an empty folder for what Ray Train writes.
    """
    import ray.train
    import ray.train.torch

    from pipeline.cluster.torch_backend import WorkerTorchConfig

    train: Any = ray.train  # Ray's annotations here are those of its older trainer

    class Trainer(train.torch.TorchTrainer):  # type: ignore[misc]
        """Without two helper processes that have no work here: one hands out Ray datasets, the other frees what a lost
        controller held (as the end of our connection does) and needs the dashboard for it, or complains each second.
        Where a version of Ray has no such hook, both just start."""

        def _create_default_callbacks(self) -> list[Any]:
            return [
                one for one in super()._create_default_callbacks() if type(one).__name__ not in UNUSED_RAY_CALLBACKS
            ]

    limits = hang_limits(scale.hang_s) if scale.hang_s is not None else None
    collective_timeout_s = limits.collective_timeout_s if limits is not None else UNLIMITED_TIMEOUT_S
    # Read by the controller, which starts with this: a worker without another that could notice that it is stopped.
    unanswered_s = limits.unresponsive_s if limits is not None else UNLIMITED_TIMEOUT_S
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(unanswered_s)
    on_gpu = "GPU" in resources
    return Trainer(
        train_function,
        train_loop_config={"order": spec, "desk": channel},
        torch_config=WorkerTorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=int(collective_timeout_s)),
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=train.RunConfig(
            name=f"{spec.run_name}-{uuid.uuid4().hex[:8]}",
            storage_path=ray_storage_dir,
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


class _FitThread(threading.Thread):
    """Runs `trainer.fit()`, which blocks, so that the main thread can carry events and signals meanwhile."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="trainyard-fit", daemon=True)
        self.error: BaseException | None = None
        self.returned: dict[str, Any] = {}
        """What rank 0's `train_function` returned."""
        self._trainer = trainer

    def run(self) -> None:
        try:
            self.returned = self._trainer.fit().return_value or {}
        except BaseException as error:  # carried to the waiting thread, which raises it
            self.error = error


def _pump_events(
    ray: Any,
    fit: _FitThread,
    channel: Any,
    head_monitor: HeadMonitor,
    receiver: EventReceiver,
    run_name: str,
    on_event: EventHandler,
    signals: StopSignals,
) -> None:
    """Pass events from the workers on, and signals to stop to them, until `fit` is over.

    Raises
    ------
    WorkerLostError: the head of the cluster does not answer.
    """
    sent = 0
    while fit.is_alive():
        fit.join(EVENT_INTERVAL_S)
        number = signals.received or (sent or _preemption_signal(ray, channel, head_monitor, on_event))
        if number != sent:
            sent = number
            channel.request_stop.remote(sent)
        receiver.drain()
        if head_monitor.last_seen_s > HEAD_TIMEOUT_S:
            raise _head_lost_error(run_name)
    for _ in range(2):  # an answer that is under way, and what came since
        receiver.drain(timeout_s=5)


def _check_head(run_name: str) -> None:
    """Whether it was the controller alone that was lost, and not the cluster's head.

    Raises
    ------
    WorkerLostError: the head does not answer.
    """
    watch = HeadMonitor()
    try:
        if not watch.wait_for_response():
            raise _head_lost_error(run_name)
    finally:
        watch.close()


def _head_lost_error(run_name: str) -> WorkerLostError:
    return WorkerLostError(
        f"the head of the cluster has not answered for {HEAD_TIMEOUT_S:.0f} s",
        where=run_name,
        fix=f"{RESUME_HINT}, once the cluster is back",
    )


def _preemption_signal(ray: Any, channel: Any, head_monitor: HeadMonitor, on_event: EventHandler) -> int:
    """SIGTERM where a node of ours is being drained: the workers are to save and leave before it goes. Else 0."""
    if not head_monitor.draining_nodes:
        return 0
    try:
        ours = set(ray.get(channel.get_node_ids.remote(), timeout=5))
    except ray.exceptions.RayError:
        return 0
    leaving = {node: gone for node, gone in head_monitor.draining_nodes.items() if node in ours}
    if not leaving:
        return 0
    known = [gone / 1000 - time.time() for gone in leaving.values() if gone]  # the cluster's clock, for people only
    until = f" within {max(0.0, min(known)):.0f} s" if known else ""
    on_event(WarningMessage(f"{len(leaving)} of the workers' nodes will be gone{until}: saving"))
    return signal.SIGTERM
