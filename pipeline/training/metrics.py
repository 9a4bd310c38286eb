"""The full set of metrics of each task, in float64: from sums over rows, and from the gathered rows of a whole split.

A metric that does not exist (AUC of a single class, R2 of constant targets, anything of no rows) is NaN.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from pipeline.config import TARGET_METRICS
from pipeline.training.task import Task

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class TaskMetrics(Protocol):
    """What one task measures, and from what.

    Rows are outputs (n, K) and targets (n,) or (n, T), floating, as the model gives and learns them; losses (n,),
    unweighted. Sums of rows can be added up, within a rank and over ranks.
    """

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        """Sums over rows, as one float64 vector of a length that the task alone decides."""

    def from_sums(self, sums: Array) -> dict[str, float]:
        """The metrics that follow from sums over a whole split, and `samples`."""

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        """The metrics that need all rows at once: (N, K), and (N, T) or (N, 1)."""

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        """A whole split's outputs and targets as a metric of the user's own takes them, see `OwnMetric`."""


def make_task_metrics(task: Task) -> TaskMetrics:
    return ClassificationMetrics(task) if task.num_classes else RegressionMetrics(task)


class ClassificationMetrics:
    """multiclass and binary.

    loss: weighted mean. accuracy, correct. balanced_accuracy: mean recall over the classes that occur. f1: of class 1,
    or the mean over classes that occur or were predicted; 0 where there are none such. log_loss: unweighted mean
    cross-entropy, whatever the loss is. baseline_accuracy: of always answering the class most frequent in training.
    auc: area under the ROC curve, ties counting half (Hanley and McNeil 1982); multiclass: mean of one against the
    rest over the classes that occur. All as scikit-learn defines them.
    """

    def __init__(self, task: Task) -> None:
        self._binary = task.kind == "binary"
        self._classes = task.num_classes
        self._majority = task.majority_class
        self._weights = None if task.class_weights is None else task.class_weights.double().cpu().numpy()

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        count = self._classes
        labels = targets.astype(np.intp)
        predictions = (outputs[:, 0] > 0).astype(np.intp) if self._binary else outputs.argmax(1)
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

    def from_sums(self, sums: Array) -> dict[str, float]:
        loss, weight, samples, log_loss = sums[:4].tolist()
        actual, predicted, num_correct = sums[4:].reshape(3, self._classes)
        correct = float(num_correct.sum())
        occurs, occurs_or_predicted = actual > 0, actual + predicted > 0
        if self._binary:
            f1 = _ratio(2 * float(num_correct[1]), float(actual[1] + predicted[1])) if occurs_or_predicted[1] else 0.0
        else:
            f1 = _mean(2 * num_correct[occurs_or_predicted] / (actual + predicted)[occurs_or_predicted])
        return {
            "loss": _ratio(loss, weight),
            "accuracy": _ratio(correct, samples),
            "correct": correct,
            "balanced_accuracy": _mean(num_correct[occurs] / actual[occurs]),
            "f1": f1 if samples else math.nan,
            "auc": math.nan,
            "log_loss": _ratio(log_loss, samples),
            "baseline_accuracy": math.nan if self._majority is None else _ratio(float(actual[self._majority]), samples),
            "samples": int(samples),
        }

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        labels = targets[:, 0]
        if not np.isfinite(outputs).all():
            return {"auc": math.nan}
        if self._binary:  # the logit orders as the probability does, with fewer ties by rounding
            return {"auc": compute_auc(outputs[:, 0], labels == 1)}
        class_aucs = [compute_auc(column, labels == label) for label, column in enumerate(_softmax(outputs).T)]
        return {"auc": _mean(np.array([one for one in class_aucs if not math.isnan(one)]))}

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        return _sigmoid(outputs[:, 0]) if self._binary else _softmax(outputs), targets[:, 0].astype(np.int64)


class RegressionMetrics:
    """regression.

    loss: mean of what is learned. rmse, mae: errors in the target's unit. r2: coefficient of determination, NaN for
    fewer than two rows or where the target is constant in the split. baseline_rmse, baseline_mae: of always answering
    the mean of the training targets. All as scikit-learn defines them.

    Of several targets, each of these but the loss stands there for each target, in its own unit: rmse_height. What has
    no such ending has no unit either: rmse, mae and their baselines are means over the targets, each error first
    divided by the standard deviation of that target in training, so that no unit outweighs another; r2 is the mean of
    the targets' (scikit-learn's multioutput="uniform_average").
    """

    def __init__(self, task: Task) -> None:
        self._columns = task.num_outputs
        self._has_baseline = bool(task.target_mean)
        # Squares are summed around the training mean: a column far from zero would lose its digits.
        self._target_mean = np.array(task.target_mean or [0.0] * task.num_outputs)
        self._target_std = np.array(
            task.target_scale.std if task.target_scale is not None else [1.0] * task.num_outputs
        )
        self._target_offset = np.array(
            task.target_scale.mean if task.target_scale is not None else [0.0] * task.num_outputs
        )
        self._names = task.target_names
        # Scaled targets have a spread of 1, to rounding; of others, an earlier version did not store it.
        spreads = np.array(task.target_std or [1.0] * task.num_outputs)
        self._joint_scale = self._target_std if task.num_outputs == 1 else 1 / np.where(spreads == 0, 1.0, spreads)

    def compute_sums(self, outputs: Array, targets: Array, losses: Array, log_losses: Array) -> Array:
        targets = targets.reshape(outputs.shape).astype(np.float64)
        errors, spread = outputs - targets, targets - self._target_mean
        result = np.empty(2 + 5 * self._columns)
        result[:2] = losses.sum(), len(losses)
        each = [np.abs(errors).sum(0), (errors**2).sum(0), spread.sum(0), np.abs(spread).sum(0), (spread**2).sum(0)]
        result[2:] = np.concatenate(each)
        return result

    def from_sums(self, sums: Array) -> dict[str, float]:
        loss, samples = sums[:2].tolist()
        absolute, squared, spread, absolute_spread, squared_spread = sums[2:].reshape(5, self._columns)
        rows = samples or math.nan
        centered_squares = squared_spread - spread**2 / rows
        # What remains of equal numbers by rounding is no spread.
        varies = (centered_squares > 1e-12 * squared_spread) & (samples > 1)
        baseline_factor = 1.0 if self._has_baseline else math.nan
        errors = {
            "rmse": np.sqrt(squared / rows),
            "mae": absolute / rows,
            "baseline_rmse": np.sqrt(squared_spread / rows) * baseline_factor,
            "baseline_mae": absolute_spread / rows * baseline_factor,
        }
        r2 = np.where(varies, 1 - squared / np.where(varies, centered_squares, 1.0), math.nan)
        per_target = {**{name: each * self._target_std for name, each in errors.items()}, "r2": r2}
        joint = {**{name: each * self._joint_scale for name, each in errors.items()}, "r2": r2}
        return {
            "loss": _ratio(loss, samples),
            **{name: _mean(joint[name]) for name in TARGET_METRICS},
            **{
                f"{name}_{target}": float(per_target[name][place])
                for name in TARGET_METRICS
                for place, target in enumerate(self._names)
            },
            "samples": int(samples),
        }

    def from_samples(self, outputs: Array, targets: Array) -> dict[str, float]:
        return {}

    def to_user_units(self, outputs: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
        seen = [
            values.reshape(-1, self._columns) * self._target_std + self._target_offset for values in (outputs, targets)
        ]
        return (seen[0], seen[1]) if self._columns > 1 else (seen[0][:, 0], seen[1][:, 0])


def compute_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs (a positive row, a negative row) in which the positive row scores higher, ties counting half:
    the area under the ROC curve. NaN without a pair. Exact but for one division.

    scores: (N,) finite. positive: (N,) bool.
    """
    above, below = scores[positive], np.sort(scores[~positive])
    if not len(above) or not len(below):
        return math.nan
    above.sort()  # for the search: neighbours find neighbours
    wins = below.searchsorted(above, "left").sum() + below.searchsorted(above, "right").sum()
    return float(wins) / (2.0 * len(above) * len(below))


def _softmax(outputs: np.ndarray) -> np.ndarray:
    """(N, C) float64."""
    exponentials: np.ndarray = np.exp(outputs - outputs.max(1, keepdims=True).astype(np.float64))
    exponentials /= exponentials.sum(1, keepdims=True)
    return exponentials


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """(N,) float64."""
    with np.errstate(over="ignore"):  # 1 / inf is 0, as it should be
        return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _ratio(value: float, denominator: float) -> float:
    return value / denominator if denominator else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
