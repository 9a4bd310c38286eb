"""A worker under Ray Train: its `WorkerContext`, and the function that Ray Train runs on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.cluster import signals
from pipeline.cluster.failure_policy import WorkerFailure
from pipeline.cluster.prometheus import PrometheusMetrics
from pipeline.context import PeerFailure, ProgressCounter, T, WorkerHeartbeat
from pipeline.errors import HungError, Interrupted, TrainyardError
from pipeline.events import Event, HangReported
from pipeline.redaction import redact_error
from pipeline.storage import credentials
from pipeline.watchdog import HEARTBEAT_TIMEOUT_S, blocking_on
from pipeline.worker import WorkerSpec, run_worker

EVENT_INTERVAL_S = 0.25
"""Seconds between two transfers of events to the driver."""
MIN_REPORT_INTERVAL_S = 10.0
"""The minimum of seconds between two calls of `ray.train.report`, which is a barrier."""


@contextmanager
def _translate_peer_failure() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise
        raise PeerFailure(f"a collective operation failed: {error}") from error


class RayTrainContext:
    """The `WorkerContext` of a Ray Train worker."""

    def __init__(self, channel: Any, run_name: str) -> None:
        import ray
        import ray.train

        train_context = ray.train.get_context()
        self.rank: int = train_context.get_world_rank()
        self.world_size: int = train_context.get_world_size()
        self.local_rank: int = train_context.get_local_rank()
        self.is_local = False
        self.owns_process = True
        self.progress = ProgressCounter()
        self._channel = channel
        self._prometheus = PrometheusMetrics(run_name, self.rank)
        self._sender = _EventSender(channel) if self.rank == 0 else None
        self._last_report_s = -MIN_REPORT_INTERVAL_S
        channel.register_worker.remote(self.rank, ray.get_runtime_context().get_node_id())

    @blocking_on("workers")
    def all_reduce(self, vector: Any) -> None:
        import torch.distributed as dist

        with _translate_peer_failure():
            dist.all_reduce(vector)

    @blocking_on("workers")
    def broadcast(self, value: T | None) -> T:
        import torch.distributed as dist

        values = [value]
        with _translate_peer_failure():
            dist.broadcast_object_list(values, src=0)
        assert values[0] is not None
        return values[0]

    def stop_signal(self) -> int:
        return signals.get_received_signal() or (self._sender.stop_signal if self._sender is not None else 0)

    def emit(self, event: Event) -> None:
        self._prometheus.update(event)
        if self._sender is not None:
            self._sender.send(event)

    @blocking_on("workers")
    def report(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Call `ray.train.report` at the end, or if the last call on rank 0 was more than `MIN_REPORT_INTERVAL_S`
        ago. All ranks take part."""
        import ray.train

        if self.broadcast(last or time.monotonic() - self._last_report_s > MIN_REPORT_INTERVAL_S):
            self._last_report_s = time.monotonic()
            ray.train.report(dict(metrics))

    def heartbeat(self, own: WorkerHeartbeat) -> Mapping[int, WorkerHeartbeat] | None:
        import ray

        try:
            request = self._channel.exchange_heartbeats.remote(self.rank, own.idle_s, own.blocked_on)
            heartbeats = ray.get(request, timeout=HEARTBEAT_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        return {rank: WorkerHeartbeat(*values) for rank, values in heartbeats.items()}

    def raise_in_main_thread(self, error: HungError) -> bool:
        return False  # training is not on the main thread; and the driver starts another attempt anyway

    def report_hang(self, error: HungError) -> None:
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self._channel.put_events.remote([HangReported(error.what)]), timeout=HEARTBEAT_TIMEOUT_S)

    def __enter__(self) -> RayTrainContext:
        return self

    def __exit__(self, *error: Any) -> None:
        self._prometheus.close()
        if self._sender is not None:
            self._sender.close()


class _EventSender:
    """Sends rank 0's events to the `EventChannel` in a thread, and receives the signal to stop."""

    def __init__(self, channel: Any) -> None:
        self.stop_signal = 0
        self._channel = channel
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainyard-event-sender", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        import ray

        closing = False
        while not closing:
            closing = self._closing.wait(EVENT_INTERVAL_S)
            with self._lock:
                events, self._events = self._events, []
            try:
                self.stop_signal = ray.get(self._channel.put_events.remote(events), timeout=30)
            except ray.exceptions.RayError:
                continue  # the driver is gone or slow: training goes on, these events are not shown


def train_function(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker. Ray Train runs it on each of them; rank 0's result is that of `trainer.fit()`.

    Parameters
    ----------
    config: `spec`, a WorkerSpec, and `channel`, the handle of the EventChannel.

    Returns
    -------
    `run`, `step` and `metrics` at the end of the run; or `interrupted`, if all ranks stopped because of a signal, which
    is not a failure.

    Raises
    ------
    TrainyardError: another attempt would fail in the same way.
    WorkerFailure: any other error.
    """
    spec: WorkerSpec = config["spec"]
    credentials.set_credentials(spec.environment)
    with RayTrainContext(config["channel"], spec.run_name) as context:
        try:
            position = run_worker(spec, context)
        except Interrupted as interrupted:
            return {"interrupted": interrupted}
        except TrainyardError as error:
            redact_error(error)  # Ray logs what is raised
            raise
        except Exception as error:
            raise WorkerFailure.from_error(error, context.rank) from None
    return {"run": spec.run_name, "step": position.step, "metrics": dict(position.metrics or {})}
