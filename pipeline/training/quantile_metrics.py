"""The metrics of a quantile regression, and the rearrangement of its outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.config.quantiles import MEDIAN, quantile_name
from pipeline.training.metrics import Array, RegressionMetrics, ratio
from pipeline.training.task import Task


class QuantileMetrics:
    """Metrics of a regression with `task.quantiles`, as scikit-learn defines them, in float64.

    loss: mean pinball loss of the outputs on transformed targets. All other metrics are those of the sorted outputs
    (the rearrangement of Chernozhukov, Fernández-Val and Galichon, arXiv 0704.3649), which are the predictions, in the
    unit of the target.

    pinball: mean pinball loss over samples and quantiles (Koenker and Bassett 1978). coverage_q10: fraction of targets
    at or below the quantile 0.1. coverage: fraction of targets within the lowest and the highest quantile, both
    included, and interval_width: the mean distance of the two. rmse, mae, r2 and baselines: of the median, if it is one
    of the quantiles, as for other regressions.
    """

    def __init__(self, task: Task) -> None:
        self._quantiles = np.array(task.quantiles)
        self._std = task.target_scale.std[0] if task.target_scale is not None else 1.0
        self._mean = task.target_scale.mean[0] if task.target_scale is not None else 0.0
        median_task = replace(task, num_outputs=1, quantiles=())
        self._median = task.quantiles.index(MEDIAN) if MEDIAN in task.quantiles else None
        self._median_metrics = RegressionMetrics(median_task)

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        predictions, column = np.sort(outputs.astype(np.float64), 1), targets.reshape(-1, 1).astype(np.float64)
        errors = column - predictions
        within = (column >= predictions[:, :1]) & (column <= predictions[:, -1:])
        median = predictions[:, [self._median or 0]]
        return np.concatenate(
            [
                np.maximum(self._quantiles * errors, (self._quantiles - 1) * errors).sum(0),
                (errors <= 0).sum(0),
                within.sum(0),
                (predictions[:, -1:] - predictions[:, :1]).sum(0),
                self._median_metrics.compute_sums(median, targets, losses, log_losses),
            ]
        )

    def from_sums(self, sums: Array) -> dict[str, float]:
        count = len(self._quantiles)
        pinball, at_or_below, (within, width) = sums[:count], sums[count : 2 * count], sums[2 * count : 2 * count + 2]
        metrics = self._median_metrics.from_sums(sums[2 * count + 2 :])
        samples = metrics.pop("samples")
        of_interval = {
            "coverage": ratio(float(within), samples),
            "interval_width": ratio(float(width), samples) * self._std,
        }
        of_levels = {
            f"coverage_{quantile_name(quantile)}": ratio(float(number), samples)
            for quantile, number in zip(self._quantiles.tolist(), at_or_below, strict=True)
        }
        return {
            "loss": metrics.pop("loss"),
            "pinball": ratio(float(pinball.sum()), samples * count) * self._std,
            **(of_interval if count > 1 else {}),
            **of_levels,
            **(metrics if self._median is not None else {}),
            "samples": samples,
        }

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        return {}

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        predictions = np.sort(outputs, 1) * self._std + self._mean
        values = targets[:, 0] * self._std + self._mean
        return (predictions, values) if len(self._quantiles) > 1 else (predictions[:, 0], values)
