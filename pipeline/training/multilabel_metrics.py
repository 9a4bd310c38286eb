"""The metrics of a multilabel task."""

from __future__ import annotations

import math

import numpy as np

from pipeline.training.metrics import Array, compute_ranking_metrics, mean_of_defined, ratio, sigmoid
from pipeline.training.task import Task


class MultilabelMetrics:
    """Metrics of a multilabel task, as scikit-learn defines them for indicator matrices (N, L), in float64.

    loss: mean over samples of the mean loss over labels. accuracy: fraction of all single labels predicted correctly,
    1 minus the Hamming loss. exact_match: fraction of samples with all labels correct. f1: mean over labels (macro), 0
    for a label that neither occurs nor is predicted; f1_micro: of all single labels together. auc and
    average_precision: means over the labels for which they are defined, see `metrics.ClassificationMetrics`.
    baseline_accuracy: of always predicting the more frequent value of each label in training.

    Of each label: recall, precision (0 if never predicted) and auc.
    """

    def __init__(self, task: Task) -> None:
        self._labels = task.num_outputs
        self._majority = np.array(task.target_mean) > 0.5
        self._names = task.part_names

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        actual, predicted = targets.reshape(outputs.shape) > 0.5, outputs > 0
        totals = [losses.sum(), len(losses), (actual == predicted).all(1).sum()]
        return np.concatenate([totals, actual.sum(0), predicted.sum(0), (actual & predicted).sum(0)]).astype(np.float64)

    def from_sums(self, sums: Array) -> dict[str, float]:
        loss, samples, exact = sums[:3].tolist()
        actual, predicted, true_positives = sums[3:].reshape(3, self._labels)
        num_wrong = actual + predicted - 2 * true_positives
        majority_correct = np.where(self._majority, actual, samples - actual) if len(self._majority) else math.nan
        num_single = samples * self._labels
        metrics = {
            "loss": ratio(loss, samples),
            "accuracy": ratio(num_single - float(num_wrong.sum()), num_single),
            "exact_match": ratio(exact, samples),
            "f1": float((2 * true_positives / np.maximum(actual + predicted, 1)).mean()) if samples else math.nan,
            "f1_micro": 2 * float(true_positives.sum()) / max(float((actual + predicted).sum()), 1.0)
            if samples
            else math.nan,
            "auc": math.nan,
            "average_precision": math.nan,
            "baseline_accuracy": ratio(float(np.sum(majority_correct)), num_single),
        }
        recalls = list(map(ratio, true_positives.tolist(), actual.tolist()))
        precisions = (true_positives / np.maximum(predicted, 1)).tolist() if samples else [math.nan] * self._labels
        for metric, values in (("recall", recalls), ("precision", precisions), ("auc", [math.nan] * self._labels)):
            metrics |= {f"{metric}_{name}": value for name, value in zip(self._names, values, strict=False)}
        return {**metrics, "samples": int(samples)}

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        if not np.isfinite(outputs).all():
            return {}
        ranked = [
            compute_ranking_metrics(scores, label > 0.5) for scores, label in zip(outputs.T, targets.T, strict=True)
        ]
        aucs, average_precisions = np.array(ranked).T
        of_labels = {f"auc_{name}": float(auc) for name, auc in zip(self._names, aucs, strict=False)}
        return {"auc": mean_of_defined(aucs), "average_precision": mean_of_defined(average_precisions), **of_labels}

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        return sigmoid(outputs), targets.astype(np.int64)
