"""A worker's metrics on its node, where Prometheus finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Gauges:
    """Metrics on the node's Prometheus endpoint: trainyard_loss, _accuracy, _step, _epoch and _samples_per_second."""

    def __init__(self, run_name: str, rank: int) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": run_name, "rank": str(rank)}
        self._gauges = {
            name: Gauge(f"trainyard_{name}", description=text, tag_keys=("run", "rank", "split"))
            for name, text in {
                "loss": "Loss: of the latest steps (split train_steps) or of an evaluation",
                "accuracy": "Share of a split predicted correctly",
                "step": "Parameter updates done",
                "epoch": "Epoch in progress",
                "samples_per_second": "Training samples a second, all ranks together",
            }.items()
        }

    def set(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "steps":
            values = {**event, "samples_per_second": event["samples_per_s"]}
            for name in ("loss", "step", "epoch", "samples_per_second"):
                self._gauges[name].set(float(values[name]), {**self._tags, "split": "train_steps"})
        elif event["kind"] == "evaluation":
            for metric, value in event["metrics"].items():
                split, _, name = metric.partition("/")
                if name in self._gauges:
                    self._gauges[name].set(float(value), {**self._tags, "split": split})
