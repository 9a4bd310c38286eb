"""A model's parameters as one flat vector, and the vector that the ranks all-reduce in every step.

    all_reduce_buffer = [ gradient (P) | loss, weight, correct, count (4) | stop flag (1) | floating-point buffers (B) ]

One all-reduce covers the gradient, the metrics, the agreement to stop and the batch statistics. The optimizer step is
then one operation on flat vectors, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.models.freezing import find_frozen_norms
from pipeline.training.task import LossSums

NUM_SUMS = 4
"""Length of `loss_sums`: loss, weight, correct, count."""


class FlatParameters:
    """A model on its device whose parameters are views of `params`.

    Parameters
    ----------
    code: `module:Class` of a custom model; empty for others.

    Attributes
    ----------
    params: (P,) all parameters that require a gradient, in the order of `model.parameters()`.
    param_sizes: number of elements of each of these parameters, by name, in that order.
    all_reduce_buffer: (P + 5 + B,) what the ranks all-reduce; B is 0 for a world size of 1: nothing to average.
    grad, loss_sums, stop_flag: views of `all_reduce_buffer`: (P,), (4,) and a scalar.
    loss_sum, weight_sum, num_correct, num_samples: scalar views of `loss_sums`.
    grads: the gradient of each parameter, a view of `grad` of its shape.

    Raises
    ------
    JobError: the model has no trainable parameters.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, world_size: int, code: str = ""
    ) -> None:
        self._code = code
        self.model = model.to(device, dtype)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        if not self.parameters:
            raise JobError("the model has no trainable parameters", where="model.kind")
        self.param_sizes = {name: parameter.numel() for name, parameter in trained.items()}
        self.params = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self._frozen_norms = find_frozen_norms(self.model)
        self.buffers = self._buffers_to_average() if world_size > 1 else []
        self.all_reduce_buffer = self.params.new_zeros(
            self._num_params() + NUM_SUMS + 1 + sum(b.numel() for b in self.buffers)
        )
        self.grad = self.all_reduce_buffer[: self._num_params()]
        self.loss_sums = self.all_reduce_buffer[self._num_params() : self._num_params() + NUM_SUMS]
        self.loss_sum, self.weight_sum, self.num_correct, self.num_samples = self.loss_sums.unbind()
        self.stop_flag = self.all_reduce_buffer[self._num_params() + NUM_SUMS]
        self._tail = self.all_reduce_buffer[self._num_params() + NUM_SUMS + 1 :]
        self.grads = self._split_into_views(self.grad)
        for parameter, view in zip(self.parameters, self._split_into_views(self.params), strict=True):
            parameter.data = view
        self.train()

    def train(self) -> None:
        """Set training mode, except for frozen batch normalizations."""
        self.model.train()
        for norm in self._frozen_norms:
            norm.eval()

    def accumulate(self, sums: LossSums) -> None:
        """Add the sums of one micro-batch to `all_reduce_buffer`."""
        self.loss_sum.add_(sums.loss_sum)
        self.weight_sum.add_(sums.weight_sum)
        self.num_correct.add_(sums.num_correct)

    def pack_buffers(self, num_samples: int) -> None:
        """Write the buffers, weighted by this rank's number of samples, into `all_reduce_buffer`.

        An empty slice leaves zeros: a buffer may hold an infinity, such as a mask, and 0 times infinity is NaN.
        """
        if self.buffers and num_samples:
            torch.cat([b.reshape(-1) for b in self.buffers], out=self._tail)
            self._tail.mul_(float(num_samples))

    def unpack_buffers(self) -> None:
        """Copy the average of the ranks' buffers into the model, after the all-reduce."""
        if self.buffers:
            mean = self._tail / self.num_samples
            sizes = [b.numel() for b in self.buffers]
            for buffer, average in zip(self.buffers, mean.split(sizes), strict=True):
                buffer.copy_(average.view_as(buffer))

    def find_nonfinite_grads(self) -> list[str]:
        """Return the names of the parameters whose gradient now holds NaN or infinity. Waits for the device."""
        return [
            name
            for name, grad in zip(self.param_sizes, self.grads, strict=True)
            if not bool(torch.isfinite(grad).all())
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return CPU copies of all tensors of the model, by name."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Copy tensors of the same names and shapes into the model, in place, so that the views stay views.

        Raises
        ------
        JobError: names or shapes differ.
        """
        load_state_dict_strict(self.model, state_dict, self._code)

    def _buffers_to_average(self) -> list[Tensor]:
        """Return the buffers that differ between ranks: not the frozen ones, which averaging would only round."""
        frozen = {id(buffer) for norm in self._frozen_norms for buffer in norm.buffers()}
        return [b for b in self.model.buffers() if b.is_floating_point() and id(b) not in frozen]

    def _num_params(self) -> int:
        return self.params.numel()

    def _split_into_views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


def load_state_dict_strict(model: nn.Module, state_dict: Mapping[str, Tensor], code: str = "") -> None:
    """Copy a checkpoint's tensors into a model of the same names and shapes.

    Parameters
    ----------
    code: `module:Class` of a custom model. A mismatch then means that its code has changed: a run has one model.

    Raises
    ------
    JobError: names or shapes differ.
    """
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]] or [str(error)]
        if code:
            raise JobError(
                f"the code of this model is not the code that its weights were trained with: {' '.join(lines)[:300]}",
                where=f"model.kind: {code}",
                fix="restore that code (the run's code*.zip files contain it), or train again",
            ) from None
        raise JobError(
            f"the checkpoint belongs to another model: {' '.join(lines)[:300]}",
            where="model",
            fix="use another checkpoint",
        ) from None
