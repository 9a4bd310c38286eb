"""The metrics of each task, in float64: from sums over samples, and from the gathered samples of a whole split.

A metric that is undefined (AUC of a single class, R2 of constant targets, any metric of no samples) is NaN. To add a
metric, compute it in the `from_sums` or `from_samples` of its task, and add its name to `pipeline.config.METRICS`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.config import TARGET_METRICS
from pipeline.training.task import Task
from pipeline.training.threshold import choose_threshold

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class TaskMetrics(Protocol):
    """The metrics of one task.

    Outputs (n, K) are the model's; targets (n,) or (n, T), floating, are transformed; losses (n,) are unweighted. Sums
    can be added, within a rank and over ranks.
    """

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        """Return sums over samples, as one float64 vector whose length depends on the task alone."""

    def from_sums(self, sums: Array) -> dict[str, float]:
        """Return the metrics that follow from the sums over a whole split, and `samples`."""

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        """Return the metrics that need all samples at once: outputs (N, K), targets (N, T) or (N, 1)."""

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        """Return a whole split's outputs and targets in the form that custom metrics take, see `CustomMetric`."""


class ClassificationMetrics:
    """Metrics of multiclass and binary tasks, as scikit-learn defines them.

    loss: weighted mean. accuracy. correct: number of correct predictions. balanced_accuracy: mean recall over the
    classes that occur. f1: of class 1 (binary), or the mean over the classes that occur or were predicted; 0 if there
    are none. log_loss: unweighted mean cross-entropy, whatever the loss is. baseline_accuracy: of always predicting the
    most frequent class in training. auc: area under the ROC curve, ties counting half (Hanley and McNeil 1982);
    multiclass: mean of one class against the rest over the classes that occur. average_precision: the mean of the
    precision at each distinct score, weighted by the increase in recall; multiclass: mean of one class against the rest
    over the classes that occur.

    binary: recall and precision of class 1, and specificity, the recall of class 0. multiclass: recall and precision of
    each class, such as recall_cat. The precision of a class that was never predicted is 0, as for f1.

    threshold: that which the task's rule chooses on this split, see `threshold.choose_threshold`; only if it has one.
    Metrics of predictions are those at the task's threshold, 0.5 in training.
    """

    def __init__(self, task: Task) -> None:
        self._binary = task.kind == "binary"
        self._classes = task.num_classes
        self._majority = task.majority_class
        self._names = task.part_names
        self._threshold, self._threshold_rule = task.threshold, task.threshold_rule
        self._weights = None if task.class_weights is None else task.class_weights.double().cpu().numpy()

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        count = self._classes
        labels = targets.astype(np.intp)
        predictions = self._predict(outputs)
        result = np.empty(4 + 3 * count)
        if self._weights is None:
            result[:2] = losses.sum(), len(losses)
        else:
            weights = self._weights[labels]
            result[:2] = losses @ weights, weights.sum()
        result[2:4] = len(labels), log_losses.sum()
        result[4 : 4 + count] = np.bincount(labels, minlength=count)
        result[4 + count : 4 + 2 * count] = np.bincount(predictions, minlength=count)
        result[4 + 2 * count :] = np.bincount(labels[labels == predictions], minlength=count)
        return result

    def _predict(self, outputs: Array) -> np.ndarray:
        """Return the predicted classes, integers (n,)."""
        if not self._binary:
            classes: np.ndarray = outputs.argmax(1)
            return classes
        is_positive = outputs[:, 0] > 0 if self._threshold == 0.5 else sigmoid(outputs[:, 0]) > self._threshold
        return is_positive.astype(np.intp)

    def from_sums(self, sums: Array) -> dict[str, float]:
        loss, weight, samples, log_loss = sums[:4].tolist()
        actual, predicted, num_correct = sums[4:].reshape(3, self._classes)
        correct = float(num_correct.sum())
        occurs, occurs_or_predicted = actual > 0, actual + predicted > 0
        if self._binary:
            f1 = ratio(2 * float(num_correct[1]), float(actual[1] + predicted[1])) if occurs_or_predicted[1] else 0.0
        else:
            f1 = _mean(2 * num_correct[occurs_or_predicted] / (actual + predicted)[occurs_or_predicted])
        metrics = {
            "loss": ratio(loss, weight),
            "accuracy": ratio(correct, samples),
            "correct": correct,
            "balanced_accuracy": _mean(num_correct[occurs] / actual[occurs]),
            "f1": f1 if samples else math.nan,
            "auc": math.nan,
            "average_precision": math.nan,
            "log_loss": ratio(log_loss, samples),
            "baseline_accuracy": math.nan if self._majority is None else ratio(float(actual[self._majority]), samples),
        }
        recalls = list(map(ratio, num_correct.tolist(), actual.tolist()))
        precisions = (num_correct / np.maximum(predicted, 1)).tolist() if samples else [math.nan] * self._classes
        if self._binary:
            metrics |= {"recall": recalls[1], "precision": precisions[1], "specificity": recalls[0]}
        else:
            metrics |= {f"recall_{name}": recall for name, recall in zip(self._names, recalls, strict=False)}
            metrics |= {f"precision_{name}": value for name, value in zip(self._names, precisions, strict=False)}
        if self._threshold_rule is not None:
            metrics["threshold"] = math.nan
        return {**metrics, "samples": int(samples)}

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        labels = targets[:, 0]
        if not np.isfinite(outputs).all():
            return {"auc": math.nan, "average_precision": math.nan}
        # Logits have the order of the probabilities, with fewer ties by rounding.
        ranked = (
            [(outputs[:, 0], labels == 1)]
            if self._binary
            else [(column, labels == label) for label, column in enumerate(_softmax(outputs).T)]
        )
        aucs, average_precisions = np.array([compute_ranking_metrics(*pair) for pair in ranked]).T
        metrics = {"auc": mean_of_defined(aucs), "average_precision": mean_of_defined(average_precisions)}
        if self._threshold_rule is not None:
            metrics["threshold"] = choose_threshold(sigmoid(outputs[:, 0]), labels == 1, self._threshold_rule)
        return metrics

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        return sigmoid(outputs[:, 0]) if self._binary else _softmax(outputs), targets[:, 0].astype(np.int64)


class RegressionMetrics:
    """Metrics of regression, as scikit-learn defines them.

    loss: mean loss on transformed targets. rmse, mae: errors in the unit of the target. r2: coefficient of
    determination, NaN for fewer than two samples or a target that is constant in the split. baseline_rmse,
    baseline_mae: of always predicting the mean of the training targets.

    With several targets, each of these except the loss is also reported per target in its unit, for example
    rmse_height. Metrics without such a suffix have no unit: rmse, mae and their baselines are means over the targets,
    each error first divided by the standard deviation of that target in training, so that no unit outweighs another; r2
    is the mean over the targets (scikit-learn's multioutput="uniform_average").
    """

    def __init__(self, task: Task) -> None:
        self._columns = task.num_outputs
        self._has_baseline = bool(task.target_mean)
        # Squares are summed around the training mean: a column far from zero would lose precision.
        self._target_mean = np.array(task.target_mean or [0.0] * task.num_outputs)
        self._target_std = np.array(
            task.target_scale.std if task.target_scale is not None else [1.0] * task.num_outputs
        )
        self._target_offset = np.array(
            task.target_scale.mean if task.target_scale is not None else [0.0] * task.num_outputs
        )
        self._names = task.part_names
        # Scaled targets have a standard deviation of 1, up to rounding; earlier versions did not store it for others.
        stds = np.array(task.target_std or [1.0] * task.num_outputs)
        self._joint_scale = self._target_std if task.num_outputs == 1 else 1 / np.where(stds == 0, 1.0, stds)

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        targets = targets.reshape(outputs.shape).astype(np.float64)
        errors, deviations = outputs - targets, targets - self._target_mean
        result = np.empty(2 + 5 * self._columns)
        result[:2] = losses.sum(), len(losses)
        result[2:] = np.concatenate(
            [
                np.abs(errors).sum(0),
                (errors**2).sum(0),
                deviations.sum(0),
                np.abs(deviations).sum(0),
                (deviations**2).sum(0),
            ]
        )
        return result

    def from_sums(self, sums: Array) -> dict[str, float]:
        loss, samples = sums[:2].tolist()
        abs_error, squared_error, deviation, abs_deviation, squared_deviation = sums[2:].reshape(5, self._columns)
        num_samples = samples or math.nan
        centered_squares = squared_deviation - deviation**2 / num_samples
        # The rounding error of constant targets is not a variance.
        varies = (centered_squares > 1e-12 * squared_deviation) & (samples > 1)
        baseline_factor = 1.0 if self._has_baseline else math.nan
        errors = {
            "rmse": np.sqrt(squared_error / num_samples),
            "mae": abs_error / num_samples,
            "baseline_rmse": np.sqrt(squared_deviation / num_samples) * baseline_factor,
            "baseline_mae": abs_deviation / num_samples * baseline_factor,
        }
        r2 = np.where(varies, 1 - squared_error / np.where(varies, centered_squares, 1.0), math.nan)
        per_target = {**{name: values * self._target_std for name, values in errors.items()}, "r2": r2}
        joint = {**{name: values * self._joint_scale for name, values in errors.items()}, "r2": r2}
        return {
            "loss": ratio(loss, samples),
            **{name: _mean(joint[name]) for name in TARGET_METRICS},
            **{
                f"{name}_{target}": float(per_target[name][column])
                for name in TARGET_METRICS
                for column, target in enumerate(self._names)
            },
            "samples": int(samples),
        }

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        return {}

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        predictions, true_values = (
            values.reshape(-1, self._columns) * self._target_std + self._target_offset for values in (outputs, targets)
        )
        return (predictions, true_values) if self._columns > 1 else (predictions[:, 0], true_values[:, 0])


class RankingMetrics(NamedTuple):
    """auc: area under the ROC curve; NaN if there is only one class. average_precision: NaN without positives."""

    auc: float
    average_precision: float


def compute_ranking_metrics(scores: np.ndarray, positive: np.ndarray) -> RankingMetrics:
    """Compute the metrics of a ranking, with all distinct scores as thresholds.

    The area is the fraction of pairs (positive, negative) in which the positive sample has the higher score, ties
    counting half; exact except for one division. The average precision is the sum of the precisions at the thresholds,
    each times the fraction of the positives that have this score.

    Parameters
    ----------
    scores: (N,) finite.
    positive: (N,) bool.
    """
    positives, negatives = np.sort(scores[positive]), np.sort(scores[~positive])
    if not len(positives):
        return RankingMetrics(math.nan, math.nan)
    # Sorted positives: searches of adjacent values hit the same cache lines.
    num_below = negatives.searchsorted(positives, "left")
    wins = num_below.sum() + negatives.searchsorted(positives, "right").sum()
    auc = float(wins) / (2.0 * len(positives) * len(negatives)) if len(negatives) else math.nan
    first = np.flatnonzero(np.append(True, positives[1:] != positives[:-1]))  # of each distinct score, ascending
    num_equal = np.diff(first, append=len(positives))
    true_positives, false_positives = len(positives) - first, len(negatives) - num_below[first]
    precision = true_positives / (true_positives + false_positives)
    return RankingMetrics(auc, float((num_equal * precision).sum() / len(positives)))


def mean_of_defined(values: np.ndarray) -> float:
    """Return the mean without NaN; NaN if there is nothing else."""
    return _mean(values[~np.isnan(values)])


def _softmax(outputs: np.ndarray) -> np.ndarray:
    """Return probabilities (N, C) float64."""
    exponentials: np.ndarray = np.exp(outputs - outputs.max(1, keepdims=True).astype(np.float64))
    exponentials /= exponentials.sum(1, keepdims=True)
    return exponentials


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return probabilities float64, of the same shape."""
    with np.errstate(over="ignore"):  # 1 / inf is 0, as it should be
        return 1 / (1 + np.exp(-logits.astype(np.float64)))


def ratio(value: float, denominator: float) -> float:
    """Return a quotient, or NaN if the denominator is 0."""
    return value / denominator if denominator else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
