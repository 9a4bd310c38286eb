"""Tasks: the loss of a batch as a weighted sum, and what counts as correct. Sums, never means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.learn.losses import Loss, OwnLoss, build_loss
from pipeline.learn.own_metrics import OwnMetric


class Sums(NamedTuple):
    """Sums over a batch, each a scalar tensor on the device; the loss keeps its graph."""

    loss: Tensor
    """Weighted sum of the samples' losses."""
    weight: Tensor | float
    """Sum of the samples' weights: what the loss is divided by."""
    correct: Tensor | float
    """Number of samples predicted correctly; NaN where a task has no such thing."""


@dataclass(frozen=True)
class Unit:
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
    outputs: int
    loss: Loss
    class_weights: Tensor | None = None
    majority: int | None = None
    means: tuple[float, ...] = ()
    unit: Unit | None = None
    metrics: tuple[OwnMetric, ...] = ()
    spreads: tuple[float, ...] = ()
    target_names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """0 for regression."""
        return {"multiclass": self.outputs, "binary": 2}.get(self.kind, 0)

    @property
    def loss_is_log_loss(self) -> bool:
        """Whether the unweighted loss of a sample is the cross-entropy."""
        return self.classes > 0 and not isinstance(self.loss, OwnLoss)

    def to(self, device: torch.device, dtype: torch.dtype) -> Task:
        """The same task with its weights on a device."""
        if self.class_weights is None:
            return self
        return replace(self, class_weights=self.class_weights.to(device, dtype))

    def weights(self, targets: Tensor) -> Tensor | None:
        """The weight of each sample: (B,), or None where all are 1. A mixed sample's is its classes' mixed weight."""
        weights = self.class_weights
        if weights is None:
            return None
        if not targets.is_floating_point():
            return weights[targets]
        targets = targets.to(weights.dtype)  # or the single weights below would take on the targets' type
        return targets @ weights if targets.ndim > 1 else weights[0] * (1 - targets) + weights[1] * targets

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | float:
        """How many of a batch are predicted correctly; the class of a mixed sample is the one it has most of."""
        if self.kind == "multiclass":
            return (outputs.argmax(1) == (targets.argmax(1) if targets.ndim > 1 else targets)).sum()
        if self.kind == "binary":
            return ((outputs.squeeze(1) > 0) == (targets > 0.5)).sum()
        return float("nan")

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """The sums of a training batch, to be differentiated by `loss`.

        outputs: (B, outputs), any floating type; losses are computed in float32 at least.
        targets: (B,) int64 classes or (B, classes) probabilities, (B,) floating from 0 to 1, or (B, T) floating values.
        """
        outputs = at_least_single(outputs)
        weights = self.weights(targets)
        correct = self.correct(outputs.detach(), targets)
        if weights is not None:
            return Sums((self.loss(outputs, targets) * weights).sum(), weights.sum(), correct)
        return Sums(self.loss(outputs, targets, "sum"), float(len(targets)), correct)


def at_least_single(outputs: Tensor) -> Tensor:
    """Outputs in float32 where they come in less."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def build_task(
    job: Job,
    classes: int,
    target_columns: int,
    *,
    class_counts: Sequence[int] = (),
    means: Sequence[float] = (),
    spreads: Sequence[float] = (),
    unit: Unit | None = None,
    number_of: Callable[[int | str], int] | None = None,
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
    outputs = {"multiclass": classes, "binary": 1, "regression": target_columns}[task.kind]
    built = Task(
        task.kind,
        outputs,
        build_loss(task),
        majority=max(range(len(class_counts)), key=lambda label: class_counts[label]) if class_counts else None,
        means=tuple(means),
        unit=unit,
        metrics=tuple(map(OwnMetric.named, job.metrics)),
        spreads=tuple(spreads),
        target_names=job.target_names(target_columns),
    )
    if task.class_weights is None:
        return built
    if task.class_weights == "balanced":
        total = sum(class_counts)
        weights = [total / (built.classes * count) if count else 0.0 for count in class_counts]
        assert len(weights) == built.classes, "balanced weights need the rows of each class"
    else:
        weights = [1.0] * built.classes
        for label, weight in task.class_weights.items():
            weights[_class_number(label, built.classes, number_of)] = float(weight)
    return replace(built, class_weights=torch.tensor(weights, dtype=torch.float64))


def _class_number(label: int | str, classes: int, number_of: Callable[[int | str], int] | None) -> int:
    number = number_of(label) if number_of is not None else label
    if not isinstance(number, int) or not 0 <= number < classes:
        raise JobError(
            f"{label} is no class; there are {classes}",
            where=f"task.class_weights.{label}",
            fix=f"use 0 to {classes - 1}",
        )
    return number
