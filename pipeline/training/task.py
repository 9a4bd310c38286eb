"""Tasks: the loss of a batch as a weighted sum, the number of correct predictions, and custom metrics.

Everything is summed, never averaged, so that sums over micro-batches and ranks stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import JobConfig, ThresholdRule, metric_column
from pipeline.errors import JobError, WorkError
from pipeline.training.losses import CustomLoss, LossFn, build_loss, build_smoothed_loss
from pipeline.user_code import import_user_function, wrap_user_error


@dataclass(frozen=True)
class CustomMetric:
    """A user function `module:function` (outputs, targets) -> number. Its arrays are a whole split in order, read-only.

    outputs: float64. multiclass: probabilities (N, classes). binary: probabilities of class 1 (N,). multilabel:
        probabilities (N, L). regression: values in the unit of the targets, (N,), or (N, T) if a target has several
        columns; with quantiles (N, Q) or, of a single one, (N,).
    targets: classes int64 (N,), labels int64 (N, L), or float64 values in their unit, (N,) or (N, T).
    """

    name: str
    metric_fn: Callable[..., Any]

    @classmethod
    def from_name(cls, name: str) -> CustomMetric:
        """Import the function.

        Raises
        ------
        JobError: there is no such function.
        """
        return cls(name, import_user_function(name, where=f"metrics: {name}", error=JobError))

    @property
    def column(self) -> str:
        return metric_column(self.name)

    def __call__(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Call the function.

        Raises
        ------
        WorkError: the function raised an exception, or does not return a number.
        """
        try:
            return float(self.metric_fn(outputs, targets))
        except Exception as raised:  # any exception of the user's function is reported
            raise wrap_user_error(raised, f"metrics: {self.name}", WorkError) from raised


class LossSums(NamedTuple):
    """Sums over a batch, each a scalar tensor on the device; the loss keeps its graph."""

    loss_sum: Tensor
    """Weighted sum of the per-sample losses."""
    weight_sum: Tensor | float
    """Sum of the sample weights, by which the loss is divided."""
    num_correct: Tensor | float
    """Number of samples predicted correctly; NaN for multilabel and regression."""


@dataclass(frozen=True)
class TargetScale:
    """Maps scaled targets to values: value = mean + std x target, column by column."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """What the model is trained to predict, and how its error is measured.

    kind: multiclass, binary, multilabel or regression.
    num_outputs: number of outputs of the model per sample.
    loss_fn: the per-sample loss; training adds `label_smoothing`.
    class_weights: (classes,), or None.
    majority_class: the most frequent class of the training split, the lowest of equals; None if unknown.
    target_mean: mean of the training split's transformed targets, column by column; empty if unknown.
    target_scale: regression with scaled targets: maps them back to the user's unit.
    custom_metrics: the user's metrics.
    target_std: standard deviation of the training split's transformed targets, like `target_mean`.
    part_names: suffixes of the metrics of single targets or classes; empty if there are none.
    threshold: binary: the probability above which a sample is predicted positive, in metrics.
    threshold_rule: binary: chooses a threshold on a split; None if there is nothing to choose.
    label_smoothing: see `task.label_smoothing`.
    quantiles: that a regression predicts, one per output; empty if it predicts the mean.
    """

    kind: str
    num_outputs: int
    loss_fn: LossFn
    class_weights: Tensor | None = None
    majority_class: int | None = None
    target_mean: tuple[float, ...] = ()
    target_scale: TargetScale | None = None
    custom_metrics: tuple[CustomMetric, ...] = ()
    target_std: tuple[float, ...] = ()
    part_names: tuple[str, ...] = ()
    threshold: float = 0.5
    threshold_rule: ThresholdRule | None = None
    label_smoothing: float = 0.0
    quantiles: tuple[float, ...] = ()

    @property
    def train_loss_fn(self) -> LossFn:
        """The per-sample loss of training."""
        return build_smoothed_loss(self.kind, self.label_smoothing) if self.label_smoothing else self.loss_fn

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for multilabel and regression."""
        return {"multiclass": self.num_outputs, "binary": 2}.get(self.kind, 0)

    @property
    def is_log_loss(self) -> bool:
        """Whether the unweighted per-sample loss is the cross-entropy."""
        return self.num_classes > 0 and not isinstance(self.loss_fn, CustomLoss)

    def to(self, device: torch.device, dtype: torch.dtype) -> Task:
        """Return the same task with its class weights on a device."""
        if self.class_weights is None:
            return self
        return replace(self, class_weights=self.class_weights.to(device, dtype))

    def sample_weights(self, targets: Tensor) -> Tensor | None:
        """Return the weight of each sample: (B,), or None if all are 1. With mixup, class weights are mixed alike."""
        weights = self.class_weights
        if weights is None:
            return None
        if not targets.is_floating_point():
            return weights[targets]
        targets = targets.to(weights.dtype)  # else the scalar weights below would be promoted to the targets' dtype
        return targets @ weights if targets.ndim > 1 else weights[0] * (1 - targets) + weights[1] * targets

    def count_correct(self, outputs: Tensor, targets: Tensor) -> Tensor | float:
        """Return the number of correct predictions in a batch. With mixup, the class with the largest share counts."""
        if self.kind == "multiclass":
            return (outputs.argmax(1) == (targets.argmax(1) if targets.ndim > 1 else targets)).sum()
        if self.kind == "binary":
            return ((outputs.squeeze(1) > 0) == (targets > 0.5)).sum()
        return float("nan")

    def compute_loss_sums(self, outputs: Tensor, targets: Tensor) -> LossSums:
        """Return the sums of a training batch; `loss_sum` is differentiable.

        Parameters
        ----------
        outputs: (B, outputs), any floating dtype; losses are computed in at least float32.
        targets: (B,) int64 classes or (B, classes) probabilities, (B,) floating from 0 to 1, or (B, T) floating values.
        """
        outputs = upcast_to_fp32(outputs)
        weights, loss_fn = self.sample_weights(targets), self.train_loss_fn
        correct = self.count_correct(outputs.detach(), targets)
        if weights is not None:
            return LossSums((loss_fn(outputs, targets) * weights).sum(), weights.sum(), correct)
        return LossSums(loss_fn(outputs, targets, "sum"), float(len(targets)), correct)


def upcast_to_fp32(outputs: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; leave other dtypes."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def build_task(
    job: JobConfig,
    num_classes: int,
    num_targets: int,
    *,
    class_counts: Sequence[int] = (),
    target_mean: Sequence[float] = (),
    target_std: Sequence[float] = (),
    target_scale: TargetScale | None = None,
    label_index: Callable[[int | str], int] | None = None,
    class_names: Sequence[str] = (),
) -> Task:
    """Build the task of a job.

    Parameters
    ----------
    num_classes: number of classes (multiclass).
    num_targets: number of columns of a target (multilabel, regression).
    class_counts: samples of each class in the training split, if known. For `class_weights: balanced` the weights are
        n / (classes x samples of the class), as scikit-learn defines it.
    target_mean, target_std: of the training split's transformed targets, column by column, if known.
    target_scale: of scaled targets.
    label_index: maps a label in `class_weights` to the index of its class; without it only indices are accepted.
    class_names: of the classes, if single ones have metrics.

    Raises
    ------
    JobError: a weight names an unknown class, or a custom loss or metric does not exist.
    """
    config = job.task
    task = Task(
        config.kind,
        {"multiclass": num_classes, "binary": 1}.get(config.kind, len(config.quantiles or ()) or num_targets),
        build_loss(config),
        majority_class=max(range(len(class_counts)), key=lambda label: class_counts[label]) if class_counts else None,
        target_mean=tuple(target_mean),
        target_scale=target_scale,
        custom_metrics=tuple(map(CustomMetric.from_name, job.metrics)),
        target_std=tuple(target_std),
        part_names=job.part_names(num_targets, class_names),
        threshold_rule=config.threshold_rule,
        label_smoothing=config.label_smoothing,
        quantiles=tuple(config.quantiles or ()),
    )
    if config.class_weights is None:
        return task
    if config.class_weights == "balanced":
        total = sum(class_counts)
        weights = [total / (task.num_classes * count) if count else 0.0 for count in class_counts]
        assert len(weights) == task.num_classes, "balanced weights need the counts of all classes"
    else:
        weights = [1.0] * task.num_classes
        for label, weight in config.class_weights.items():
            weights[_class_index(label, task.num_classes, label_index)] = float(weight)
    return replace(task, class_weights=torch.tensor(weights, dtype=torch.float64))


def _class_index(label: int | str, num_classes: int, label_index: Callable[[int | str], int] | None) -> int:
    index = label_index(label) if label_index is not None else label
    if not isinstance(index, int) or not 0 <= index < num_classes:
        raise JobError(
            f"{label} is not a class; there are {num_classes}",
            where=f"task.class_weights.{label}",
            fix=f"use 0 to {num_classes - 1}",
        )
    return index
