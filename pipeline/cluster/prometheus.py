"""A worker's metrics, exported by its node's Prometheus endpoint."""

from __future__ import annotations

import threading
import time

from pipeline.events import CheckpointCommitted, EvaluationLogged, Event, StepReached, StepsLogged, TrainingStarted

GAUGES = {
    "trainyard_loss": "Loss: of the latest step (split train_steps) or of an evaluation",
    "trainyard_accuracy": "Fraction of a split predicted correctly, at the latest evaluation",
    "trainyard_learning_rate": "Learning rate of the latest step",
    "trainyard_samples_per_second": "Training samples per second, over all ranks",
    "trainyard_step": "Parameter updates done, by rank",
    "trainyard_epoch": "Epoch in progress",
    "trainyard_checkpoint_age_seconds": "Seconds since the last checkpoint was committed, or since this attempt began",
    "trainyard_upload_seconds": "Seconds that writing the last checkpoint took, with journal and metric log",
    "trainyard_restarts": "Attempts of this run before the current one",
}
COUNTERS = {
    "trainyard_samples": "Training samples that this attempt has processed",
    "trainyard_commits": "Checkpoints that this attempt has committed",
}
"""Prometheus adds the prefix ray_ to every name, and the suffix _total to those of counters."""

LABELS = ("run", "rank", "split")
"""`split` is empty for metrics that do not belong to a split."""
CHECKPOINT_AGE_INTERVAL_S = 1.0
"""Seconds between two updates of the last checkpoint's age."""


class PrometheusMetrics:
    """The metrics of one rank while it trains. Rank 0 exports all of them, the others only their step: everything else
    is reduced over the ranks and would be the same.

    Between two events a thread updates the age of the last checkpoint; `close` ends it.
    """

    def __init__(self, run_name: str, rank: int) -> None:
        from ray.util.metrics import Counter, Gauge

        self._rank = rank
        self._labels = {"run": run_name, "rank": str(rank), "split": ""}
        self._gauges = {name: Gauge(name, description=text, tag_keys=LABELS) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, description=text, tag_keys=LABELS) for name, text in COUNTERS.items()}
        self._last_checkpoint_time = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._update_checkpoint_age, name="trainyard-prometheus", daemon=True)

    def update(self, event: Event) -> None:
        """Set the metrics that an event has values for."""
        match event:
            case StepReached():
                self._set_gauge("step", event.step, "train_steps")
            case StepsLogged():
                self._set_gauge("step", event.step, "train_steps")
                self._set_gauge("loss", event.loss, "train_steps")
                self._set_gauge("epoch", event.epoch, "train_steps")
                self._set_gauge("learning_rate", event.lr, "train_steps")
                self._set_gauge("samples_per_second", event.samples_per_s, "train_steps")
                self._counters["trainyard_samples"].inc(event.samples, self._labels)
            case EvaluationLogged():
                for metric, value in event.metrics.items():
                    split, _, name = metric.partition("/")
                    if name in ("loss", "accuracy"):
                        self._set_gauge(name, value, split)
            case CheckpointCommitted():
                self._last_checkpoint_time = time.monotonic()
                self._set_gauge("upload_seconds", event.write_s)
                self._counters["trainyard_commits"].inc(1, self._labels)
            case TrainingStarted() if self._rank == 0:
                self._last_checkpoint_time = time.monotonic()
                self._set_gauge("restarts", event.attempt - 1)
                self._thread.start()

    def close(self) -> None:
        """Stop updating the age of the last checkpoint."""
        self._closing.set()

    def _set_gauge(self, name: str, value: float, split: str = "") -> None:
        self._gauges[f"trainyard_{name}"].set(float(value), {**self._labels, "split": split})

    def _update_checkpoint_age(self) -> None:
        while not self._closing.wait(CHECKPOINT_AGE_INTERVAL_S):
            self._set_gauge("checkpoint_age_seconds", time.monotonic() - self._last_checkpoint_time)
