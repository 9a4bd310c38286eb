"""The driver's side of Ray: connect, start workers, carry events and signals, and start again after a loss."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from pipeline.cluster.context import PULSE_S, train_function
from pipeline.cluster.desk import Desk
from pipeline.cluster.losses import Losses, first_line
from pipeline.context import StopSignals, Tell
from pipeline.errors import InputError, TrainyardError
from pipeline.job import Scale, WorkerRange
from pipeline.worker import Order

RAY_ENVIRONMENT = {
    # Of a cluster started here. Ray's default, 15, leaves the processor to whatever else runs on the machine.
    "RAY_worker_niceness": "0",
    # The controller's poll: report() and the end of a run wait for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Costs start-up time and is not used.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Silences a warning about workers without GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

IDLE_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Of Ray Train's own."""

COLLECTIVE_TIMEOUT_S = 300
"""Seconds after which a sum over ranks that never ends fails."""


def train_on_workers(
    order: Order,
    scale: Scale,
    tell: Tell,
    signals: StopSignals,
    *,
    dead_attempt: Callable[[str], int | None],
    highest_step: Callable[[], int],
    address: str | None = None,
    verbose: bool = False,
) -> None:
    """Run an order on Ray Train workers until it is done, restarting after lost workers.

    Parameters
    ----------
    dead_attempt: given this driver's nonce, the number of its latest attempt or None.
    highest_step: the latest committed step: progress between two failures starts the count of retries anew.

    Raises
    ------
    InputError: a cluster that cannot be reached or will never have the resources.
    Interrupted: a signal asked to stop, and the run is saved.
    WorkerLostError: more losses in a row than `scale.retries`.
    TrainyardError: what a worker raised.
    """
    losses = Losses(order.run_name, scale.retries, highest_step)
    while True:
        with _connected(address, scale, verbose) as ray:
            workers, resources = _workers_and_resources(ray, scale)
            while True:
                try:
                    return _run_once(ray, order, workers, resources, tell, signals)
                except TrainyardError:
                    raise
                except Exception as error:  # whatever form Ray gives to a loss
                    losses.take(error, signals.received)
                    order = replace(order, dead_attempt=dead_attempt(order.driver))
                    tell({"kind": "warning", "text": losses.words(error)})
                    if not isinstance(error, ray.train.TrainingFailedError):
                        # Ray Train recovers nothing from the loss of its own controller, which leaves resources taken
                        # until this driver's connection ends.
                        break


def _run_once(
    cluster: Any, order: Order, workers: int, resources: dict[str, float], tell: Tell, signals: StopSignals
) -> None:
    """One attempt: one fresh Ray run, in a thread of its own so that this one can carry events and signals."""
    import ray.train
    import ray.train.torch

    train: Any = ray.train  # Ray's annotations here are those of its older trainer

    class Trainer(train.torch.TorchTrainer):  # type: ignore[misc]
        """Without two helper processes that have no work here: one hands out Ray datasets, the other frees what a lost
        controller held (as the end of our connection does) and needs the dashboard for it, or complains each second.
        Where a version of Ray has no such hook, both just start."""

        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in IDLE_CALLBACKS]

    on_gpu = "GPU" in resources
    desk = cluster.remote(num_cpus=0)(Desk).remote()
    own_files = tempfile.mkdtemp(prefix="trainyard-ray-")
    trainer = Trainer(
        train_function,
        train_loop_config={"order": order, "desk": desk},
        torch_config=train.torch.TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=train.RunConfig(
            name=f"{order.run_name}-{uuid.uuid4().hex[:8]}",
            storage_path=own_files,
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # carried to the waiting thread, which raises it
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="trainyard-fit", daemon=True)
    thread.start()
    told = 0
    try:
        while thread.is_alive():
            thread.join(PULSE_S)
            if signals.received and not told:
                told = signals.received
                desk.stop.remote(told)
            _pass_on(cluster, desk, tell)
        _pass_on(cluster, desk, tell)
    finally:
        cluster.kill(desk)
        shutil.rmtree(own_files, ignore_errors=True)
    if "error" in outcome:
        raise outcome["error"]
    returned = outcome["result"].return_value or {}
    if "interrupted" in returned:
        raise returned["interrupted"]


def _pass_on(ray: Any, desk: Any, tell: Tell) -> None:
    try:
        for event in ray.get(desk.take.remote(), timeout=5):
            tell(event)
    except ray.exceptions.RayError:
        return  # progress is for the eye: fit() itself says what is wrong


@contextmanager
def _connected(address: str | None, scale: Scale, verbose: bool) -> Iterator[Any]:
    """Ray, connected: to `address`, to the cluster this process already has, or to a new one of this machine's."""
    os.environ.update({name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "error"}
    try:
        if address is None:
            cpus = math.ceil(_wanted(scale) * scale.cpus_per_worker)  # Ray starts a process for each of them at once
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            first_line(error), where=address or "a local Ray cluster", fix="see --address and RAY_ADDRESS"
        ) from None
    try:
        with nullcontext() if verbose else _without_raylets_lines():
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def _without_raylets_lines() -> Iterator[None]:
    """Ray writes a raylet's complaint about each lost worker to standard output, whatever `log_to_driver` says."""
    from ray._private import worker

    before = getattr(worker, "print_to_stdstream", None)
    if before is None:  # another version of Ray
        yield
        return
    worker.print_to_stdstream = lambda *_args, **_named: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


def _wanted(scale: Scale) -> int:
    return scale.workers.max if isinstance(scale.workers, WorkerRange) else scale.workers


def _workers_and_resources(ray: Any, scale: Scale) -> tuple[int, dict[str, float]]:
    """How many workers, and what each takes: a GPU where the cluster has any and the job does not say cpu.

    Raises
    ------
    InputError: the cluster as it is can never hold so many.
    """
    have = ray.cluster_resources()
    per_worker = {"CPU": float(scale.cpus_per_worker)}
    if have.get("GPU", 0) >= 1 and scale.device in ("auto", "cuda"):
        per_worker["GPU"] = 1.0
    fitting = int(min(have.get(name, 0) // amount for name, amount in per_worker.items()))
    least = scale.workers.min if isinstance(scale.workers, WorkerRange) else scale.workers
    if fitting < least:
        raise InputError(
            f"{least} workers of {_list(per_worker)} do not fit: the cluster has {_list(have)}, room for {fitting}",
            where="scale.workers",
            fix="ask for fewer workers or a smaller scale.cpus_per_worker",
        )
    return min(fitting, _wanted(scale)), per_worker


def _list(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if name in ("CPU", "GPU")) or "nothing"
