"""Metrics of the user's own: plain functions of what a whole split was predicted to be, and what it is.

Tasks: the loss of a batch as a weighted sum, and what counts as correct. Sums, never means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import JobConfig, metric_column
from pipeline.errors import JobError, WorkError
from pipeline.training.losses import CustomLoss, LossFn, build_loss
from pipeline.user_code import import_user_function, wrap_user_error


@dataclass(frozen=True)
class CustomMetric:
    """`module:function` of (outputs, targets), both of a whole split in its order, read-only -> a number.

    outputs: float64. multiclass: probabilities (N, classes). binary: probabilities of class 1 (N,). regression: values
        in the targets' unit, (N,), or (N, T) where a target has several columns.
    targets: classes int64 (N,), or float64 values in their unit, (N,) or (N, T).
    """

    name: str
    metric_fn: Callable[..., Any]

    @classmethod
    def from_name(cls, name: str) -> CustomMetric:
        """Raises
        ------
        JobError: there is no such function.
        """
        return cls(name, import_user_function(name, where=f"metrics: {name}", error=JobError))

    @property
    def column(self) -> str:
        return metric_column(self.name)

    def __call__(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Raises
        ------
        WorkError: the function raised something itself, or gives no number.
        """
        try:
            return float(self.metric_fn(outputs, targets))
        except Exception as raised:  # whatever the user's function raises is the user's to see
            raise wrap_user_error(raised, f"metrics: {self.name}", WorkError) from raised


class LossSums(NamedTuple):
    """Sums over a batch, each a scalar tensor on the device; the loss keeps its graph."""

    loss_sum: Tensor
    """Weighted sum of the samples' losses."""
    weight_sum: Tensor | float
    """Sum of the samples' weights: what the loss is divided by."""
    num_correct: Tensor | float
    """Number of samples predicted correctly; NaN where a task has no such thing."""


@dataclass(frozen=True)
class TargetScale:
    """How scaled targets become values: value = mean + std x target, column by column."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """What is learned.

    kind: multiclass, binary or regression.
    outputs: numbers the model gives for a sample.
    class_weights: (classes,), or None.
    majority: the most frequent class of the training split, the lowest of equals; None where that is not known.
    means: mean of the training split's targets as prepared, column by column; empty where that is not known.
    spreads: their standard deviations, likewise.
    unit: regression: of the values that people see.
    target_names: what the metrics of single targets end in; empty where they have none.
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
    target_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """0 for regression."""
        return {"multiclass": self.num_outputs, "binary": 2}.get(self.kind, 0)

    @property
    def is_log_loss(self) -> bool:
        """Whether the unweighted loss of a sample is the cross-entropy."""
        return self.num_classes > 0 and not isinstance(self.loss_fn, CustomLoss)

    def to(self, device: torch.device, dtype: torch.dtype) -> Task:
        """The same task with its weights on a device."""
        if self.class_weights is None:
            return self
        return replace(self, class_weights=self.class_weights.to(device, dtype))

    def sample_weights(self, targets: Tensor) -> Tensor | None:
        """The weight of each sample: (B,), or None where all are 1. A mixed sample's is its classes' mixed weight."""
        weights = self.class_weights
        if weights is None:
            return None
        if not targets.is_floating_point():
            return weights[targets]
        targets = targets.to(weights.dtype)  # or the single weights below would take on the targets' type
        return targets @ weights if targets.ndim > 1 else weights[0] * (1 - targets) + weights[1] * targets

    def count_correct(self, outputs: Tensor, targets: Tensor) -> Tensor | float:
        """How many of a batch are predicted correctly; the class of a mixed sample is the one it has most of."""
        if self.kind == "multiclass":
            return (outputs.argmax(1) == (targets.argmax(1) if targets.ndim > 1 else targets)).sum()
        if self.kind == "binary":
            return ((outputs.squeeze(1) > 0) == (targets > 0.5)).sum()
        return float("nan")

    def compute_loss_sums(self, outputs: Tensor, targets: Tensor) -> LossSums:
        """The sums of a training batch, to be differentiated by `loss`.

        outputs: (B, outputs), any floating type; losses are computed in float32 at least.
        targets: (B,) int64 classes or (B, classes) probabilities, (B,) floating from 0 to 1, or (B, T) floating values.
        """
        outputs = upcast_to_fp32(outputs)
        weights = self.sample_weights(targets)
        correct = self.count_correct(outputs.detach(), targets)
        if weights is not None:
            return LossSums((self.loss_fn(outputs, targets) * weights).sum(), weights.sum(), correct)
        return LossSums(self.loss_fn(outputs, targets, "sum"), float(len(targets)), correct)


def upcast_to_fp32(outputs: Tensor) -> Tensor:
    """Outputs in float32 where they come in less."""
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
) -> Task:
    """The task of a job.

    Parameters
    ----------
    classes: number of classes (multiclass).
    target_columns: numbers in one target (regression).
    class_counts: rows of each class in the training split, where known. For `class_weights: balanced`,
        n / (classes x rows of the class), as scikit-learn defines it.
    means, spreads: mean and standard deviation of the training split's prepared targets, column by column, where known.
    unit: of targets that are scaled.
    number_of: the number of a class that `class_weights` names; without it, only numbers are known.

    Raises
    ------
    JobError: a weight for a class that there is not, or code of the user's that there is not.
    """
    task = job.task
    outputs = {"multiclass": num_classes, "binary": 1, "regression": num_targets}[task.kind]
    built = Task(
        task.kind,
        outputs,
        build_loss(task),
        majority_class=max(range(len(class_counts)), key=lambda label: class_counts[label]) if class_counts else None,
        target_mean=tuple(target_mean),
        target_scale=target_scale,
        custom_metrics=tuple(map(CustomMetric.from_name, job.metrics)),
        target_std=tuple(target_std),
        target_names=job.target_names(num_targets),
    )
    if task.class_weights is None:
        return built
    if task.class_weights == "balanced":
        total = sum(class_counts)
        weights = [total / (built.num_classes * count) if count else 0.0 for count in class_counts]
        assert len(weights) == built.num_classes, "balanced weights need the rows of each class"
    else:
        weights = [1.0] * built.num_classes
        for label, weight in task.class_weights.items():
            weights[_class_index(label, built.num_classes, label_index)] = float(weight)
    return replace(built, class_weights=torch.tensor(weights, dtype=torch.float64))


def _class_index(label: int | str, num_classes: int, label_index: Callable[[int | str], int] | None) -> int:
    number = label_index(label) if label_index is not None else label
    if not isinstance(number, int) or not 0 <= number < num_classes:
        raise JobError(
            f"{label} is no class; there are {num_classes}",
            where=f"task.class_weights.{label}",
            fix=f"use 0 to {num_classes - 1}",
        )
    return number
