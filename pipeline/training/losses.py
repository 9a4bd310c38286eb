"""Per-sample losses: those of the tasks, and custom losses."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from pipeline.config import TaskConfig
from pipeline.errors import JobError, TrainyardError, WorkError
from pipeline.user_code import import_user_function, wrap_user_error

WHERE = "task.loss"

Reduction = Literal["none", "sum"]


class LossFn(Protocol):
    """(outputs (B, K) floating, transformed targets) -> losses (B,), or with reduction "sum" their sum, a scalar."""

    def __call__(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "none") -> Tensor: ...


def build_loss(task: TaskConfig) -> LossFn:
    """Return the loss function of a task.

    Raises
    ------
    JobError: there is no such function.
    """
    if task.loss is not None and ":" in task.loss:
        return CustomLoss(task.loss)
    if task.kind == "multiclass":
        return cross_entropy
    if task.kind == "binary":
        return binary_cross_entropy
    if task.quantiles is not None:
        return partial(pinball, quantiles=tuple(task.quantiles))
    if task.kind == "multilabel":
        return partial(_mean_over_columns, F.binary_cross_entropy_with_logits)
    if task.loss == "mae":
        return partial(_mean_over_columns, F.l1_loss)
    if task.loss == "huber":
        return partial(_mean_over_columns, partial(F.huber_loss, delta=task.huber_delta))
    return partial(_mean_over_columns, F.mse_loss)


def build_smoothed_loss(kind: str, label_smoothing: float) -> LossFn:
    """Return the loss function of multiclass or binary with `task.label_smoothing`."""
    return partial(binary_cross_entropy if kind == "binary" else cross_entropy, label_smoothing=label_smoothing)


def cross_entropy(
    outputs: Tensor, targets: Tensor, reduction: Reduction = "none", label_smoothing: float = 0.0
) -> Tensor:
    """Softmax cross-entropy; targets: classes (B,) int64, or probabilities (B, K) with mixup."""
    if targets.ndim > 1:
        targets = targets.to(outputs.dtype)
    return F.cross_entropy(outputs, targets, reduction=reduction, label_smoothing=label_smoothing)


def binary_cross_entropy(
    outputs: Tensor, targets: Tensor, reduction: Reduction = "none", label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of one logit; targets: (B,) from 0 to 1."""
    targets = targets.to(outputs.dtype)
    if label_smoothing:
        targets = smooth_binary_targets(targets, label_smoothing)
    return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets, reduction=reduction)


def smooth_binary_targets(targets: Tensor, label_smoothing: float) -> Tensor:
    """Return targets from 0 to 1 of which a share is spread evenly over both classes: the loss is then that of
    `F.cross_entropy` with the two logits 0 and z, and this `label_smoothing`."""
    return targets * (1 - label_smoothing) + label_smoothing / 2


def _mean_over_columns(loss: Any, outputs: Tensor, targets: Tensor, reduction: Reduction = "none") -> Tensor:
    """Average an elementwise loss over the columns of a target; targets: (B, K), or (B,) if K is 1."""
    losses: Tensor = loss(outputs, targets.to(outputs.dtype).view_as(outputs), reduction="none").mean(1)
    return losses.sum() if reduction == "sum" else losses


def pinball(outputs: Tensor, targets: Tensor, reduction: Reduction = "none", *, quantiles: tuple[float, ...]) -> Tensor:
    """Pinball loss (Koenker and Bassett 1978), averaged over the quantiles; outputs (B, quantiles), targets (B, 1).

    For the quantile q it is q times the error where the target is above the output, and 1 - q times where below.
    """
    errors = targets.to(outputs.dtype).view(-1, 1) - outputs
    levels = errors.new_tensor(quantiles)
    losses = torch.maximum(levels * errors, (levels - 1) * errors).mean(1)
    return losses.sum() if reduction == "sum" else losses


class CustomLoss:
    """A user function `module:function`: (outputs (B, K), transformed targets) -> losses (B,).

    Targets are int64 classes (B,), or probabilities (B, K) with mixup (multiclass); floating 0 or 1 (B,), with mixup in
    between (binary); floating 0 or 1 (B, L) (multilabel); or floating values (B, K), scaled if the task scales them
    (regression).

    Raises
    ------
    JobError: there is no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = import_user_function(name, where=WHERE, error=JobError)

    def __call__(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "none") -> Tensor:
        """Raises
        ------
        WorkError: the function raised an exception, or does not return one loss per sample.
        """
        try:
            losses = self._function(outputs, targets)
        except Exception as raised:  # any exception of the user's function is reported
            raise wrap_user_error(raised, f"{WHERE}: {self.name}", WorkError) from raised
        expected_shape = (len(outputs),)
        if not isinstance(losses, Tensor) or losses.shape != expected_shape:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise WorkError(
                f"returns {shape} for {len(outputs)} samples, but the task needs a tensor of shape {expected_shape}",
                where=f"{WHERE}: {self.name}",
                fix='return one loss per sample, as reduction="none" does',
            )
        return losses.sum() if reduction == "sum" else losses


def check_custom_loss(loss: CustomLoss, outputs: Tensor, targets: Tensor, *, has_mixup: bool) -> None:
    """Run a custom loss on a few samples before training.

    Parameters
    ----------
    outputs: (B, K) of the untrained model.
    targets: (B,) or (B, K), transformed.
    has_mixup: whether training uses mixup: classes are then given as probabilities too.

    Raises
    ------
    JobError: the loss fails, has another shape, is not differentiable with respect to the outputs, or is not finite on
        finite outputs.
    """
    if has_mixup and not targets.is_floating_point():
        mixed = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        check_custom_loss(loss, outputs, mixed, has_mixup=False)
    where = f"{WHERE}: {loss.name}"
    outputs = outputs.detach().clone().requires_grad_()
    try:
        losses = loss(outputs, targets)
    except TrainyardError as error:
        raise JobError(error.what, where=where, fix=error.fix) from error
    if not losses.requires_grad:
        raise JobError(
            "is not differentiable with respect to the outputs",
            where=where,
            fix="compute it from outputs with torch operations only",
        )
    (gradient,) = torch.autograd.grad(losses.sum(), outputs, allow_unused=True)
    for what, values in (("loss", losses), ("gradient", gradient)):
        if values is not None and outputs.isfinite().all() and not values.isfinite().all():
            nonfinite_value = values[~values.isfinite()][0].item()
            raise JobError(
                f"its {what} is {nonfinite_value} for a sample of the training split",
                where=where,
                fix="make sure that it is finite",
            )
