"""Tasks: the loss of a batch as a weighted sum, and what counts as correct. Sums, never means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from pipeline import job as spec
from pipeline.errors import JobError


class Sums(NamedTuple):
    """Sums over a batch, each a scalar tensor on the device; the loss keeps its graph."""

    loss: Tensor
    """Weighted sum of the samples' losses."""
    weight: Tensor | float
    """Sum of the samples' weights: what the loss is divided by."""
    correct: Tensor | float
    """Number of samples predicted correctly; NaN where a task has no such thing."""


@dataclass(frozen=True)
class Task:
    """What is learned.

    kind: multiclass, binary or regression.
    outputs: numbers the model gives for a sample.
    class_weights: (classes,), or None.
    """

    kind: str
    outputs: int
    class_weights: Tensor | None = None

    @property
    def counts_correct(self) -> bool:
        return self.kind != "regression"

    def to(self, device: torch.device, dtype: torch.dtype) -> Task:
        """The same task with its weights on a device."""
        if self.class_weights is None:
            return self
        return Task(self.kind, self.outputs, self.class_weights.to(device, dtype))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The unweighted loss of each sample: (B,), in the outputs' type."""
        if self.kind == "multiclass":
            return F.cross_entropy(outputs, targets, reduction="none")
        targets = targets.to(outputs.dtype)
        if self.kind == "binary":
            return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets, reduction="none")
        return F.mse_loss(outputs, targets.view_as(outputs), reduction="none").mean(1)

    def weights(self, targets: Tensor) -> Tensor | None:
        """The weight of each sample: (B,), or None where all are 1."""
        return None if self.class_weights is None else self.class_weights[targets.long()]

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | float:
        """How many of a batch are predicted correctly."""
        if self.kind == "multiclass":
            return (outputs.argmax(1) == targets).sum()
        if self.kind == "binary":
            return ((outputs.squeeze(1) > 0) == (targets > 0.5)).sum()
        return float("nan")

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """The sums of a training batch, to be differentiated by `loss`.

        outputs: (B, outputs), any floating type; losses are computed in float32 at least.
        targets: (B,) int64 classes, (B,) floating 0 or 1, or (B, T) floating values.
        """
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()
        weights = self.weights(targets)
        if weights is not None:
            loss, weight = (self.losses(outputs, targets) * weights).sum(), weights.sum()
            return Sums(loss, weight, self.correct(outputs.detach(), targets))
        if self.kind == "multiclass":
            loss = F.cross_entropy(outputs, targets, reduction="sum")
        elif self.kind == "binary":
            goals = targets.to(outputs.dtype)
            loss = F.binary_cross_entropy_with_logits(outputs.squeeze(1), goals, reduction="sum")
        else:
            loss = self.losses(outputs, targets).sum()
        return Sums(loss, float(len(targets)), self.correct(outputs.detach(), targets))

    def exact_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sums of an evaluation batch: (3,) loss, weight, correct in float64, if need be on the host."""
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()
        losses, weights = _exact(self.losses(outputs, targets)), self.weights(targets)
        correct = _exact(torch.as_tensor(self.correct(outputs, targets), device=outputs.device))
        if weights is None:
            return torch.stack([losses.sum(), losses.new_tensor(float(len(targets))), correct])
        weights = _exact(weights)
        return torch.stack([(losses * weights).sum(), weights.sum(), correct])


def _exact(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()


def build_task(task: spec.Task, classes: int, target_columns: int, class_counts: list[int] | None = None) -> Task:
    """The task of a job.

    Parameters
    ----------
    classes: number of classes (multiclass).
    target_columns: numbers in one target (regression).
    class_counts: rows of each class in the training split; for `class_weights: balanced`, n / (classes x rows of the
        class), as scikit-learn defines it.

    Raises
    ------
    JobError: a weight for a class that there is not.
    """
    outputs = {"multiclass": classes, "binary": 1, "regression": target_columns}[task.kind]
    if task.class_weights is None:
        return Task(task.kind, outputs)
    classes = 2 if task.kind == "binary" else classes
    if task.class_weights == "balanced":
        assert class_counts is not None
        total = sum(class_counts)
        weights = [total / (classes * count) if count else 0.0 for count in class_counts]
    else:
        for label in task.class_weights:
            if not 0 <= label < classes:
                raise JobError(
                    f"{label} is no class; there are {classes}",
                    where=f"task.class_weights.{label}",
                    fix=f"use 0 to {classes - 1}",
                )
        weights = [float(task.class_weights.get(label, 1.0)) for label in range(classes)]
    return Task(task.kind, outputs, torch.tensor(weights, dtype=torch.float64))
