"""`model:` what is trained."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipeline.job.node import Node, Positive, Share, module_and_name

Activation = Literal["relu", "tanh", "sigmoid", "gelu", "silu", "leaky_relu", "elu"]


class Mlp(Node):
    """Fully connected layers. Tensors are named as in `nn.Sequential(Linear, ReLU, ...)`."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[Positive] | Literal["doubling"] = [32]
    """Widths of the hidden layers; [] is logistic regression; doubling: each layer twice as wide as the one before."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """With `hidden: doubling`: the number of linear layers, the last one included."""
    activation: Activation = "relu"
    dropout: Share = 0.0
    """Share of hidden values set to zero while training."""
    batch_norm: bool = False
    """Batch normalisation before each activation."""

    @model_validator(mode="after")
    def _layers_with_doubling(self) -> Self:
        if (self.hidden == "doubling") != (self.layers is not None):
            raise ValueError("layers goes with hidden: doubling, and doubling needs layers")
        return self


class Conv(Node):
    """One convolution, its activation and its pooling."""

    channels: Positive
    kernel: Positive = 3
    padding: Annotated[int, Field(ge=0)] = 0
    pool: Positive = 2
    """Max-pooling window and stride; 1 for none."""


class Cnn(Node):
    """Convolutions, then fully connected layers."""

    kind: Literal["cnn"]
    conv: Annotated[list[Conv], Field(min_length=1)] = [
        Conv(channels=6, kernel=5),
        Conv(channels=12, kernel=5),
    ]
    hidden: list[Positive] = [120, 60]
    """Widths of the fully connected layers between the convolutions and the output."""
    activation: Activation = "relu"
    dropout: Share = 0.0
    batch_norm: bool = False


class OwnModel(Node):
    """A module of your own: `{kind: mypkg.nets:Net, args: {width: 8}}`."""

    kind: str
    """`module:Class` of an nn.Module; called with a batch of inputs, returns one row of outputs a sample."""
    args: dict[str, Any] = {}
    """Keyword arguments of the class."""

    @field_validator("kind")
    @classmethod
    def _names_a_class(cls, value: str) -> str:
        if ":" not in value:
            near = difflib.get_close_matches(value, ["mlp", "cnn"], n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"must be mlp, cnn or module:Class{hint}")
        return module_and_name(value)


def _branch_of_model(value: Any) -> str:
    """Which of the three models a mapping describes, so that its errors speak of that one alone."""
    kind = value.get("kind", "mlp") if isinstance(value, dict) else getattr(value, "kind", "mlp")
    return {"mlp": "Mlp", "cnn": "Cnn"}.get(kind, "OwnModel") if isinstance(kind, str) else "OwnModel"


Model = Annotated[
    Annotated[Mlp, Tag("Mlp")] | Annotated[Cnn, Tag("Cnn")] | Annotated[OwnModel, Tag("OwnModel")],
    Discriminator(_branch_of_model),
]
