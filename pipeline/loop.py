"""Fit and evaluate: the training loop. It knows tensors, a trainee, a plan, an iterator of device batches, and a
recorder that it hands values to; it knows no Ray, no files and no terminal.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.context import WorkerContext
from pipeline.errors import JobError, NotFiniteError, WorkError
from pipeline.learn.plan import Plan
from pipeline.learn.scaling import MIN_SCALE
from pipeline.learn.step_log import Rows, StepLog
from pipeline.learn.tally import Tally
from pipeline.learn.trainee import Trainee
from pipeline.watchdog import waits_for


class Batch(Protocol):
    """This rank's share of a global batch, on the device."""

    @property
    def step(self) -> int: ...
    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


class Recorder(Protocol):
    """Where values go. None of its calls waits for storage."""

    def steps(self, rows: Rows) -> None: ...
    def evaluation(self, row: Mapping[str, Any]) -> None: ...
    def evaluated(self, position: Position) -> None:
        """All splits are evaluated at this step; where it is `best_step`, the parameters now are the best."""

    def wants(self, step: int, due: bool) -> bool:
        """Whether to save now; a due save may wait for its turn."""

    def save(self, position: Position, end: bool) -> None: ...


@dataclass(frozen=True)
class Position:
    """How far a run is: plain values, stored in every checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_since_best: int = 0
    metrics: Mapping[str, float] | None = None
    """The latest evaluation as `val/loss`, ...: what is finite of it."""
    best_metrics: Mapping[str, float] | None = None
    """That of `best_step`."""
    value_before_training: float | None = None
    """The best metric's at step 0, where it was finite."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def after_evaluation(self, step: int, metrics: Mapping[str, float], plan: Plan) -> Position:
        """The position after an evaluation; the best is the earliest of equals, and step 0 is no candidate."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        after, best = replace(self, step=step, metrics=finite), plan.job.best
        if step == 0:
            return replace(after, value_before_training=finite.get(best.metric))
        if best.metric not in metrics:
            return after
        value, sign = finite.get(best.metric), 1 if best.mode == "min" else -1
        if value is not None and (self.best_value is None or sign * value < sign * self.best_value):
            return replace(after, best_step=step, best_value=value, best_metrics=finite, evaluations_since_best=0)
        return replace(after, evaluations_since_best=self.evaluations_since_best + 1)

    def patience_is_used_up(self, plan: Plan) -> bool:
        patience = plan.job.best.patience
        return patience is not None and self.evaluations_since_best >= patience


@dataclass(frozen=True)
class Bounds:
    """What earlier attempts of the run have settled about its end."""

    ended_at: int | None = None
    """The step of an end that is on record; it binds."""
    highest_step: int = 0
    """No early stop below this one."""

    def ends(self, position: Position, plan: Plan) -> bool:
        """Whether the run ends here, after an evaluation."""
        if self.ended_at is not None:
            return position.step >= self.ended_at
        early = position.patience_is_used_up(plan) and position.step >= self.highest_step
        return early or position.step >= plan.last_step


FP16_ADVICE = (
    "set train.precision: bf16 or fp32, which have a larger range, or lower the learning rate; gradients that are not "
    "finite there either come from the model or its loss"
)

SIGTERM_UNIT = 1024.0
"""What a rank adds to the stop element for SIGTERM; 1 for SIGINT. The sum over the ranks tells both apart."""

VOTE_LAG = 4
"""On CUDA the ranks act on the stop element of so many steps ago: its copy to the host has long arrived by then."""


def fit(
    trainee: Trainee,
    plan: Plan,
    batches: Iterable[Batch],
    splits: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
    recorder: Recorder,
    context: WorkerContext,
    position: Position,
    bounds: Bounds,
) -> tuple[Position, int]:
    """Train from a position to the end of the plan, or until a signal asks to stop.

    Parameters
    ----------
    batches: this rank's shares of the global batches from `position.step + 1` on.
    splits: for each split to evaluate, this rank's share of its rows in blocks (inputs, targets).

    Returns
    -------
    The last position, and the signal that ended it early or 0.

    Raises
    ------
    NotFiniteError: a loss that is NaN or infinite, or gradients that are so again and again.
    """
    step_metrics, gradient_sync = StepLog(trainee.flat.sums, recorder.steps, trainee.scale_state), _Votes(trainee, context)
    if position.step == 0:
        position = _evaluate_all(trainee, plan, splits, recorder, context, position, 0)
        step_metrics.resume_clock()
    for batch in batches:
        step = batch.step
        if plan.resets_optimizer_before(step):
            trainee.optimizer.reset()
        trainee.gradient(step, batch.inputs, batch.targets)
        stop_signal = gradient_sync.sum_over_ranks()
        step_metrics.record(plan.epoch(step), step, lr := plan.lr(step))
        trainee.update(lr)

        is_evaluated = plan.evaluates_after(step) or step == bounds.ended_at
        if is_evaluated:
            step_metrics.flush()
            position = _evaluate_all(trainee, plan, splits, recorder, context, position, step)
        is_end = is_evaluated and bounds.ends(position, plan)
        if is_end or stop_signal or recorder.wants(step, plan.saves_after(step)):
            step_metrics.flush()
            position = replace(position, step=step)
            recorder.save(position, is_end)
        if is_end:
            return position, 0
        if stop_signal:
            return position, stop_signal
        if is_evaluated:
            step_metrics.resume_clock()
    raise AssertionError("the batches ended before the run did")


def evaluate(trainee: Trainee, blocks: Iterable[tuple[Tensor, Tensor]], context: WorkerContext) -> dict[str, float]:
    """Exact metrics of the model as it is: every row of the split once, over all ranks.

    Returns
    -------
    What `job.METRICS` names for the task, the user's own metrics, and samples; NaN for what does not exist.

    Raises
    ------
    WorkError: code of the user's own failed.
    """
    accumulator = Tally(trainee.task, trainee.device)
    for inputs, targets in blocks:
        with torch.inference_mode():
            accumulator.add(trainee.outputs(inputs), targets)
    return accumulator.metrics(context)


def _evaluate_all(
    trainee: Trainee,
    plan: Plan,
    splits: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
    recorder: Recorder,
    context: WorkerContext,
    position: Position,
    step: int,
) -> Position:
    metrics: dict[str, float] = {}
    for split, eval_batches in splits.items():
        start = time.perf_counter()
        try:
            result = evaluate(trainee, eval_batches, context)
        except WorkError as error:
            if step > 0 or type(error) is not WorkError:
                raise
            raise JobError(error.what, where=error.where, fix=error.fix) from error  # nothing is trained yet
        row = {"epoch": plan.epoch(step), "step": step, "split": split, **result}
        recorder.evaluation({**row, "seconds": time.perf_counter() - start, "time": time.time()})
        metrics |= {f"{split}/{name}": value for name, value in result.items() if name != "samples"}
    after = position.after_evaluation(step, metrics, plan)
    recorder.evaluated(after)
    return after


class _Votes:
    """The one sum of a step, and with it the ranks' agreement to stop: all learn the same signal at the same step."""

    def __init__(self, trainee: Trainee, context: WorkerContext) -> None:
        self._flat = trainee.flat
        self._context = context
        self._on_cuda = trainee.device.type == "cuda"
        self._under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @waits_for("workers")
    def sum_over_ranks(self) -> int:
        """Sum the exchange vector over all ranks; returns the signal to stop, or 0."""
        local_signal = self._context.stop_signal()
        if self._context.world_size == 1:
            return local_signal
        if local_signal:
            self._flat.stop.fill_(SIGTERM_UNIT if local_signal == signal.SIGTERM else 1.0)
        self._context.all_reduce(self._flat.exchange)
        stop = self._lagged() if self._on_cuda else float(self._flat.stop)
        return 0 if stop == 0 else int(signal.SIGTERM if stop >= SIGTERM_UNIT else signal.SIGINT)

    def _lagged(self) -> float:
        host = torch.empty((), dtype=self._flat.stop.dtype, pin_memory=True).copy_(self._flat.stop, non_blocking=True)
        copy_done = torch.cuda.Event()
        copy_done.record()
        self._under_way.append((host, copy_done))
        if len(self._under_way) <= VOTE_LAG:
            return 0.0
        oldest, event = self._under_way.popleft()
        event.synchronize()
        return float(oldest)


def check_finite(rows: Rows, fix: str, not_finite_gradients: Callable[[], Sequence[str]] = tuple) -> None:
    """Look for a loss that is NaN or infinite, and for a loss scale that has become useless because gradients are.

    Parameters
    ----------
    fix: what to do about it, for the message.
    not_finite_gradients: names of the parameters whose gradient is not finite now.

    Raises
    ------
    NotFiniteError: names the first such step and its learning rate.
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
        names, skipped = list(not_finite_gradients()), int(rows["skipped"][first])
        suffix = f" of {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}" if names else ""
        what = (
            f"the gradients{suffix} are not finite at step {step}, with learning rate {lr:g}: {skipped:,} updates were "
            f"skipped, and fp16's loss scale fell to {float(rows['loss_scale'][first]):.0e}"
        )
        fix = FP16_ADVICE
    raise NotFiniteError(what, where=f"step {step}", fix=fix)
