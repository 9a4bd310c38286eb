"""The recorders that the training loop calls: rank 0 writes the run directory, the other ranks only report."""

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
from pipeline.training.divergence import suggest_stable_settings
from pipeline.training.engine import TrainEngine
from pipeline.training.loop import FP16_ADVICE, TrainProgress, check_finite
from pipeline.training.schedule import TrainingSchedule
from pipeline.training.step_metrics import StepColumns

MAX_LISTED = 5
"""Metrics that a message names."""

EVALUATIONS_BEFORE_WARNING = 3
"""Evaluations without one better than that of the untrained model, before a warning."""


class RankReporter:
    """The recorder of a rank other than 0: reports to the cluster. Implements `TrainingRecorder`."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def log_steps(self, rows: StepColumns) -> None:
        """Report the step. Rank 0 alone logs the rows and checks that they are finite: if another rank failed first,
        rank 0 would be killed before it could record why."""
        self._context.emit(StepReached(int(rows["step"][-1])))

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Do nothing: rank 0 logs it."""

    def on_evaluation_end(self, progress: TrainProgress) -> None:
        self._context.report(progress.metrics or {})

    def should_save(self, step: int, due: bool) -> bool:
        return False

    def save(self, progress: TrainProgress, end: bool) -> None:
        """Do nothing: rank 0 saves, and the ranks hold the same bits."""


class Rank0Reporter(RankReporter):
    """The recorder of rank 0: writes rows to the metric log and snapshots to checkpoints, and emits events."""

    def __init__(
        self,
        context: WorkerContext,
        engine: TrainEngine,
        schedule: TrainingSchedule,
        writer: AsyncRunWriter,
        attempt: Attempt,
        preprocess: dict[str, Any],
    ) -> None:
        super().__init__(context)
        self._engine = engine
        self._schedule = schedule
        self._writer = writer
        self._attempt = attempt
        self._preprocess = preprocess
        logged = MetricSchema.from_metadata(attempt.run.read_metadata())
        self._unlogged_columns = {name for name in engine.scaler_state if name not in logged.steps}
        """Columns of steps that a run begun by an earlier version lacks."""
        self._evaluation_columns = set(logged.evaluation_schema().names)
        """Columns of evaluations: a run begun by an earlier version lacks metrics that were added later."""
        self._has_warned_of_columns = False
        self._best_weights: dict[str, Tensor] | None = None
        self._due = False
        self._saved_at = time.monotonic()
        checkpoint = attempt.resume_checkpoint
        self._best = checkpoint.best if checkpoint else None
        """The best as of the latest evaluation."""
        self._saved_best, self._saved_step = self._best, checkpoint.step if checkpoint else None
        self._evaluations_without_gain = 0
        """Evaluations of this attempt after which the best was no better than before training."""
        self.step = checkpoint.step if checkpoint else 0
        """The latest step that was logged."""

    def log_steps(self, rows: StepColumns) -> None:
        self._writer.log_steps({name: column for name, column in rows.items() if name not in self._unlogged_columns})
        self.step, loss = int(rows["step"][-1]), float(rows["loss"][-1])
        self._attempt.update_heartbeat(self.step, loss)
        check_finite(rows, self._divergence_advice(), self._engine.flat.find_nonfinite_grads)
        self._writer.raise_if_failed()
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
        self._writer.log_evaluation({name: value for name, value in row.items() if name in self._evaluation_columns})
        unlogged = [name for name in row if name not in self._evaluation_columns]
        if unlogged and not self._has_warned_of_columns:
            self._has_warned_of_columns = True
            listed = ", ".join(unlogged[:MAX_LISTED]) + (", ..." if len(unlogged) > MAX_LISTED else "")
            text = f"this run was begun by a version that did not measure {listed}: they are not in its metric log"
            self._context.emit(WarningMessage(text))

    def on_evaluation_end(self, progress: TrainProgress) -> None:
        is_best = progress.step > 0 and progress.best_step == progress.step
        if is_best:
            self._best_weights = self._engine.flat.state_dict()
        self._best = self._best_checkpoint(progress)
        no_gain = self._best.no_improvement_message if self._best is not None else ""
        self._context.emit(
            EvaluationLogged(
                step=progress.step,
                epoch=self._schedule.epoch_of(progress.step),
                ends_epoch=self._schedule.is_epoch_end(progress.step),
                number=self._schedule.evaluation_number(progress.step),
                phase=self._schedule.phase_of(progress.step),
                metrics=dict(progress.metrics or {}),
                best_metric=self._schedule.job.best.metric,
                is_best=is_best,
                no_gain=bool(no_gain),
            )
        )
        self._evaluations_without_gain += 1 if no_gain else 0
        if no_gain and self._evaluations_without_gain == EVALUATIONS_BEFORE_WARNING:
            lr = self._schedule.lr_at(progress.step)
            text = f"{no_gain}: the learning rate, {lr:g} now, may be too high"
            self._context.emit(WarningMessage(text))
        super().on_evaluation_end(progress)

    def should_save(self, step: int, due: bool) -> bool:
        minutes, writer = self._schedule.job.checkpoint.every_minutes, self._writer
        # A kill loses work until the commit is durable, so start earlier by the duration of a commit.
        is_late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes - writer.last_commit_s
        self._due = self._due or due or is_late
        return (self._due and writer.can_save_now(is_late=is_late)) or writer.must_save_now()

    def save(self, progress: TrainProgress, end: bool) -> None:
        best = self._best_checkpoint(progress)
        is_best_earlier = best is not None and best.step != progress.step
        step = progress.step
        snapshot = Snapshot(
            step=step,
            epoch=self._schedule.epoch_of(step),
            weights=self._engine.flat.state_dict(),
            state=self._engine.state_dict(),
            position=progress.to_json(),
            metrics=dict(progress.metrics or {}),
            best=best,
            best_weights=self._best_weights if is_best_earlier else None,
            preprocess=self._preprocess,
            is_final=end,
            evaluations_since_best=progress.evaluations_since_best,
        )
        if end and snapshot.skipped_updates == step:
            names = ", ".join(self._engine.flat.find_nonfinite_grads()[:3])
            what = f"all {step:,} updates were skipped, because gradients were not finite" + (
                f": {names}" if names else ""
            )
            raise NotFiniteError(what, where=f"step {step}", fix=FP16_ADVICE)
        if end and step < self._schedule.last_step:
            self._context.emit(
                EarlyStopped(
                    step=step,
                    last_step=self._schedule.last_step,
                    evaluations_since_best=progress.evaluations_since_best,
                    metric=self._schedule.job.best.metric,
                )
            )
        self._writer.commit(
            snapshot,
            on_committed=lambda write_s: self._context.emit(CheckpointCommitted(step, write_s)),
        )
        self._best_weights, self._due, self._saved_at = None, False, time.monotonic()
        self._saved_best, self._saved_step = best, step

    def _best_checkpoint(self, progress: TrainProgress) -> BestCheckpoint | None:
        if progress.best_step is None or progress.best_value is None:
            return None
        return BestCheckpoint(
            metric=self._schedule.job.best.metric,
            step=progress.best_step,
            value=progress.best_value,
            metrics=dict(progress.best_metrics or {}),
            mode=self._schedule.job.best.mode,
            before_training=progress.value_before_training,
        )

    def _divergence_advice(self) -> str:
        """Return advice for a loss that is not finite."""
        return format_divergence_advice(
            self._attempt.run.name,
            self._saved_best.step if self._saved_best is not None else None,
            self._saved_step,
            self._best.no_improvement_message if self._best is not None else "",
            suggest_stable_settings(self._schedule.job, self._schedule.phase_of(max(self.step, 1))),
        )
