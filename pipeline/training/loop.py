"""The training loop: `fit` and `evaluate`.

It depends on tensors, an engine, a schedule, an iterator of device batches, and a recorder that receives the values;
not on Ray, files or a terminal.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.context import WorkerContext
from pipeline.errors import JobError, NotFiniteError, WorkError
from pipeline.training.engine import TrainEngine
from pipeline.training.metric_accumulator import MetricAccumulator
from pipeline.training.optimizers import MIN_SCALE
from pipeline.training.schedule import TrainingSchedule
from pipeline.training.step_metrics import StepColumns, StepMetricsBuffer
from pipeline.watchdog import blocking_on


class BatchLike(Protocol):
    """This rank's slice of a global batch, on the device."""

    @property
    def step(self) -> int: ...
    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


class TrainingRecorder(Protocol):
    """Receives metrics and checkpoints. None of its methods waits for storage."""

    def log_steps(self, rows: StepColumns) -> None: ...
    def log_evaluation(self, row: Mapping[str, Any]) -> None: ...
    def on_evaluation_end(self, progress: TrainProgress) -> None:
        """Called when all splits are evaluated at a step. If it is `best_step`, the current parameters are the best."""

    def should_save(self, step: int, due: bool) -> bool:
        """Return whether to save now; a save that is due may be postponed."""

    def save(self, progress: TrainProgress, end: bool) -> None: ...


@dataclass(frozen=True)
class TrainProgress:
    """The progress of a run: plain values, stored in every checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_since_best: int = 0
    metrics: Mapping[str, float] | None = None
    """Finite metrics of the latest evaluation, by names such as `val/loss`."""
    best_metrics: Mapping[str, float] | None = None
    """Finite metrics of the evaluation at `best_step`."""
    value_before_training: float | None = None
    """Value of `best.metric` at step 0, if finite."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def after_evaluation(self, step: int, metrics: Mapping[str, float], schedule: TrainingSchedule) -> TrainProgress:
        """Return the progress after an evaluation. Of equal values the earliest is the best; step 0 is no candidate."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        updated, best = replace(self, step=step, metrics=finite), schedule.job.best
        if step == 0:
            return replace(updated, value_before_training=finite.get(best.metric))
        if best.metric not in metrics:
            return updated
        value, sign = finite.get(best.metric), 1 if best.mode == "min" else -1
        if value is not None and (self.best_value is None or sign * value < sign * self.best_value):
            return replace(updated, best_step=step, best_value=value, best_metrics=finite, evaluations_since_best=0)
        return replace(updated, evaluations_since_best=self.evaluations_since_best + 1)

    def is_patience_exhausted(self, schedule: TrainingSchedule) -> bool:
        patience = schedule.job.best.patience
        return patience is not None and self.evaluations_since_best >= patience


@dataclass(frozen=True)
class StopBounds:
    """What earlier attempts determine about the last step of the run."""

    ended_at: int | None = None
    """The step of a recorded end, which is final."""
    highest_step: int = 0
    """The highest step of any earlier attempt. There is no early stop below it."""

    def should_stop(self, progress: TrainProgress, schedule: TrainingSchedule) -> bool:
        """Return whether the run ends at this step, after an evaluation."""
        if self.ended_at is not None:
            return progress.step >= self.ended_at
        early = progress.is_patience_exhausted(schedule) and progress.step >= self.highest_step
        return early or progress.step >= schedule.last_step


def fit(
    engine: TrainEngine,
    schedule: TrainingSchedule,
    batches: Iterable[BatchLike],
    splits: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
    recorder: TrainingRecorder,
    context: WorkerContext,
    progress: TrainProgress,
    stop_bounds: StopBounds,
) -> tuple[TrainProgress, int]:
    """Train to the end of the schedule, or until a signal asks to stop. All ranks take part.

    Parameters
    ----------
    batches: this rank's slices of the global batches from step `progress.step + 1` on.
    splits: for each split to evaluate, this rank's slice of it as batches (inputs, targets).

    Returns
    -------
    The progress at the last step, and the signal that stopped the run early, or 0.

    Raises
    ------
    NotFiniteError: the loss is NaN or infinite, or gradients are so repeatedly in fp16.
    """
    step_metrics = StepMetricsBuffer(engine.flat.loss_sums, recorder.log_steps, engine.scaler_state, engine.members)
    gradient_sync = _GradientSync(engine, context)
    evaluate_splits = partial(_evaluate_splits, engine, schedule, splits, recorder, context)

    if progress.step == 0:
        progress = evaluate_splits(progress, 0)
        step_metrics.resume_clock()
    for batch in batches:
        step, lr = batch.step, schedule.lr_at(batch.step)
        if schedule.should_reset_optimizer(step):
            engine.optimizer.reset_state()
        engine.forward_backward(step, batch.inputs, batch.targets)
        stop_signal = gradient_sync.all_reduce_gradients()
        step_metrics.append(schedule.epoch_of(step), step, lr)  # on the CPU, raises before a NaN reaches the weights
        engine.optimizer_step(lr)

        is_evaluated = schedule.is_evaluation_due(step) or step == stop_bounds.ended_at
        if is_evaluated:
            step_metrics.flush()
            progress = evaluate_splits(progress, step)
        is_end = is_evaluated and stop_bounds.should_stop(progress, schedule)
        if is_end or stop_signal or recorder.should_save(step, schedule.is_checkpoint_due(step)):
            step_metrics.flush()
            progress = replace(progress, step=step)
            recorder.save(progress, is_end)
        if is_end or stop_signal:
            return progress, 0 if is_end else stop_signal
        if is_evaluated:
            step_metrics.resume_clock()
    raise AssertionError("the batches ended before the schedule did")


def evaluate(
    engine: TrainEngine,
    eval_batches: Iterable[tuple[Tensor, Tensor]],
    context: WorkerContext,
    *,
    threshold: float | None = None,
) -> dict[str, float]:
    """Compute the exact metrics of a split, each sample counted once. All ranks take part.

    Parameters
    ----------
    eval_batches: this rank's slice of the split as batches (inputs, targets).
    threshold: of a binary task, at which predictions are measured, see `Task.threshold`; by default 0.5, and the
        task's rule chooses one on this split.

    Returns
    -------
    The task's metrics (`config.METRICS`), custom metrics, and `samples`; NaN for a metric that is undefined.

    Raises
    ------
    WorkError: a custom loss or metric failed.
    """
    task = engine.task if threshold is None else replace(engine.task, threshold=threshold, threshold_rule=None)
    accumulator = MetricAccumulator(task, engine.device)
    for inputs, targets in eval_batches:
        with torch.inference_mode():
            accumulator.update(engine.predict_logits(inputs), targets)
    return accumulator.compute(context)


def _evaluate_splits(
    engine: TrainEngine,
    schedule: TrainingSchedule,
    splits: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
    recorder: TrainingRecorder,
    context: WorkerContext,
    progress: TrainProgress,
    step: int,
) -> TrainProgress:
    """Evaluate and log every split, and return the progress after it."""
    metrics: dict[str, float] = {}
    for split, eval_batches in splits.items():
        start = time.perf_counter()
        try:
            # The threshold is chosen on the validation split alone.
            result = evaluate(engine, eval_batches, context, threshold=None if split == "val" else 0.5)
        except WorkError as error:
            if step > 0 or type(error) is not WorkError:
                raise
            raise JobError(error.what, where=error.where, fix=error.fix) from error  # before training: bad input
        row = {"epoch": schedule.epoch_of(step), "step": step, "split": split, **result}
        recorder.log_evaluation({**row, "seconds": time.perf_counter() - start, "time": time.time()})
        metrics |= {f"{split}/{name}": value for name, value in result.items() if name != "samples"}
    progress = progress.after_evaluation(step, metrics, schedule)
    recorder.on_evaluation_end(progress)
    return progress


SIGTERM_FLAG = 1024.0
"""Added to the stop flag by a rank that received SIGTERM; 1 for SIGINT. The sum over ranks distinguishes the two."""

STOP_FLAG_LAG_STEPS = 4
"""On CUDA the ranks act on the stop flag of this many steps ago, whose copy to the host is complete by then."""


class _GradientSync:
    """The all-reduce of a step. It also carries the stop flag: all ranks see the same signal at the same step."""

    def __init__(self, engine: TrainEngine, context: WorkerContext) -> None:
        self._flat = engine.flat
        self._context = context
        self._on_cuda = engine.device.type == "cuda"
        self._pending_copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @blocking_on("workers")
    def all_reduce_gradients(self) -> int:
        """All-reduce `flat.all_reduce_buffer`; return the signal to stop, or 0."""
        local_signal = self._context.stop_signal()
        if self._context.world_size == 1:
            return local_signal
        if local_signal:
            self._flat.stop_flag.fill_(SIGTERM_FLAG if local_signal == signal.SIGTERM else 1.0)
        self._context.all_reduce(self._flat.all_reduce_buffer)
        stop_flag = self._lagged_stop_flag() if self._on_cuda else float(self._flat.stop_flag)
        return 0 if stop_flag == 0 else int(signal.SIGTERM if stop_flag >= SIGTERM_FLAG else signal.SIGINT)

    def _lagged_stop_flag(self) -> float:
        """Start the copy of this step's flag, and return that of `STOP_FLAG_LAG_STEPS` ago without a device sync."""
        host = torch.empty((), dtype=self._flat.stop_flag.dtype, pin_memory=True).copy_(
            self._flat.stop_flag, non_blocking=True
        )
        copy_done = torch.cuda.Event()
        copy_done.record()
        self._pending_copies.append((host, copy_done))
        if len(self._pending_copies) <= STOP_FLAG_LAG_STEPS:
            return 0.0
        oldest, event = self._pending_copies.popleft()
        event.synchronize()
        return float(oldest)


FP16_ADVICE = (
    "set train.precision: bf16 or fp32, which have a larger range, or lower the learning rate; gradients that are not "
    "finite in these either come from the model or its loss"
)


def check_finite(rows: StepColumns, fix: str, find_nonfinite_grads: Callable[[], Sequence[str]] = tuple) -> None:
    """Check that every loss is finite, and that fp16's loss scale has not fallen below `MIN_SCALE`.

    Parameters
    ----------
    fix: how to repair it, for the message.
    find_nonfinite_grads: returns the names of the parameters whose gradient is not finite now.

    Raises
    ------
    NotFiniteError: with the first such step and its learning rate.
    """
    is_nonfinite = ~np.isfinite(rows["loss"])
    if "loss_scale" in rows:
        is_nonfinite |= rows["loss_scale"] < MIN_SCALE
    if not is_nonfinite.any():
        return
    first = int(np.argmax(is_nonfinite))
    step, lr, loss = int(rows["step"][first]), float(rows["lr"][first]), float(rows["loss"][first])
    what = f"the loss is {loss} at step {step}, with learning rate {lr:g}"
    if math.isfinite(loss):
        names, skipped = list(find_nonfinite_grads()), int(rows["skipped"][first])
        suffix = f" of {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}" if names else ""
        what = (
            f"the gradients{suffix} are not finite at step {step}, with learning rate {lr:g}: {skipped:,} updates were "
            f"skipped, and fp16's loss scale fell to {float(rows['loss_scale'][first]):.0e}"
        )
        fix = FP16_ADVICE
    raise NotFiniteError(what, where=f"step {step}", fix=fix)
