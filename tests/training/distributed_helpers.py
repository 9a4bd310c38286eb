"""Contexts to run the training loop in: jobs, batches, an in-memory recorder, and ranks as threads or processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import METRICS, JobConfig, metric_column
from pipeline.config.files import build_job
from pipeline.context import SingleProcessContext
from pipeline.device import Precision
from pipeline.errors import NotFiniteError
from pipeline.models import build_model
from pipeline.training.engine import TrainEngine
from pipeline.training.gradient_fns import select_gradient_backend
from pipeline.training.loop import StopBounds, TrainProgress, check_finite, fit
from pipeline.training.schedule import TrainingSchedule
from pipeline.training.task import build_task

CPU = torch.device("cpu")
FEATURES, CLASSES = 6, 3
COUNTS = [5, 11, 7]
"""Samples of each class: 23 in total, a prime, so that no batch size divides it."""


@dataclass
class Batch:
    step: int
    inputs: Tensor
    targets: Tensor


def make_job(**tree: Any) -> JobConfig:
    train = {"batch_size": 5, "phases": [{"epochs": 3, "lr": 0.3}], "precision": "fp64", **tree.pop("train", {})}
    return build_job({"name": "loop", "model": {"hidden": [8]}, "train": train, **tree}, "here")


def make_data(job: JobConfig, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Return inputs (23, FEATURES) float32 and targets of the task; the same values on every device."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(sum(COUNTS), FEATURES, generator=generator)
    if job.task.kind == "regression":
        return inputs.to(device), torch.randn(sum(COUNTS), 2, generator=generator).to(device)
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(COUNTS))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return inputs.to(device), ((labels > 0).float() if job.task.kind == "binary" else labels).to(device)


def global_indices(schedule: TrainingSchedule, step: int) -> Tensor:
    """Return the indices of a global batch, (rows, members); every epoch and member has another order."""
    epoch, index = schedule.epoch_of(step), (step - 1) % schedule.steps_per_epoch
    orders = [
        torch.randperm(schedule.num_rows, generator=torch.Generator().manual_seed(epoch + 1000 * member))
        for member in range(schedule.job.members)
    ]
    return torch.stack(orders, 1)[index * schedule.batch_size : (index + 1) * schedule.batch_size]


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def rank_batches(
    schedule: TrainingSchedule, data: tuple[Tensor, Tensor], first_step: int, rank: int, world_size: int
) -> Iterator[Batch]:
    for step in range(first_step, schedule.last_step + 1):
        indices = global_indices(schedule, step)
        local = indices[rank_slice(len(indices), rank, world_size)].flatten()
        yield Batch(step, data[0][local], data[1][local])


def eval_batches(data: tuple[Tensor, Tensor], rank: int, world_size: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    local = rank_slice(len(data[0]), rank, world_size)
    return (
        list(zip(data[0][local].split(size), data[1][local].split(size), strict=True))
        if local.start < local.stop
        else []
    )


def make_engine(
    job: JobConfig, rank: int = 0, world_size: int = 1, gradient_backend: str = "", device: torch.device = CPU
) -> TrainEngine:
    counts = COUNTS if job.task.kind == "multiclass" else [COUNTS[0], sum(COUNTS[1:])]
    means = make_data(job)[1].mean(0, dtype=torch.float64).tolist() if job.task.kind == "regression" else ()
    task = build_task(job, CLASSES, 2, class_counts=counts, target_mean=means)
    dtype = Precision.from_name(job.train.precision, device).dtype
    return TrainEngine(
        job,
        build_model(job, (FEATURES,), task.num_outputs, 7),
        task,
        lambda raw: raw.to(dtype),
        device,
        gradient_backend=gradient_backend or select_gradient_backend(job, device),
        world_size=world_size,
        rng_seed_fn=lambda step: 100 * step + rank,
    )


class FakeContext(SingleProcessContext):
    """A rank of a process group.

    signals: number of the query of `stop_signal` -> signal that it returns.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: Any = None) -> None:
        super().__init__()
        self.rank, self.world_size, self._group = rank, world_size, group
        self.signals: dict[int, int] = {}
        self.num_queries = 0

    def all_reduce(self, vector: Tensor) -> None:
        assert self.world_size > 1, "a single rank does not all-reduce"
        dist.all_reduce(vector, group=self._group)

    def stop_signal(self) -> int:
        self.num_queries += 1
        return self.signals.get(self.num_queries, 0)


class ThreadContext(FakeContext):
    """One of several ranks in threads of this process."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, vectors: dict[int, Tensor]) -> None:
        super().__init__(rank, world_size)
        self._barrier, self._vectors = barrier, vectors

    def all_reduce(self, vector: Tensor) -> None:
        self._vectors[self.rank] = vector.clone()
        self._barrier.wait()
        vector.copy_(torch.stack([self._vectors[rank] for rank in range(self.world_size)]).sum(0))
        self._barrier.wait()


def on_ranks(world_size: int, do: Callable[[FakeContext], Any]) -> list[Any]:
    """Call a function once per rank, in threads, and return the results in rank order."""
    if world_size == 1:
        return [do(FakeContext())]
    barrier, vectors = threading.Barrier(world_size, timeout=60), dict[int, Tensor]()
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: do(ThreadContext(rank, world_size, barrier, vectors)), range(world_size)))


@dataclass
class InMemoryRecorder:
    """A recorder that keeps everything in memory.

    engine: its state is copied to `snapshots` at each save.
    extra_saves: steps to save at besides those that are due.
    """

    engine: TrainEngine | None = None
    extra_saves: tuple[int, ...] = ()
    rows: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    progress_log: list[TrainProgress] = field(default_factory=list)
    saves: list[tuple[TrainProgress, bool]] = field(default_factory=list)
    snapshots: list[tuple[dict[str, Tensor], dict[str, Any]]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def log_steps(self, rows: Mapping[str, np.ndarray]) -> None:
        count = len(rows["step"])
        self.rows += [{name: column[i].item() for name, column in rows.items()} for i in range(count)]
        self.calls.append(f"rows to {int(rows['step'][-1])}")
        check_finite(dict(rows), f"last saved: {self.saves[-1][0].step if self.saves else None}")

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        self.evaluations.append(dict(row))
        self.calls.append(f"evaluation {row['split']} at {row['step']}")

    def on_evaluation_end(self, progress: TrainProgress) -> None:
        self.progress_log.append(progress)

    def should_save(self, step: int, due: bool) -> bool:
        return due or step in self.extra_saves

    def save(self, progress: TrainProgress, end: bool) -> None:
        self.saves.append((progress, end))
        self.calls.append(f"{'end' if end else 'save'} at {progress.step}")
        if self.engine is not None:
            self.snapshots.append((self.engine.flat.state_dict(), self.engine.state_dict()))

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


@dataclass
class Result:
    recorder: InMemoryRecorder
    engine: TrainEngine
    progress: TrainProgress
    signal_number: int
    context: FakeContext


def run(
    job: JobConfig,
    context: FakeContext | None = None,
    *,
    max_steps: int | None = None,
    stop_bounds: StopBounds = StopBounds(),  # noqa: B008 - frozen
    start: tuple[TrainProgress, dict[str, Tensor], dict[str, Any]] | None = None,
    splits: Iterable[str] = ("val",),
    gradient_backend: str = "",
    engine: TrainEngine | None = None,
    extra_saves: tuple[int, ...] = (),
    data: tuple[Tensor, Tensor] | None = None,
    device: torch.device = CPU,
) -> Result:
    """Run `fit` on `make_data`; `start` is the state to resume from: progress, weights and engine state."""
    context = context or FakeContext()
    data = data or make_data(job, device)
    schedule = TrainingSchedule(job, len(data[0]), max_steps)
    engine = engine or make_engine(job, context.rank, context.world_size, gradient_backend, device)
    progress = TrainProgress()
    if start is not None:
        progress, weights, state = start
        engine.load_state_dict(weights, state)
    recorder = InMemoryRecorder(engine, extra_saves)
    batches = rank_batches(schedule, data, progress.step + 1, context.rank, context.world_size)
    split_batches = {split: eval_batches(data, context.rank, context.world_size) for split in splits}
    progress, signal_number = fit(engine, schedule, batches, split_batches, recorder, context, progress, stop_bounds)
    return Result(recorder, engine, progress, signal_number, context)


# -------------------------------------------------------------------------------------- several processes

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "uneven slices, a short last batch": {},
    "empty slices": {"train": {"batch_size": 2, "phases": [{"steps": 15, "lr": 0.2}]}},
    "one sample per batch": {"train": {"batch_size": 1, "phases": [{"steps": 8, "lr": 0.1}]}},
    "full batch": {"train": {"batch_size": "all", "phases": [{"steps": 10, "lr": 0.5}]}},
    "class weights": {"task": {"class_weights": "balanced"}},
    "micro-batches": {"train": {"batch_size": 9, "micro_batch": 2}},
    "micro-batches and class weights": {"train": {"micro_batch": 1}, "task": {"class_weights": {0: 0.1, 2: 5.0}}},
    "binary": {
        "task": {"kind": "binary", "class_weights": "balanced"},
        "metrics": ["tests.training.custom_metrics:order"],
    },
    "regression": {"task": "regression", "train": {"phases": [{"epochs": 3, "lr": 0.05}]}},
    "momentum, clipping, phases": {
        "train": {
            "optimizer": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            "clip_norm": 0.5,
            "phases": [
                {"epochs": 1, "lr": 0.2, "schedule": "cosine", "warmup_steps": 2},
                {"steps": 4, "lr": 0.1, "optimizer_state": "reset"},
            ],
        }
    },
    "adam": {"train": {"optimizer": {"kind": "adam"}, "phases": [{"epochs": 3, "lr": 0.01}]}},
    "deep": {"model": {"hidden": [9, 8, 7], "activation": "tanh"}},
    "ensemble": {
        "model": {"hidden": [9, 8], "ensemble": 3, "numeric_embedding": "periodic"},
        "task": {"class_weights": "balanced"},
        "train": {"clip_norm": 0.5},
    },
    "ensemble in micro-batches": {
        "model": {"hidden": [8], "ensemble": 2},
        "task": "binary",
        "train": {"micro_batch": 1, "optimizer": {"kind": "adam"}, "phases": [{"epochs": 3, "lr": 0.01}]},
    },
}
FLOAT32 = {"train": {"precision": "fp32", "batch_size": 7}}
BATCH_NORM = {"model": {"hidden": [8], "batch_norm": True}, "train": {"batch_size": 12}}
SIGNALS: dict[str, dict[int, dict[int, int]]] = {
    "one rank is interrupted": {1: {4: signal.SIGINT}},
    "one rank is terminated, another interrupted": {0: {3: signal.SIGINT}, 2: {3: signal.SIGTERM}},
    "all ranks are terminated": {rank: {6: signal.SIGTERM} for rank in range(3)},
}
"""For each case and rank: step -> signal received before it."""


def run_outcome(job: JobConfig, context: FakeContext) -> dict[str, Any]:
    """Train, and return the logged values and final weights as plain values."""
    result = run(job, context, splits=("val", "train"))
    return {
        "loss": result.recorder.column("loss"),
        "correct": result.recorder.column("correct"),
        "samples": result.recorder.column("samples"),
        "evaluations": {
            f"{row['split']}/{name} at {row['step']}": row[name]
            for row in result.recorder.evaluations
            for name in (*METRICS[job.task.kind], *map(metric_column, job.metrics), "samples")
        },
        "weights": {name: tensor.tolist() for name, tensor in result.engine.flat.state_dict().items()},
    }


def first_gradient(job: JobConfig, context: FakeContext) -> list[float]:
    data, engine = make_data(job), make_engine(job, context.rank, context.world_size)
    batch = next(rank_batches(TrainingSchedule(job, len(data[0])), data, 1, context.rank, context.world_size))
    engine.forward_backward(1, batch.inputs, batch.targets)
    if context.world_size > 1:
        context.all_reduce(engine.flat.all_reduce_buffer)
    return (engine.flat.grad / engine.flat.weight_sum).tolist()


def run_until_stopped(signals: dict[int, dict[int, int]], context: FakeContext) -> tuple[int, int, bool]:
    context.signals = signals.get(context.rank, {})
    result = run(make_job(), context)
    progress, end = result.recorder.saves[-1]
    return progress.step, result.signal_number, end


def nonfinite_message(context: FakeContext) -> str:
    """Train on data with a NaN in the slice of one rank, and return the error message of this rank."""
    job = make_job(train={"batch_size": 6})
    inputs, targets = make_data(job)
    inputs[int(global_indices(TrainingSchedule(job, len(inputs)), 3)[-1])] = float("nan")
    try:
        run(job, context, data=(inputs, targets), splits=())
    except NotFiniteError as error:
        return error.what
    return "no error"


def run_rank(rank: int, address: str, results: Any) -> None:
    """Run all cases as one process of three with world size 3, then, except for the last process, with world size 2."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    for world_size in (3, 2):
        if rank >= world_size:
            continue
        group = pair if world_size == 2 else None
        for name, tree in CONFIGURATIONS.items():
            results.put((name, world_size, rank, run_outcome(make_job(**tree), FakeContext(rank, world_size, group))))
        results.put(
            ("fp32", world_size, rank, first_gradient(make_job(**FLOAT32), FakeContext(rank, world_size, group)))
        )
        results.put(
            ("norm", world_size, rank, run_outcome(make_job(**BATCH_NORM), FakeContext(rank, world_size, group)))
        )
        results.put(("diverged", world_size, rank, nonfinite_message(FakeContext(rank, world_size, group))))
    for name, signals in SIGNALS.items():
        results.put((name, 3, rank, run_until_stopped(signals, FakeContext(rank, 3))))
    dist.barrier()
    dist.destroy_process_group()
