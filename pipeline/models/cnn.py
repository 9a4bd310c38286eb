"""`kind: cnn`: convolutions, then fully connected layers."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.config import CnnConfig
from pipeline.errors import JobError
from pipeline.models.mlp import ACTIVATIONS, build_dense_layers


class CnnNet(nn.Module):
    """Convolutions (`features`), then linear layers (`head`): (B, C, H, W) to (B, outputs)."""

    def __init__(self, features: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.features(images).flatten(1))
        return outputs


def build_cnn(config: CnnConfig, input_shape: tuple[int, ...], outputs: int) -> CnnNet:
    """Build a `CnnNet`.

    Raises
    ------
    JobError: a convolution or pooling layer reduces the images to nothing.
    """
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for number, conv in enumerate(config.conv):
        layers.append(nn.Conv2d(channels, conv.channels, conv.kernel, padding=conv.padding))
        height, width = (size + 2 * conv.padding - conv.kernel + 1 for size in (height, width))
        if config.batch_norm:
            layers.append(nn.BatchNorm2d(conv.channels))
        layers.append(ACTIVATIONS[config.activation]())
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
        nn.Sequential(*layers),
        nn.Sequential(*build_dense_layers([channels * height * width, *config.hidden], outputs, config)),
    )
