"""From the loop's values to the record: what rank 0 writes down, and what the other ranks leave to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.context import WorkerContext
from pipeline.errors import NotFiniteError
from pipeline.events import (
    CheckpointCommitted,
    EarlyStopped,
    EvaluationLogged,
    StepReached,
    StepsLogged,
    WarningMessage,
)
from pipeline.format_metrics import format_divergence_advice
from pipeline.runs.async_writer import AsyncRunWriter, Snapshot
from pipeline.runs.journal.entries import BestCheckpoint
from pipeline.runs.lease.attempt import Attempt
from pipeline.runs.metric_log.segments import MetricSchema
from pipeline.training.engine import TrainEngine
from pipeline.training.loop import FP16_ADVICE, TrainProgress, check_finite
from pipeline.training.schedule import TrainingSchedule
from pipeline.training.step_metrics import StepColumns

EVALUATIONS_BEFORE_WARNING = 3
"""So many evaluations, none better than that of the model before training, are worth a warning."""


class RankReporter:
    """Every rank's part of the bookkeeping: report to the cluster."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def log_steps(self, rows: StepColumns) -> None:
        """Rank 0 writes them down, and looks whether they are finite: another that failed first would have rank 0
        killed before it could say why. The others only show how far they are."""
        self._context.emit(StepReached(int(rows["step"][-1])))

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Rank 0 writes it down."""

    def on_evaluation_end(self, position: TrainProgress) -> None:
        self._context.report(position.metrics or {})

    def should_save(self, step: int, due: bool) -> bool:
        return False

    def save(self, position: TrainProgress, end: bool) -> None:
        """Rank 0 saves: the ranks hold the same bits."""


class Rank0Reporter(RankReporter):
    """Rank 0: rows to the metric log, snapshots to checkpoints, events to the user."""

    def __init__(
        self,
        context: WorkerContext,
        trainee: TrainEngine,
        plan: TrainingSchedule,
        recorder: AsyncRunWriter,
        attempt: Attempt,
        preprocess: dict[str, Any],
    ) -> None:
        super().__init__(context)
        self._trainee = trainee
        self._plan = plan
        self._recorder = recorder
        self._attempt = attempt
        self._preprocess = preprocess
        logged = MetricSchema.from_metadata(attempt.run.read_metadata()).steps
        self._not_logged = {name for name in trainee.scaler_state if name not in logged}
        """Columns that a run begun by an earlier version does not have."""
        self._best_weights: dict[str, Tensor] | None = None
        self._due = False
        self._saved = time.monotonic()
        self._best = attempt.resume_checkpoint.best if attempt.resume_checkpoint else None
        """Of the last evaluation."""
        self._saved_best, self._saved_step = (
            self._best,
            attempt.resume_checkpoint.step if attempt.resume_checkpoint else None,
        )
        self._without_gain = 0
        """Evaluations of this attempt, all of them no better than before training."""
        self.step = attempt.resume_checkpoint.step if attempt.resume_checkpoint else 0
        """The last step whose row was handed over."""

    def log_steps(self, rows: StepColumns) -> None:
        self._recorder.log_steps({name: column for name, column in rows.items() if name not in self._not_logged})
        self.step, loss = int(rows["step"][-1]), float(rows["loss"][-1])
        self._attempt.update_heartbeat(self.step, loss)
        check_finite(rows, self._divergence_advice(), self._trainee.flat.find_nonfinite_grads)
        self._recorder.raise_if_failed()
        seconds, samples = float(rows["seconds"].sum()), int(rows["samples"].sum())
        self._context.emit(
            StepsLogged(
                step=self.step,
                epoch=int(rows["epoch"][-1]),
                loss=loss,
                lr=float(rows["lr"][-1]),
                samples=samples,
                samples_per_s=samples / seconds if seconds else 0.0,
                skipped_updates=int(rows["skipped"][-1]) if "skipped" in rows else None,
            )
        )

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        self._recorder.log_evaluation(dict(row))

    def on_evaluation_end(self, position: TrainProgress) -> None:
        is_best = position.step > 0 and position.best_step == position.step
        if is_best:
            self._best_weights = self._trainee.flat.state_dict()
        self._best = self._best_checkpoint(position)
        no_gain = self._best.no_improvement_message if self._best is not None else ""
        self._context.emit(
            EvaluationLogged(
                step=position.step,
                epoch=self._plan.epoch_of(position.step),
                ends_epoch=self._plan.is_epoch_end(position.step),
                number=self._plan.evaluation_number(position.step),
                phase=self._plan.phase_of(position.step),
                metrics=dict(position.metrics or {}),
                best_metric=self._plan.job.best.metric,
                is_best=is_best,
                no_gain=bool(no_gain),
            )
        )
        self._without_gain += 1 if no_gain else 0
        if no_gain and self._without_gain == EVALUATIONS_BEFORE_WARNING:
            lr = self._plan.lr_at(position.step)
            text = f"{no_gain}: the learning rate, {lr:g} now, may be too high"
            self._context.emit(WarningMessage(text))
        super().on_evaluation_end(position)

    def should_save(self, step: int, due: bool) -> bool:
        minutes, recorder = self._plan.job.checkpoint.every_minutes, self._recorder
        # What a kill loses counts until the commit is durable, so it begins that much earlier.
        is_late = minutes is not None and time.monotonic() - self._saved >= 60 * minutes - recorder.last_commit_s
        self._due = self._due or due or is_late
        return (self._due and recorder.can_save_now(is_late=is_late)) or recorder.must_save_now()

    def save(self, position: TrainProgress, end: bool) -> None:
        best = self._best_checkpoint(position)
        elsewhere = best is not None and best.step != position.step
        step = position.step
        snapshot = Snapshot(
            step=step,
            epoch=self._plan.epoch_of(step),
            weights=self._trainee.flat.state_dict(),
            state=self._trainee.state_dict(),
            position=position.to_json(),
            metrics=dict(position.metrics or {}),
            best=best,
            best_weights=self._best_weights if elsewhere else None,
            preprocess=self._preprocess,
            is_final=end,
            evaluations_since_best=position.evaluations_since_best,
        )
        if end and snapshot.skipped_updates == step:
            names = ", ".join(self._trainee.flat.find_nonfinite_grads()[:3])
            what = f"all {step:,} updates were skipped, because gradients were not finite" + (
                f": {names}" if names else ""
            )
            raise NotFiniteError(what, where=f"step {step}", fix=FP16_ADVICE)
        if end and step < self._plan.last_step:
            self._context.emit(
                EarlyStopped(
                    step=step,
                    last_step=self._plan.last_step,
                    evaluations_since_best=position.evaluations_since_best,
                    metric=self._plan.job.best.metric,
                )
            )
        self._recorder.commit(
            snapshot,
            on_committed=lambda write_s: self._context.emit(CheckpointCommitted(step, write_s)),
        )
        self._best_weights, self._due, self._saved = None, False, time.monotonic()
        self._saved_best, self._saved_step = best, step

    def _best_checkpoint(self, position: TrainProgress) -> BestCheckpoint | None:
        if position.best_step is None or position.best_value is None:
            return None
        return BestCheckpoint(
            metric=self._plan.job.best.metric,
            step=position.best_step,
            value=position.best_value,
            metrics=dict(position.best_metrics or {}),
            mode=self._plan.job.best.mode,
            before_training=position.value_before_training,
        )

    def _divergence_advice(self) -> str:
        """What to do about a loss that is not finite."""
        return format_divergence_advice(
            self._attempt.run.name,
            self._saved_best.step if self._saved_best is not None else None,
            self._saved_step,
            self._best.no_improvement_message if self._best is not None else "",
        )
