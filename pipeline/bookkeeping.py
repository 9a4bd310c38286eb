"""From the loop's values to the record: what rank 0 writes down, and what the other ranks leave to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.context import Context
from pipeline.learn.plan import Plan
from pipeline.learn.step_log import Rows
from pipeline.learn.trainee import Trainee
from pipeline.loop import Position, check_finite
from pipeline.record.attempt import Attempt
from pipeline.record.entries import BestSoFar
from pipeline.record.recorder import Recorder, Snapshot


class Reporter:
    """Every rank's part of the bookkeeping: report to the cluster."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def steps(self, rows: Rows) -> None:
        """Rank 0 writes them down, and looks whether they are finite: another that failed first would have rank 0
        killed before it could say why. The others only show how far they are."""
        self._context.tell({"kind": "steps", "step": int(rows["step"][-1])})

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Rank 0 writes it down."""

    def evaluated(self, position: Position) -> None:
        self._context.report(position.metrics or {})

    def wants(self, step: int, due: bool) -> bool:
        return False

    def save(self, position: Position, end: bool) -> None:
        """Rank 0 saves: the ranks hold the same bits."""


class Bookkeeper(Reporter):
    """Rank 0: rows to the metric log, snapshots to checkpoints, events to the user."""

    def __init__(
        self,
        context: Context,
        trainee: Trainee,
        plan: Plan,
        recorder: Recorder,
        attempt: Attempt,
        preprocess: dict[str, Any],
    ) -> None:
        super().__init__(context)
        self._trainee = trainee
        self._plan = plan
        self._recorder = recorder
        self._attempt = attempt
        self._preprocess = preprocess
        self._best_weights: dict[str, Tensor] | None = None
        self._due = False
        self._saved = time.monotonic()
        self.last_good = attempt.base.name if attempt.base else "none"
        self.step = attempt.base.step if attempt.base else 0
        """The last step whose row was handed over."""

    def steps(self, rows: Rows) -> None:
        self._recorder.steps(dict(rows))
        self.step, loss = int(rows["step"][-1]), float(rows["loss"][-1])
        self._attempt.beat(self.step, loss)
        check_finite(rows, self.last_good)
        self._recorder.check()
        seconds, samples = float(rows["seconds"].sum()), int(rows["samples"].sum())
        self._context.tell(
            {
                "kind": "steps",
                "step": self.step,
                "epoch": int(rows["epoch"][-1]),
                "loss": loss,
                "lr": float(rows["lr"][-1]),
                "samples": samples,
                "samples_per_s": samples / seconds if seconds else 0.0,
            }
        )

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._recorder.evaluation(dict(row))

    def evaluated(self, position: Position) -> None:
        is_best = position.step > 0 and position.best_step == position.step
        if is_best:
            self._best_weights = self._trainee.flat.weights()
        metrics = dict(position.metrics or {})
        self._context.tell(
            {
                "kind": "evaluation",
                "step": position.step,
                "epoch": self._plan.epoch(position.step),
                "ends_epoch": self._plan.ends_epoch(position.step),
                "metrics": metrics,
                "best_metric": self._plan.job.best.metric,
                "is_best": is_best,
            }
        )
        super().evaluated(position)

    def wants(self, step: int, due: bool) -> bool:
        minutes = self._plan.job.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._saved > 60 * minutes
        self._due = self._due or due or late
        return (self._due and self._recorder.may_commit()) or self._recorder.must_commit()

    def save(self, position: Position, end: bool) -> None:
        best, metric = None, self._plan.job.best.metric
        if position.best_step is not None and position.best_value is not None:
            best = BestSoFar(
                metric=metric,
                step=position.best_step,
                value=position.best_value,
                metrics=dict(position.best_metrics or {}),
            )
        elsewhere = best is not None and best.step != position.step
        step = position.step
        self._recorder.commit(
            Snapshot(
                step=position.step,
                epoch=self._plan.epoch(position.step),
                weights=self._trainee.flat.weights(),
                state=self._trainee.state(),
                position=position.to_json(),
                metrics=dict(position.metrics or {}),
                best=best,
                best_weights=self._best_weights if elsewhere else None,
                preprocess=self._preprocess,
                end=end,
                patience=position.evaluations_since_best,
            ),
            done=lambda seconds: self._context.tell({"kind": "commit", "step": step, "seconds": seconds}),
        )
        self._best_weights, self._due, self._saved = None, False, time.monotonic()
        self.last_good = f"step {position.step}"
