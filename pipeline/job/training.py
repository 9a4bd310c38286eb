"""`task:` and `train:` what is learned, and how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from pipeline.job.node import Node, Positive, Share, module_and_name


def _number_if_it_is_one(label: Any) -> Any:
    is_number = isinstance(label, str) and re.fullmatch("0|-?[1-9][0-9]*", label)  # 007 is a text
    return int(label) if is_number else label


Label = Annotated[int | str, BeforeValidator(_number_if_it_is_one)]
"""A class: its label, or its name; the keys of JSON and of `--set` are text."""


class Task(Node):
    """What is learned: the loss, and what counts as correct."""

    kind: Literal["multiclass", "binary", "regression"] = "multiclass"
    """multiclass: softmax cross-entropy. binary: one logit, BCE. regression: mean squared error."""
    positive: list[int | bool | str] | None = None
    """binary: the labels that count as 1, such as [0, 1, 2] or [yes]; the others are 0. By default the later one of two
    numbers: 1 of 0 and 1, and of -1 and 1."""
    class_weights: Literal["balanced"] | dict[Label, Annotated[float, Field(gt=0)]] | None = None
    """Weight of each class in the loss, by its label; balanced: inversely to its rows in the training split."""
    loss: str | None = None
    """Another loss: regression has mse, mae and huber; or `module:function` of your own, (outputs, targets) -> (B,)."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """huber: where the loss goes over from squares to absolute values, in the unit that is learned."""
    scale_targets: bool = True
    """regression: learn (target - mean) / std of the training rows. Metrics and predictions stay in the target's unit
    (of several targets, rmse and mae are in standard deviations beside those of each); the loss is that of what is
    learned."""

    @field_validator("loss")
    @classmethod
    def _names_a_loss(cls, value: str | None) -> str | None:
        return value if value is None or value in REGRESSION_LOSSES else module_and_name(value)

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.positive is not None and self.kind != "binary":
            raise ValueError("positive goes with kind: binary")
        if self.class_weights is not None and self.kind == "regression":
            raise ValueError("class_weights goes with multiclass and binary")
        if self.loss in REGRESSION_LOSSES and self.kind != "regression":
            raise ValueError(f"loss: {self.loss} goes with kind: regression")
        return self


REGRESSION_LOSSES = ("mse", "mae", "huber")


class Group(Node):
    """Parameters with a rate of their own: `{match: "layer4.*", lr_factor: 0.1}`."""

    match: str
    """Name of parameters, or a pattern; the first group that matches counts."""
    lr_factor: Annotated[float, Field(ge=0)] = 1.0
    """Times the phase's learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Instead of the optimizer's."""


class Optimizer(Node):
    """The update rule; the learning rate stands in the phases."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Share = 0.0
    """sgd only."""
    nesterov: bool = False
    """sgd only; needs momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[tuple[Share, Share], Strict(False)] = (0.9, 0.999)
    """adam and adamw only."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """adam and adamw only."""
    groups: list[Group] = []
    """Parameters that learn at another rate than the rest."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum")
        if self.kind != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov go with kind: sgd, not {self.kind}")
        return self


class Phase(Node):
    """A stretch of epochs or steps with its own learning rate."""

    epochs: Positive | None = None
    steps: Positive | None = None
    lr: Annotated[float, Field(gt=0)]
    """Learning rate; with a schedule, its highest value."""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """How the rate moves within the phase. step: times `factor` every `every_epochs`; cosine: down to 0;
    one_cycle: up from lr/25 over the first 30 % and down to lr/250,000 (the rate's part of Smith's 1cycle)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear rise from 0 at the phase's start."""
    every_epochs: Positive = 1
    """With schedule: step."""
    factor: Annotated[float, Field(gt=0)] = 0.1
    """With schedule: step."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Whether momentum and moments go over from the phase before."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a phase has either epochs or steps")
        return self


class Train(Node):
    """The training loop."""

    batch_size: Positive | Literal["all"] = 100
    """Rows of one update, over all workers together; all: the whole training split."""
    micro_batch: Positive | None = None
    """Accumulate gradients in pieces of this many rows on each worker, to save memory."""
    optimizer: Optimizer = Optimizer()
    phases: Annotated[list[Phase], Field(min_length=1)] = [Phase(epochs=5, lr=0.5), Phase(epochs=5, lr=0.1)]
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Scale the whole gradient down to this norm where it is larger."""
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    """Type of the arithmetic; bf16 and fp16 keep fp32 weights, fp16 scales the loss."""
    compile: Literal["auto", "off", "on"] = "auto"
    """Compile the step with torch.compile; auto decides by the job and the device."""

    @field_validator("compile", mode="before")
    @classmethod
    def _as_word(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
