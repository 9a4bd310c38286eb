"""The driver: start workers with Ray Train, pass events and signals on, and start another attempt after a failure."""

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

from pipeline.cluster.connection import HEAD_TIMEOUT_S, HeadMonitor, ray_connection
from pipeline.cluster.event_channel import EventChannel, EventReceiver
from pipeline.cluster.failure_policy import RESUME_HINT, FailurePolicy, WorkerHang, summary_line
from pipeline.cluster.ray_internals import WORKER_HEALTH_CHECK_VARIABLE
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
"""Callbacks of Ray Train that are not needed here, see `_make_trainer`."""
UNLIMITED_TIMEOUT_S = 7 * 86400
"""The timeout of collectives and of Ray's health check where a job sets no `hang_s`."""

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
    """Train a run on Ray Train workers, with another attempt after each failure that the policy allows.

    Parameters
    ----------
    create_run: called once, as soon as it is certain that the cluster can hold the workers and that its nodes can read
        the storage; returns the spec of the workers, and the journal of the run.

    Raises
    ------
    InputError: the cluster cannot be reached, can never have the resources, or cannot read the storage.
    Interrupted: a signal asked the run to stop, and it is saved.
    WorkerLostError: more than `scale.retries` consecutive failures, or no resources for too long after one.
    RepeatedFailureError, OutOfMemoryError: another attempt would fail in the same way.
    TrainyardError: a worker raised it.
    """
    started: tuple[WorkerSpec, Journal, FailurePolicy] | None = None
    while True:
        with ray_connection(address, scale, on_event, verbose) as ray:
            placement = WorkerPlacement(lambda: cluster_resources(ray), scale)
            if started is None:
                try:
                    placement.check_feasible()
                    check_storage(ray, storage_url)
                except ray.exceptions.RayError as error:
                    fix = "run the same command again; if it fails again, see the dashboard's logs on the head"
                    raise ClusterError(summary_line(error), where=address or "Ray", fix=fix) from error
                spec, journal = create_run()
                started = spec, journal, FailurePolicy(spec.run_name, scale.retries, journal.read_highest_step)
            if _run_attempts(ray, placement, started, scale, on_event, signals):
                return


def _run_attempts(
    ray: Any,
    placement: WorkerPlacement,
    started: tuple[WorkerSpec, Journal, FailurePolicy],
    scale: ScalingConfig,
    on_event: EventHandler,
    signals: StopSignals,
) -> bool:
    """Run attempts. Returns True when the run is done, and False when a new connection is needed first."""
    from ray.train import TrainingFailedError

    spec, journal, policy = started
    while True:
        ended_attempt = journal.find_latest_attempt(spec.driver)
        try:
            workers = placement.wait_for_resources(signals, on_event, after_failure=policy.has_failed)
            attempt_spec = replace(spec, ended_attempt=ended_attempt)
            _run_attempt(ray, attempt_spec, workers, placement.per_worker, scale, on_event, signals)
            return True
        except Interrupted as interrupted:
            if signals.received:
                raise
            policy.decide_preemption()
            on_event(WarningMessage(f"{interrupted.what}; starting again"))
        except TrainyardError:
            raise
        except Exception as error:  # Ray reports failures of workers as errors of many types
            is_worker_failure = isinstance(error, (TrainingFailedError, WorkerHang))
            if not is_worker_failure:
                _check_head(spec.run_name)
            policy.decide(error, signals.received)
            on_event(WarningMessage(policy.describe(error)))
            if not is_worker_failure:
                # Ray Train does not recover from the loss of its own controller. The resources that it held are free
                # only when this driver's connection ends.
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
    """Run one attempt as a new Ray Train run.

    Raises
    ------
    WorkerHang: a worker made no progress and ended itself.
    Interrupted: the workers agreed to stop, and the run is saved.
    Exception: any other error that ended the attempt, as Ray reports it.
    """
    hang_reports: list[str] = []

    def handle(event: Event) -> None:
        if isinstance(event, HangReported):
            hang_reports.append(event.text)
        else:
            on_event(event)

    channel, ray_storage_dir = _start_event_channel(ray), tempfile.mkdtemp(prefix="trainyard-ray-")
    try:
        fit = _FitThread(_make_trainer(spec, channel, workers, resources, scale, ray_storage_dir))
        fit.start()
        with closing(HeadMonitor()) as head_monitor:
            receiver = EventReceiver(ray, channel, handle)
            _pump_events(ray, fit, channel, head_monitor, receiver, spec.run_name, on_event, signals)
    finally:
        ray.kill(channel)
        shutil.rmtree(ray_storage_dir, ignore_errors=True)
    if fit.error is not None:
        if hang_reports:
            raise WorkerHang(hang_reports[0]) from fit.error
        raise fit.error
    if "interrupted" in fit.returned:
        raise fit.returned["interrupted"]


def _start_event_channel(ray: Any) -> Any:
    """Start the `EventChannel` on the driver's node, so that it is not lost together with a worker's node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(EventChannel).options(scheduling_strategy=driver_node).remote()


def _make_trainer(
    spec: WorkerSpec,
    channel: Any,
    workers: int,
    resources: dict[str, float],
    scale: ScalingConfig,
    ray_storage_dir: str,
) -> Any:
    """Make Ray Train's trainer of one attempt. It does not restart anything: `FailurePolicy` decides about that.

    Parameters
    ----------
    resources: of each worker, such as {"CPU": 1}.
    ray_storage_dir: an empty folder for the files that Ray Train writes.
    """
    import ray.train
    import ray.train.torch

    from pipeline.cluster.torch_backend import WorkerTorchConfig

    train: Any = ray.train  # the annotations are those of Ray's older trainer

    class Trainer(train.torch.TorchTrainer):  # type: ignore[misc]
        """A trainer without two helper processes: one provides Ray datasets, which are not used here. The other frees
        the resources of a lost controller, as the end of our connection does, and without a dashboard it logs an error
        every second. In a version of Ray that lacks this hook, both are started."""

        def _create_default_callbacks(self) -> list[Any]:
            return [
                callback
                for callback in super()._create_default_callbacks()
                if type(callback).__name__ not in UNUSED_RAY_CALLBACKS
            ]

    limits = hang_limits(scale.hang_s) if scale.hang_s is not None else None
    collective_timeout_s = limits.collective_timeout_s if limits is not None else UNLIMITED_TIMEOUT_S
    # Ray Train's controller inherits this variable. Its health check detects a hang of a worker that is the only one.
    unresponsive_s = limits.unresponsive_s if limits is not None else UNLIMITED_TIMEOUT_S
    os.environ[WORKER_HEALTH_CHECK_VARIABLE] = str(unresponsive_s)
    on_gpu = "GPU" in resources
    return Trainer(
        train_function,
        train_loop_config={"spec": spec, "channel": channel},
        torch_config=WorkerTorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=int(collective_timeout_s)),
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=train.RunConfig(
            name=f"{spec.run_name}-{uuid.uuid4().hex[:8]}",
            storage_path=ray_storage_dir,
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


class _FitThread(threading.Thread):
    """Runs `trainer.fit()`, which blocks, so that the main thread can pass events and signals on meanwhile."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="trainyard-fit", daemon=True)
        self.error: BaseException | None = None
        self.returned: dict[str, Any] = {}
        """The result of rank 0's `train_function`."""
        self._trainer = trainer

    def run(self) -> None:
        try:
            self.returned = self._trainer.fit().return_value or {}
        except BaseException as error:  # raised by the main thread
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
    """Pass the workers' events on, and signals to stop to the workers, until `fit` is over.

    Raises
    ------
    WorkerLostError: the head of the cluster does not answer.
    """
    sent_signal = 0
    while fit.is_alive():
        fit.join(EVENT_INTERVAL_S)
        number = signals.received or (sent_signal or _preemption_signal(ray, channel, head_monitor, on_event))
        if number != sent_signal:
            sent_signal = number
            channel.request_stop.remote(sent_signal)
        receiver.drain()
        if head_monitor.last_seen_s > HEAD_TIMEOUT_S:
            raise _head_lost_error(run_name)
    for _ in range(2):  # the pending request, and one for the events since
        receiver.drain(timeout_s=5)


def _check_head(run_name: str) -> None:
    """Check that the cluster's head answers: then only Ray Train's controller was lost.

    Raises
    ------
    WorkerLostError: the head does not answer.
    """
    head_monitor = HeadMonitor()
    try:
        if not head_monitor.wait_for_response():
            raise _head_lost_error(run_name)
    finally:
        head_monitor.close()


def _head_lost_error(run_name: str) -> WorkerLostError:
    return WorkerLostError(
        f"the head of the cluster has not answered for {HEAD_TIMEOUT_S:.0f} s",
        where=run_name,
        fix=f"{RESUME_HINT}, once the cluster is back",
    )


def _preemption_signal(ray: Any, channel: Any, head_monitor: HeadMonitor, on_event: EventHandler) -> int:
    """Return SIGTERM if a worker's node is being drained, so that the workers save and stop in time; else 0."""
    if not head_monitor.draining_nodes:
        return 0
    try:
        worker_nodes = set(ray.get(channel.get_node_ids.remote(), timeout=5))
    except ray.exceptions.RayError:
        return 0
    draining = {node: deadline for node, deadline in head_monitor.draining_nodes.items() if node in worker_nodes}
    if not draining:
        return 0
    # By the cluster's clock, so only for the message.
    remaining_s = [deadline / 1000 - time.time() for deadline in draining.values() if deadline]
    within = f" within {max(0.0, min(remaining_s)):.0f} s" if remaining_s else ""
    on_event(WarningMessage(f"{len(draining)} of the workers' nodes will be removed{within}: saving"))
    return signal.SIGTERM
