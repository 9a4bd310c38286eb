"""The forward and backward pass of an ensemble without autograd: the same arithmetic, in memory that is reused.

With autograd every intermediate result is in new memory, and to touch that first takes longer than the arithmetic on
it. Only the loss uses autograd, so that every loss is supported.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.config import JobConfig, MlpConfig
from pipeline.models.ensemble import EnsembleLinear, MemberDropout, MemberLinear
from pipeline.models.mlp import EnsembleMlpNet
from pipeline.models.numeric_embedding import EMBEDDING_DIM, NUM_FREQUENCIES, PeriodicEmbedding
from pipeline.training.flat_parameters import FlatParameters
from pipeline.training.task import LossSums, Task

MAX_CACHED_BATCH_SIZES = 4
"""A run has full batches and a short last one, each in full micro-batches and a short last one."""

Gradients = dict[int, Tensor]
"""The gradient of each parameter, by the `id` of the parameter."""

_threshold_backward = torch.ops.aten.threshold_backward.grad_input
_embedding_backward = torch.ops.aten.embedding_dense_backward.default


class EnsembleBackward:
    """The gradient function of an `EnsembleMlpNet` with ReLU.

    Below, K is the number of members, B the number of rows that each takes, and values are (K, B, width), as in the
    model. Dropout draws the same masks as the model.
    """

    def __init__(self, flat: FlatParameters, task: Task) -> None:
        model = flat.model
        assert isinstance(model, EnsembleMlpNet)
        self._task, self._members = task, model.members
        gradients = dict(zip(map(id, flat.parameters), flat.grads, strict=True))
        children = list(model.children())
        dropout = next((module for module in children if isinstance(module, MemberDropout)), None)
        # The division by dropout's probability of keeping a value is part of the scales of the layer above.
        scale = 1.0 if dropout is None else dropout.scale
        layers = [module for module in children if isinstance(module, EnsembleLinear)]
        self._hidden = [
            _HiddenLayer(layer, gradients, scale if depth else 1.0, dropout) for depth, layer in enumerate(layers)
        ]
        self._output = next(module for module in children if isinstance(module, MemberLinear))
        self._output_scale = scale if layers else 1.0
        self._weight_grad, self._bias_grad = gradients[id(self._output.weight)], gradients[id(self._output.bias)]
        self._inputs = _Inputs(model, gradients)

    @staticmethod
    def supports(job: JobConfig) -> bool:
        """Return whether the job's model and precision are supported."""
        model = job.model
        return (
            isinstance(model, MlpConfig)
            and model.ensemble > 1
            and model.activation == "relu"
            and not model.batch_norm
            and not model.freeze
            and job.train.precision in ("fp32", "fp64")
        )

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor, scale: Tensor | float) -> LossSums:
        inputs = inputs.flatten(1).unflatten(0, (-1, self._members)).transpose(0, 1)
        values = [self._inputs.forward(inputs)]
        for layer in self._hidden:
            values.append(layer.forward(values[-1]))
        weight = self._output.weight * self._output_scale
        outputs = torch.baddbmm(self._output.bias.unsqueeze(1), values[-1], weight.transpose(1, 2))
        sums, error = self._compute_loss(outputs.transpose(0, 1).flatten(0, 1), targets, scale)

        error = error.unflatten(0, (-1, self._members)).transpose(0, 1).contiguous()
        self._weight_grad.add_(torch.bmm(error.transpose(1, 2), values[-1]), alpha=self._output_scale)
        self._bias_grad.add_(error.sum(1))
        error = torch.bmm(error, weight)
        for layer, layer_inputs in zip(reversed(self._hidden), reversed(values[:-1]), strict=True):
            error = layer.backward(layer_inputs, error)
        self._inputs.backward(error)
        return sums

    def _compute_loss(self, outputs: Tensor, targets: Tensor, scale: Tensor | float) -> tuple[LossSums, Tensor]:
        """Return the sums of a batch, and the gradient by the outputs (B K, outputs)."""
        with torch.enable_grad():
            outputs.requires_grad_()
            sums = self._task.compute_loss_sums(outputs, targets)
            loss = sums.loss_sum if isinstance(scale, float) and scale == 1.0 else sums.loss_sum * scale
            (error,) = torch.autograd.grad(loss, outputs)
        return LossSums(sums.loss_sum.detach(), sums.weight_sum, sums.num_correct), error


class _Buffers:
    """Memory for the values of a few batch sizes, by their number of rows."""

    def __init__(self) -> None:
        self._by_rows: dict[int, dict[str, Tensor]] = {}

    def of(self, num_rows: int) -> dict[str, Tensor]:
        """Return the tensors of a batch size by name: none yet at its first use."""
        if num_rows not in self._by_rows:
            if len(self._by_rows) == MAX_CACHED_BATCH_SIZES:
                self._by_rows.pop(next(iter(self._by_rows)))
            self._by_rows[num_rows] = {}
        return self._by_rows[num_rows]


class _HiddenLayer:
    """An `EnsembleLinear`, its ReLU and its dropout.

    factor: the inputs are multiplied by it; the outputs lack dropout's factor.
    """

    def __init__(
        self, layer: EnsembleLinear, gradients: Gradients, factor: float, dropout: MemberDropout | None
    ) -> None:
        self._weight, self._bias = layer.weight.detach(), layer.bias.detach().unsqueeze(1)
        self._r, self._s = layer.r.detach().unsqueeze(1), layer.s.detach().unsqueeze(1)
        self._weight_grad, self._bias_grad = gradients[id(layer.weight)], gradients[id(layer.bias)]
        self._r_grad, self._s_grad = gradients[id(layer.r)], gradients[id(layer.s)]
        self._factor, self._dropout = factor, dropout
        self._buffers = _Buffers()

    def forward(self, values: Tensor) -> Tensor:
        """Return the outputs for `values` (K, B, in): (K, B, out), in a buffer."""
        buffers = self._buffers.of(values.shape[1])
        if not buffers:
            buffers["scaled"], buffers["input_error"] = torch.empty_like(values), torch.empty_like(values)
            products = values.new_empty(*values.shape[:2], len(self._weight))
            buffers["products"], buffers["outputs"] = products, torch.empty_like(products)
        scaled, products, outputs = buffers["scaled"], buffers["products"], buffers["outputs"]
        torch.mul(values, self._r * self._factor, out=scaled)
        torch.mm(scaled.flatten(0, 1), self._weight.t(), out=products.flatten(0, 1))
        torch.addcmul(self._bias, products, self._s, out=outputs).relu_()
        if self._dropout is not None:
            outputs.mul_(self._dropout.draw_mask(outputs))
        return outputs

    def backward(self, values: Tensor, error: Tensor) -> Tensor:
        """Add the gradient of the parameters.

        Parameters
        ----------
        values: what `forward` took.
        error: the gradient by the outputs, (K, B, out); overwritten.

        Returns
        -------
        The gradient by `values`, in a buffer.
        """
        buffers = self._buffers.of(values.shape[1])
        scaled, products, input_error = buffers["scaled"], buffers["products"], buffers["input_error"]
        _threshold_backward(error, buffers["outputs"], 0, grad_input=error)  # an output that was dropped is 0 too
        self._bias_grad.add_(error.sum(1))
        self._s_grad.add_(products.mul_(error).sum(1))
        flat_error = error.mul_(self._s).flatten(0, 1)
        self._weight_grad.addmm_(flat_error.t(), scaled.flatten(0, 1))
        torch.mm(flat_error, self._weight, out=input_error.flatten(0, 1))
        self._r_grad.add_(torch.mul(input_error, values, out=scaled).sum(1), alpha=self._factor)
        return input_error.mul_(self._r * self._factor)


class _Inputs:
    """The inputs of the first layer, embedded as `EmbeddingMlpNet.embed` does.

    The memory of an input's values of all rows is contiguous, as the embedding of numbers needs it: (width, K, B).
    """

    def __init__(self, model: EnsembleMlpNet, gradients: Gradients) -> None:
        self._numeric = getattr(model, "numeric_embedding", None)
        self._embeddings: list[nn.Embedding] = list(getattr(model, "embeddings", []))
        self._num_numbers = len(self._numeric.bias) if isinstance(self._numeric, PeriodicEmbedding) else 0
        self._gradients = gradients
        self._buffers = _Buffers()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return embedded inputs of preprocessed ones: (K, B, F) to (K, B, width), in a buffer."""
        members, num_rows, num_inputs = inputs.shape
        by_input = inputs.permute(2, 0, 1)
        begin, end = self._num_numbers * EMBEDDING_DIM, num_inputs - len(self._embeddings)
        begin_codes = begin + end - self._num_numbers
        buffers = self._buffers.of(num_rows)
        if not buffers:
            width = begin_codes + sum(embedding.embedding_dim for embedding in self._embeddings)
            buffers["values"] = inputs.new_empty(width, members, num_rows)
        values = buffers["values"]
        values[begin:begin_codes] = by_input[self._num_numbers : end]
        if self._num_numbers:
            self._embed_numbers(buffers, by_input[: self._num_numbers])
        if self._embeddings:
            buffers["codes"] = by_input[end:].long()
            sizes = [embedding.embedding_dim for embedding in self._embeddings]
            for embedding, codes, part in zip(
                self._embeddings, buffers["codes"], values[begin_codes:].split(sizes), strict=True
            ):
                part.copy_(embedding.weight[codes].permute(2, 0, 1))
        return values.permute(1, 2, 0)

    def backward(self, error: Tensor) -> None:
        """Add the gradient of the embeddings. error: the gradient by what `forward` returned."""
        buffers, by_input = self._buffers.of(error.shape[1]), error.permute(2, 0, 1)
        if self._num_numbers:
            self._add_numeric_grads(buffers, by_input[: self._num_numbers * EMBEDDING_DIM])
        if not self._embeddings:
            return
        sizes = [embedding.embedding_dim for embedding in self._embeddings]
        parts = by_input[len(by_input) - sum(sizes) :].split(sizes)
        for embedding, codes, part in zip(self._embeddings, buffers["codes"], parts, strict=True):
            grad = _embedding_backward(
                part.permute(1, 2, 0).contiguous(), codes, embedding.num_embeddings, embedding.padding_idx, False
            )
            self._gradients[id(embedding.weight)].add_(grad)

    def _embed_numbers(self, buffers: dict[str, Tensor], numbers: Tensor) -> None:
        """Write the embeddings of numbers (n, K, B) into `buffers["values"]`."""
        numeric, count = self._numeric, self._num_numbers
        assert isinstance(numeric, PeriodicEmbedding)
        entries = numbers[0].numel()
        if "angles" not in buffers:
            buffers["design"] = numbers.new_ones(count, 2, entries)  # (x, 1): products with (2 pi f, p) are angles
            buffers["angles"] = numbers.new_empty(count, NUM_FREQUENCIES, entries)
            buffers["cosines"] = torch.empty_like(buffers["angles"])
        design, values = buffers["design"], buffers["values"][: count * EMBEDDING_DIM].view(count, EMBEDDING_DIM, -1)
        design[:, 0].view(numbers.shape).copy_(numbers)
        values[:, 0] = design[:, 0]
        factors = torch.stack([2 * math.pi * numeric.frequencies, numeric.phases], 2)
        torch.cos(torch.bmm(factors, design, out=buffers["angles"]), out=buffers["cosines"])
        values[:, 1:] = torch.baddbmm(numeric.bias.unsqueeze(2), numeric.weight, buffers["cosines"])

    def _add_numeric_grads(self, buffers: dict[str, Tensor], error: Tensor) -> None:
        """Add the gradient of the numeric embedding. error: (4 n, K, B)."""
        numeric = self._numeric
        assert isinstance(numeric, PeriodicEmbedding)
        design, angles, cosines = buffers["design"], buffers["angles"], buffers["cosines"]
        error = error.reshape(self._num_numbers, EMBEDDING_DIM, -1)[:, 1:]
        self._gradients[id(numeric.weight)].add_(torch.bmm(error, cosines.transpose(1, 2)))
        self._gradients[id(numeric.bias)].add_(error.sum(2))
        negative_error = torch.bmm(numeric.weight.transpose(1, 2), error, out=cosines).mul_(angles.sin_())
        factor_grads = torch.bmm(negative_error, design.transpose(1, 2))
        self._gradients[id(numeric.frequencies)].sub_(factor_grads[:, :, 0], alpha=2 * math.pi)
        self._gradients[id(numeric.phases)].sub_(factor_grads[:, :, 1])
