"""The models that a job file can describe, built with the same untrained weights on every device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.job import Cnn, Job, Mlp, OwnModel
from pipeline.own_code import called

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}


class MlpNet(nn.Sequential):
    """Linear layers with activations between them. Flattens its input: (B, ...) to (B, outputs)."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = inputs.flatten(1)
        for module in self:
            outputs = module(outputs)
        return outputs


class CnnNet(nn.Module):
    """Convolutions (`features`), then linear layers (`head`): (B, C, H, W) to (B, outputs)."""

    def __init__(self, features: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.features(images).flatten(1))
        return outputs


def build_model(job: Job, input_shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """The untrained model, on the CPU in float32; its weights are a function of `seed` alone.

    Parameters
    ----------
    input_shape: shape of one preprocessed sample, such as (1, 28, 28) or (2,).
    outputs: numbers that the model gives for one sample.

    Raises
    ------
    JobError: a model that does not fit its input, or a module of the user's that cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if isinstance(job.model, Mlp):
            return mlp(job.model, input_shape, outputs)
        if isinstance(job.model, Cnn):
            return cnn(job.model, input_shape, outputs)
        return own(job.model)


def hidden_widths(spec: Mlp, inputs: int) -> list[int]:
    """Widths of the hidden layers; `doubling` gives inputs x 2, 4, 8, ... for `layers` linear layers in all."""
    if spec.hidden != "doubling":
        return list(spec.hidden)
    assert spec.layers is not None
    return [inputs * 2**depth for depth in range(1, spec.layers)]


def mlp(spec: Mlp, input_shape: tuple[int, ...], outputs: int) -> MlpNet:
    inputs = _product(input_shape)
    return MlpNet(*_dense([inputs, *hidden_widths(spec, inputs)], outputs, spec))


def cnn(spec: Cnn, input_shape: tuple[int, ...], outputs: int) -> CnnNet:
    if len(input_shape) != 3:
        raise JobError(
            f"a cnn takes images, but a sample here has the shape {input_shape}",
            where="model.kind",
            fix="use kind: mlp",
        )
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for number, conv in enumerate(spec.conv):
        layers.append(nn.Conv2d(channels, conv.channels, conv.kernel, padding=conv.padding))
        height, width = (size + 2 * conv.padding - conv.kernel + 1 for size in (height, width))
        if spec.batch_norm:
            layers.append(nn.BatchNorm2d(conv.channels))
        layers.append(ACTIVATIONS[spec.activation]())
        if conv.pool > 1:
            layers.append(nn.MaxPool2d(conv.pool))
            height, width = height // conv.pool, width // conv.pool
        channels = conv.channels
        if height < 1 or width < 1:
            raise JobError(
                f"nothing is left of images of {input_shape[1]} x {input_shape[2]} after this convolution",
                where=f"model.conv.{number}",
                fix="use fewer convolutions, smaller kernels, less pooling or more padding",
            )
    return CnnNet(
        nn.Sequential(*layers), nn.Sequential(*_dense([channels * height * width, *spec.hidden], outputs, spec))
    )


def own(spec: OwnModel) -> nn.Module:
    """A module of the user's, called with the job's `args`."""
    where = f"model.kind: {spec.kind}"
    model = called(spec.kind, spec.args, where=where, error=JobError)
    if not isinstance(model, nn.Module):
        raise JobError(f"gives a {type(model).__name__}, not an nn.Module", where=where)
    return model


def draws_at_random(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers. Unknown modules, subclasses too, are taken to."""
    plain: tuple[Any, ...] = (MlpNet, CnnNet, nn.Sequential, nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.Flatten)
    known = {*plain, nn.BatchNorm1d, nn.BatchNorm2d, *ACTIVATIONS.values()}
    return any(type(module) not in known for module in model.modules())


def _dense(widths: list[int], outputs: int, spec: Mlp | Cnn) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(widths):
        layers.append(nn.Linear(inputs, width))
        if spec.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[spec.activation]())
        if spec.dropout:
            layers.append(nn.Dropout(spec.dropout))
    return [*layers, nn.Linear(widths[-1], outputs)]


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
