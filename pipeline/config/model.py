"""`model:` the model to train."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipeline.config.base import ConfigNode, Fraction, Positive, format_suggestion, validate_import_path

Activation = Literal["relu", "tanh", "sigmoid", "gelu", "silu", "leaky_relu", "elu"]

MAX_EMBEDDING_DIM = 50
"""Maximum embedding dimension of `embedding_width: auto`."""


class InitConfig(ConfigNode):
    """Initial weights, and which of them are not trained."""

    init_from: str | None = None
    """A run to start from, by its weights: its name in the storage, its URL, or its path (with a slash in it; relative
    to the job file), followed by @best (the default), @last or @STEP. null: weights drawn at random."""
    strict: bool = True
    """With init_from: true requires that all tensors fit; false loads those that fit and skips the others."""
    freeze: Literal["backbone"] | list[str] = []
    """Parameters that are not trained, by name or pattern such as layer1.*; backbone: all but those of the last
    layer."""


class MlpConfig(InitConfig):
    """Fully connected layers. Tensors are named as in `nn.Sequential(Linear, ReLU, ...)`."""

    kind: Literal["mlp"] = "mlp"
    """A multilayer perceptron."""
    hidden: Annotated[list[Positive], Field(max_length=1000)] | Literal["doubling"] = [32]
    """Widths of the hidden layers; [] is logistic (or linear) regression; doubling: each layer is twice as wide as the
    one before."""
    layers: Annotated[int, Field(ge=1, le=64)] | None = None
    """With `hidden: doubling`: the number of linear layers, the last one included."""
    activation: Activation = "relu"
    """The activation function after each hidden layer."""
    dropout: Fraction = 0.0
    """Fraction of the hidden values that are set to zero during training."""
    batch_norm: bool = False
    """Batch normalization before each activation."""
    embedding_width: Positive | Literal["auto"] = "auto"
    """Width of the embedding of a categorical column that is not one-hot; auto: min(50, 1.6 x categories^0.56)
    (fastai's rule)."""
    ensemble: Positive = 1
    """Number of networks that are trained at once and whose predictions are averaged, as in TabM (arXiv 2410.24210):
    they share weight matrices, and each has its own scales, biases, output layer and order of the rows. A step takes
    batch_size rows for each of them. 1: a single network."""
    numeric_embedding: Literal["none", "periodic", "piecewise"] = "none"
    """What the network gets of each number of a table. none: the number. periodic: also 3 trained values computed from
    16 cosines of it, as in RealMLP (arXiv 2407.04491). piecewise: its piecewise-linear encoding by up to 32
    bins between quantiles of the training rows (arXiv 2203.05556), whatever `data.normalize` is."""

    def embedding_dim(self, num_codes: int) -> int:
        """Return the width of an embedding for a number of codes; `auto` is fastai's `emb_sz_rule`, at most 50, not
        600."""
        if self.embedding_width != "auto":
            return self.embedding_width
        return min(MAX_EMBEDDING_DIM, round(1.6 * math.pow(num_codes, 0.56)))

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if (self.hidden == "doubling") != (self.layers is not None):
            raise ValueError("layers goes with hidden: doubling, and doubling needs layers")
        return self


class ConvConfig(ConfigNode):
    """One convolution, its activation and its pooling."""

    channels: Positive
    """Output channels."""
    kernel: Positive = 3
    """Side of the square kernel, in pixels."""
    padding: Annotated[int, Field(ge=0)] = 0
    """Pixels of zeros added on each side."""
    pool: Positive = 2
    """Window and stride of the max-pooling, in pixels; 1 for none."""


class CnnConfig(InitConfig):
    """Convolutions, then fully connected layers."""

    kind: Literal["cnn"]
    """A convolutional network."""
    conv: Annotated[list[ConvConfig], Field(min_length=1)] = [
        ConvConfig(channels=6, kernel=5),
        ConvConfig(channels=12, kernel=5),
    ]
    """The convolutions, in order."""
    hidden: list[Positive] = [120, 60]
    """Widths of the fully connected layers between the convolutions and the output."""
    activation: Activation = "relu"
    """The activation function after each convolution and each hidden layer."""
    dropout: Fraction = 0.0
    """Fraction of the hidden layers' values that are set to zero during training."""
    batch_norm: bool = False
    """Batch normalization before each activation."""


class TorchvisionModelConfig(InitConfig):
    """A model of torchvision with its last layer replaced to fit: `{kind: torchvision:resnet18, weights: DEFAULT}`."""

    kind: str
    """torchvision:NAME, with a name from `torchvision.models.list_models(module=torchvision.models)`."""
    weights: str | None = None
    """DEFAULT or another name of torchvision's pretrained weights, or a file of them, relative to the job file. null:
    weights drawn at random."""
    args: dict[str, Any] = {}
    """Further keyword arguments of the model, such as dropout."""


class CustomModelConfig(InitConfig):
    """A module of your own: `{kind: mypkg.nets:Net, args: {width: 8}}`."""

    kind: str
    """`module:Class` of an nn.Module. Called with a batch of inputs, it returns one row of outputs per sample."""
    args: dict[str, Any] = {}
    """Keyword arguments of the class. A text `env:NAME` becomes the value of that environment variable."""

    @field_validator("kind")
    @classmethod
    def _validate_kind(cls, value: str) -> str:
        if ":" not in value:
            hint = format_suggestion(value, ["mlp", "cnn"])
            raise ValueError(f"must be mlp, cnn, torchvision:NAME or module:Class{hint}")
        return validate_import_path(value)


def _model_tag(value: Any) -> str:
    """Return the class that a mapping describes; errors are then those of that class alone."""
    kind = value.get("kind", "mlp") if isinstance(value, dict) else getattr(value, "kind", "mlp")
    if isinstance(kind, str) and kind.startswith("torchvision:"):
        return "TorchvisionModelConfig"
    return (
        {"mlp": "MlpConfig", "cnn": "CnnConfig"}.get(kind, "CustomModelConfig")
        if isinstance(kind, str)
        else "CustomModelConfig"
    )


ModelConfig = Annotated[
    Annotated[MlpConfig, Tag("MlpConfig")]
    | Annotated[CnnConfig, Tag("CnnConfig")]
    | Annotated[TorchvisionModelConfig, Tag("TorchvisionModelConfig")]
    | Annotated[CustomModelConfig, Tag("CustomModelConfig")],
    Discriminator(_model_tag),
]
