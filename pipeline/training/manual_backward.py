"""The forward and backward pass of an MLP without autograd: the same arithmetic, without the graph.

Faster than eager torch on small layers, where dispatch takes longer than the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.config import JobConfig
from pipeline.training.flat_parameters import FlatParameters
from pipeline.training.losses import smooth_binary_targets
from pipeline.training.task import LossSums, Task

MAX_CACHED_BATCH_SIZES = 4
"""A run has full batches and a short last one, each in full micro-batches and a short last one."""

_threshold_backward = torch.ops.aten.threshold_backward.default


class ManualMlpBackward:
    """The gradient function of an `MlpNet` with ReLU. Activation buffers are reused between calls."""

    def __init__(self, flat: FlatParameters, task: Task) -> None:
        layers = [module for module in flat.model.modules() if isinstance(module, nn.Linear)]
        gradient = dict(zip(map(id, flat.parameters), flat.grads, strict=True))
        self._weights = [layer.weight.detach() for layer in layers]
        self._biases = [layer.bias.detach() for layer in layers]
        self._weight_grads = [gradient[id(layer.weight)] for layer in layers]
        self._bias_grads = [gradient[id(layer.bias)] for layer in layers]
        self._loss_grad: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = (
            partial(_bce_grad, label_smoothing=task.label_smoothing)
            if task.kind == "binary"
            else _SoftmaxCrossEntropyGrad(flat.params, task.label_smoothing)
        )
        self._activations: dict[int, list[Tensor]] = {}

    @staticmethod
    def supports(job: JobConfig) -> bool:
        """Return whether the job's activation, loss and precision are supported; its model has to be a plain MLP."""
        return (
            getattr(job.model, "activation", None) == "relu"
            and job.task.kind in ("multiclass", "binary")
            and job.task.class_weights is None
            and job.task.loss is None
            and not job.data.augment.mixup
            and job.train.precision in ("fp32", "fp64")
        )

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, targets: Tensor, scale: Tensor | float) -> LossSums:
        values = [inputs.flatten(1), *self._activation_buffers(len(inputs))]
        last = len(self._weights) - 1
        for depth, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            torch.addmm(bias, values[depth], weight.t(), out=values[depth + 1])
            if depth < last:
                values[depth + 1].relu_()
        loss, correct, error = self._loss_grad(values[-1], targets)
        for depth in range(last, -1, -1):
            self._weight_grads[depth].addmm_(error.t(), values[depth])
            self._bias_grads[depth].add_(error.sum(0))
            if depth:
                error = _threshold_backward(error @ self._weights[depth], values[depth], 0)
        return LossSums(loss, float(len(inputs)), correct)

    def _activation_buffers(self, num_samples: int) -> list[Tensor]:
        if num_samples not in self._activations:
            if len(self._activations) == MAX_CACHED_BATCH_SIZES:
                self._activations.pop(next(iter(self._activations)))
            self._activations[num_samples] = [bias.new_empty(num_samples, len(bias)) for bias in self._biases]
        return self._activations[num_samples]


class _SoftmaxCrossEntropyGrad:
    def __init__(self, like: Tensor, label_smoothing: float) -> None:
        self._label_share = like.new_full((1, 1), label_smoothing - 1.0)
        self._label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed cross-entropy, the number correct, and the gradient by the logits (B, classes)."""
        log_probabilities = torch.log_softmax(logits, 1)
        columns, smoothing = targets.unsqueeze(1), self._label_smoothing
        loss = nn.functional.nll_loss(log_probabilities, targets, reduction="sum")
        correct = (logits.argmax(1) == targets).sum()
        if smoothing:
            loss = (1 - smoothing) * loss - smoothing / logits.shape[1] * log_probabilities.sum()
        error = log_probabilities.exp_().scatter_add_(1, columns, self._label_share.expand(len(targets), 1))
        return loss, correct, error.sub_(smoothing / logits.shape[1]) if smoothing else error


def _bce_grad(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed BCE with logits, the number correct, and the gradient by the logits (B, 1)."""
    column = targets.unsqueeze(1).to(logits.dtype)
    correct = ((logits > 0) == (column > 0.5)).sum()
    if label_smoothing:
        column = smooth_binary_targets(column, label_smoothing)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, column, reduction="sum")
    return loss, correct, logits.sigmoid().sub_(column)
