"""The training engine of one rank: forward-backward, optimizer step, prediction, and the state for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pipeline.config import CustomModelConfig, JobConfig
from pipeline.device import Precision
from pipeline.errors import JobError
from pipeline.models import uses_rng
from pipeline.models.weight_matrices import find_weight_matrices
from pipeline.training.flat_parameters import FlatParameters
from pipeline.training.gradient_fns import build_gradient_fn
from pipeline.training.optimizers import GradScaler, Optimizer
from pipeline.training.task import Task

CLIP_EPSILON = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""


class TrainEngine:
    """One rank's replica of the model, with its optimizer.

    Between `forward_backward` and `optimizer_step` the ranks all-reduce `flat.all_reduce_buffer`; with a world size of
    1 there is nothing to reduce. After every step parameters, optimizer state and loss scale are bit-identical on all
    ranks.

    Parameters
    ----------
    transform_fn: maps a raw batch (B, ...) on the device to model inputs (B, ...) of the dtype of the run's precision.
    gradient_backend: execution backend of the gradient, see `gradient_fns`.
    rng_seed_fn: maps a step to the seed of its random numbers; called only for models that use random numbers.
    """

    def __init__(
        self,
        job: JobConfig,
        model: nn.Module,
        task: Task,
        transform_fn: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        gradient_backend: str,
        world_size: int = 1,
        rng_seed_fn: Callable[[int], int],
    ) -> None:
        self._job = job
        self.members = job.members
        self.device = device
        self._precision = Precision.from_name(job.train.precision, device)
        self._transform_fn = transform_fn
        self._rng_seed_fn = rng_seed_fn if uses_rng(model) else None
        code = job.model.kind if isinstance(job.model, CustomModelConfig) else ""
        self.flat = FlatParameters(model, device, self._precision.dtype, world_size, code)
        self.task = task.to(device, self._precision.dtype)
        self.optimizer = Optimizer(
            job.train.optimizer, self.flat.params, self.flat.param_sizes, find_weight_matrices(self.flat.model)
        )
        self._grad_scaler = GradScaler(device) if self._precision.scales_loss else None
        self._gradient_fn = build_gradient_fn(gradient_backend, self.flat, self.task, self._precision, device)

    def forward_backward(self, step: int, inputs: Tensor, targets: Tensor) -> None:
        """Write this rank's gradient and weighted sums into `flat.all_reduce_buffer`; zeros for an empty slice.

        Parameters
        ----------
        inputs: (b, ...) this rank's slice of the global batch, before preprocessing, on the device. For an ensemble, b
            is the number of rows times that of members, see `GlobalBatchSampler`; all of them are weighted equally.
        targets: (b,) or (b, T), on the device.
        """
        if not self.flat.model.training:
            self.flat.train()
        self.flat.all_reduce_buffer.zero_()
        num_samples = len(targets)
        if num_samples:
            if self._rng_seed_fn is not None:
                self._seed_generators(self._rng_seed_fn(step))
            scale = self._grad_scaler.scale / num_samples if self._grad_scaler is not None else 1.0
            for micro_batch_inputs, micro_batch_targets in self._micro_batches(inputs, targets):
                self.flat.accumulate(
                    self._gradient_fn(self._transform_fn(micro_batch_inputs), micro_batch_targets, scale)
                )
            if self._grad_scaler is not None:
                self.flat.grad.mul_(num_samples / self._grad_scaler.scale)
            self.flat.num_samples.fill_(num_samples)
        self.flat.pack_buffers(num_samples)

    @property
    def scaler_state(self) -> dict[str, Tensor]:
        """What is logged at each step of an fp16 run: its loss scale, and the number of updates skipped before it.

        Scalars on the device; empty for other precisions.
        """
        if self._grad_scaler is None:
            return {}
        return {"loss_scale": self._grad_scaler.scale, "skipped": self._grad_scaler.state["skipped"]}

    def _micro_batches(self, inputs: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        size = self._job.train.micro_batch
        if size is None:
            return ((inputs, targets),)
        size *= self.members
        return zip(inputs.split(size), targets.split(size), strict=True)

    def _seed_generators(self, seed: int) -> None:
        """Seed torch's random generators of the CPU and of this device."""
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed, which looks at every device, 165 us
        else:
            torch.manual_seed(seed)

    def optimizer_step(self, lr: float) -> None:
        """Divide the gradient by the global batch's weight, clip it, and update the parameters."""
        grad = self.flat.grad
        grad.div_(self.flat.weight_sum)
        if self._job.train.clip_norm is not None:
            norm = torch.linalg.vector_norm(grad)
            grad.mul_((self._job.train.clip_norm / (norm + CLIP_EPSILON)).clamp_(max=1.0))
        found_inf = self._grad_scaler.found_inf(grad) if self._grad_scaler is not None else None
        self.optimizer.step(grad, lr, found_inf)
        if self._grad_scaler is not None and found_inf is not None:
            self._grad_scaler.update(found_inf)
        self.flat.unpack_buffers()

    @torch.inference_mode()
    def predict_logits(self, inputs: Tensor) -> Tensor:
        """Return the model's outputs (B, outputs) in evaluation mode for inputs (B, ...) before preprocessing.

        Raises
        ------
        JobError: the outputs of a custom model have another shape.
        """
        self.flat.model.eval()
        with self._precision.autocast_context(self.device):
            outputs: Tensor = self.flat.model(self._transform_fn(inputs))
        expected_shape = (len(inputs), self.task.num_outputs)
        if outputs.shape != expected_shape:
            raise JobError(
                f"returns outputs of shape {tuple(outputs.shape)} for {len(inputs)} samples, but the task needs "
                f"{expected_shape}",
                where=f"model.kind: {self._job.model.kind}",
            )
        return outputs

    def state_dict(self) -> dict[str, Tensor]:
        """Return CPU copies of the training state besides the weights: optimizer and loss scale."""
        state = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state.items()}
        if self._grad_scaler is not None:
            state |= {f"scale.{name}": tensor for name, tensor in self._grad_scaler.state.items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def load_state_dict(self, model_state: dict[str, Tensor], engine_state: dict[str, Tensor]) -> None:
        """Restore what `flat.state_dict()` and `state_dict()` returned.

        Raises
        ------
        JobError: the state is of another model or optimizer.
        """
        self.flat.load_state_dict(model_state)
        try:
            self.optimizer.load_state_dict(_strip_prefix("optimizer.", engine_state))
            if self._grad_scaler is not None:
                self._grad_scaler.load_state_dict(_strip_prefix("scale.", engine_state))
        except (RuntimeError, KeyError, TypeError) as error:
            what = f"the checkpoint belongs to another optimizer: {type(error).__name__}: {str(error)[:200]}"
            raise JobError(what, where="train.optimizer", fix="use another --name") from None


def _strip_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
