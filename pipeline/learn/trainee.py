"""The model in training on one rank: its two half steps, its evaluation, and all the state that a checkpoint needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pipeline.device import Arithmetic
from pipeline.errors import JobError
from pipeline.job import Job, OwnModel
from pipeline.learn.flat import FlatModel
from pipeline.learn.models import draws_at_random
from pipeline.learn.optimizers import Optimizer
from pipeline.learn.scaling import LossScale
from pipeline.learn.task import Task
from pipeline.learn.ways import build_way

CLIP_EPSILON = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""


class Trainee:
    """One rank's copy of the model.

    Between `gradient` and `update` the ranks sum `flat.exchange`; a world of one has nothing to sum. Parameters,
    moments and loss scale are the same bits on all ranks after every step.

    Parameters
    ----------
    prepare: raw batch (B, ...) on the device to model inputs (B, ...) in the arithmetic's type.
    way: name of the way to run a step, see `ways`.
    draw_seed: seed of what the model draws in a step; called only for models that draw.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        task: Task,
        prepare: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        way: str,
        world_size: int = 1,
        draw_seed: Callable[[int], int],
    ) -> None:
        self._job = job
        self.device = device
        self._arithmetic = Arithmetic.of(job.train.precision, device)
        self._prepare = prepare
        self._draw_seed = draw_seed if draws_at_random(model) else None
        code = job.model.kind if isinstance(job.model, OwnModel) else ""
        self.flat = FlatModel(model, device, self._arithmetic.dtype, world_size, code)
        self.task = task.to(device, self._arithmetic.dtype)
        self.optimizer = Optimizer(job.train.optimizer, self.flat.values, self.flat.sizes)
        self._scale = LossScale(device) if self._arithmetic.scales_loss else None
        self._way = build_way(way, self.flat, self.task, self._arithmetic, device)

    def gradient(self, step: int, inputs: Tensor, targets: Tensor) -> None:
        """The first half of a step: this rank's weighted sums into `flat.exchange`. An empty share adds nothing.

        inputs: (b, ...) this rank's share of the global batch, raw, on the device.
        targets: (b,) or (b, T), on the device.
        """
        if not self.flat.model.training:
            self.flat.train()
        self.flat.exchange.zero_()
        num_rows = len(targets)
        if num_rows:
            if self._draw_seed is not None:
                torch.manual_seed(self._draw_seed(step))
            scale = self._scale.factor / num_rows if self._scale is not None else 1.0
            for micro_batch_inputs, micro_batch_targets in self._pieces(inputs, targets):
                self.flat.add(self._way(self._prepare(micro_batch_inputs), micro_batch_targets, scale))
            if self._scale is not None:
                self.flat.gradient.mul_(num_rows / self._scale.factor)
            self.flat.count.fill_(num_rows)
        self.flat.pack_buffers(num_rows)

    @property
    def scale_state(self) -> dict[str, Tensor]:
        """For fp16 what the log notes of each step: the loss scale that it uses, and the updates skipped before it.
        Scalars on the device."""
        if self._scale is None:
            return {}
        return {"loss_scale": self._scale.factor, "skipped": self._scale.state["skipped"]}

    def _pieces(self, inputs: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        size = self._job.train.micro_batch
        if size is None:
            return ((inputs, targets),)
        return zip(inputs.split(size), targets.split(size), strict=True)

    def update(self, lr: float) -> None:
        """The second half: divide by the global weight, clip, and change the parameters."""
        grad = self.flat.gradient
        grad.div_(self.flat.weight)
        if self._job.train.clip_norm is not None:
            norm = torch.linalg.vector_norm(grad)
            grad.mul_((self._job.train.clip_norm / (norm + CLIP_EPSILON)).clamp_(max=1.0))
        found_inf = self._scale.found_inf(grad) if self._scale is not None else None
        self.optimizer.update(grad, lr, found_inf)
        if self._scale is not None and found_inf is not None:
            self._scale.update(found_inf)
        self.flat.unpack_buffers()

    @torch.inference_mode()
    def outputs(self, inputs: Tensor) -> Tensor:
        """What the model gives in evaluation: (B, ...) raw inputs to (B, outputs).

        Raises
        ------
        JobError: a model of the user's whose outputs have another shape.
        """
        self.flat.model.eval()
        with self._arithmetic.context(self.device):
            outputs: Tensor = self.flat.model(self._prepare(inputs))
        expected_shape = (len(inputs), self.task.outputs)
        if outputs.shape != expected_shape:
            raise JobError(
                f"gives outputs of shape {tuple(outputs.shape)} for {len(inputs)} samples, but the task needs {expected_shape}",
                where=f"model.kind: {self._job.model.kind}",
            )
        return outputs

    def state(self) -> dict[str, Tensor]:
        """Copies of all that training goes on from besides the weights: tensors on the CPU."""
        state = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state.items()}
        if self._scale is not None:
            state |= {f"scale.{name}": tensor for name, tensor in self._scale.state.items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Go on from what `flat.weights()` and `state()` gave.

        Raises
        ------
        JobError: that of another model or optimizer.
        """
        self.flat.load(weights)
        try:
            self.optimizer.load(_of("optimizer.", state))
            if self._scale is not None:
                self._scale.load(_of("scale.", state))
        except (RuntimeError, KeyError, TypeError) as error:
            what = f"the checkpoint is of another optimizer: {type(error).__name__}: {str(error)[:200]}"
            raise JobError(what, where="train.optimizer", fix="use another --name") from None


def _of(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
