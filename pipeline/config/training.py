"""`task:` and `train:` the task, and how to train for it."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from pipeline.config.base import ConfigNode, Fraction, Positive, validate_import_path


def _parse_integer_label(label: Any) -> Any:
    is_number = isinstance(label, str) and re.fullmatch("0|-?[1-9][0-9]*", label)  # 007 is text
    return int(label) if is_number or isinstance(label, bool) else label


Label = Annotated[int | str, BeforeValidator(_parse_integer_label)]
"""A class by its label or its name. Keys in JSON and in `--set` are text, so that `1` there is the label 1."""


class ErrorCostsConfig(ConfigNode):
    """What one wrong prediction costs; only the ratio of the two matters."""

    false_positive: Annotated[float, Field(gt=0)]
    """Cost of predicting the positive class for a negative row."""
    false_negative: Annotated[float, Field(gt=0)]
    """Cost of predicting the negative class for a positive row."""


class ThresholdConfig(ConfigNode):
    """A rule that chooses the threshold: either cost or recall."""

    cost: ErrorCostsConfig | None = None
    """The threshold with the lowest total cost, such as {false_positive: 1, false_negative: 5}."""
    recall: Annotated[float, Field(gt=0, le=1)] | None = None
    """The highest threshold whose recall is at least this."""

    @model_validator(mode="after")
    def _check_one_rule(self) -> Self:
        if (self.cost is None) == (self.recall is None):
            raise ValueError("give either cost or recall")
        return self


ThresholdRule = Literal["f1"] | ThresholdConfig
"""How a threshold is chosen."""


class TaskConfig(ConfigNode):
    """The task: its targets, its loss and its metrics. `task: binary` is short for `task: {kind: binary}`."""

    kind: Literal["multiclass", "binary", "multilabel", "regression"] = "multiclass"
    """multiclass: softmax cross-entropy. binary: one logit and binary cross-entropy. multilabel: several label columns
    of two values each, for example 0 and 1, one logit and binary cross-entropy for each; of text, the later value in
    sorted order is positive. regression: mean squared error."""
    positive: list[int | bool | str] | None = None
    """binary: the labels of the positive class, such as [0, 1, 2] or [yes]. By default, of two labels the later one in
    sorted order: 1 of 0 and 1, 2 of 1 and 2, true of false and true, yes of no and yes."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["f1"] | ThresholdConfig = 0.5
    """binary: the probability above which a row is predicted positive: a number, or a rule by which each evaluation
    chooses it on the validation split, exactly: f1, the largest F1 score; {cost: {false_positive: 1, false_negative:
    5}}, the lowest cost; or {recall: 0.9}, the highest threshold that keeps this recall. A checkpoint stores the
    threshold of its evaluation, and `load`, `predict` and `evaluate` use it; metrics during training are those at 0.5,
    beside the column threshold."""
    class_weights: Literal["balanced"] | dict[Label, Annotated[float, Field(gt=0)]] | None = None
    """Weight of each class in the loss, by its label, such as {0: 1, 1: 5}; balanced: inversely proportional to its
    number of rows in the training split; null: all equal."""
    label_smoothing: Fraction = 0.0
    """multiclass and binary: the share of each training label that is spread evenly over all classes (arXiv
    1512.00567). For the training loss only: the loss of evaluations is without it, so that runs can be compared."""
    loss: str | None = None
    """A loss other than the default of the kind. regression: mse, mae or huber. Any kind: `module:function` of your
    own, which takes outputs and targets of a batch of B rows and returns B losses."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """With loss: huber, the error at which the loss changes from quadratic to linear; with scale_targets, in standard
    deviations."""
    quantiles: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] | None = None
    """regression of one label: predict these quantiles, such as [0.1, 0.5, 0.9], instead of the mean, by the pinball
    loss. Predictions are sorted, so that quantiles never cross. `predict` writes prediction_q10, prediction_q50 and so
    on, and prediction, the median, if 0.5 is one of them. Metrics tell how many rows are at or below each quantile
    (coverage_q10), and within the outer two (coverage)."""
    scale_targets: bool = True
    """regression: train on (target - mean) / std, with mean and std of the training rows. Metrics and predictions are
    in the target's unit (with several targets, rmse and mae are in standard deviations, beside those of each target);
    the loss is that of the scaled targets."""

    @field_validator("loss")
    @classmethod
    def _validate_loss(cls, value: str | None) -> str | None:
        return value if value is None or value in REGRESSION_LOSSES else validate_import_path(value)

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.positive is not None and self.kind != "binary":
            raise ValueError("positive goes with kind: binary")
        if self.threshold != 0.5 and self.kind != "binary":
            raise ValueError("threshold goes with kind: binary")
        if self.class_weights is not None and self.kind in ("multilabel", "regression"):
            raise ValueError("class_weights goes with multiclass and binary")
        if self.label_smoothing and (self.kind not in ("multiclass", "binary") or self.loss is not None):
            raise ValueError("label_smoothing goes with multiclass and binary, and not with a loss of your own")
        if self.quantiles is not None:
            if self.kind != "regression":
                raise ValueError("quantiles goes with kind: regression")
            if self.loss is not None:
                raise ValueError("quantiles has a loss of its own: leave loss out")
            if any(first >= second for first, second in pairwise(self.quantiles)):
                raise ValueError(f"quantiles must ascend, unlike {self.quantiles}")
        if self.loss in REGRESSION_LOSSES and self.kind != "regression":
            raise ValueError(f"loss: {self.loss} goes with kind: regression")
        return self

    @property
    def threshold_rule(self) -> ThresholdRule | None:
        """The rule that chooses the threshold; None if it is a number."""
        return None if isinstance(self.threshold, float) else self.threshold


REGRESSION_LOSSES = ("mse", "mae", "huber")


class ParamGroupConfig(ConfigNode):
    """Parameters with another learning rate or weight decay: `{match: "layer4.*", lr_factor: 0.1}`."""

    match: str
    """Name of a parameter, or a pattern; the first group that matches applies."""
    lr_factor: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the phase's learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of these parameters; null: that of the optimizer."""


class OptimizerConfig(ConfigNode):
    """The optimizer. The learning rate is set by the phases."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer, as in `torch.optim`."""
    momentum: Fraction = 0.0
    """Momentum; sgd only."""
    nesterov: bool = False
    """Nesterov momentum; sgd only, and needs momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay: an L2 penalty in sgd and adam, decoupled from the gradient in adamw."""
    decay: Literal["all", "weights"] = "all"
    """Which parameters decay, also in groups. all: every one. weights: the weight matrices of linear layers,
    convolutions and embeddings of categories; not biases, normalizations, the scales of an ensemble's members, or the
    frequencies and phases of embedded numbers."""
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square; adam and adamw only."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update; adam and adamw only."""
    groups: list[ParamGroupConfig] = []
    """Parameter groups with another learning rate or weight decay."""

    @model_validator(mode="after")
    def _check_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum")
        if self.kind != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov go with kind: sgd, not {self.kind}")
        return self


class PhaseConfig(ConfigNode):
    """A number of epochs or steps with its own learning rate."""

    epochs: Positive | None = None
    """Length in epochs. A phase has either epochs or steps."""
    steps: Positive | None = None
    """Length in steps (updates of the weights)."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate; with a schedule, its highest value."""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """How the learning rate changes within the phase. step: times `factor` every `every_epochs`. cosine: down to 0.
    one_cycle: up from lr/25 over the first 30 % of the steps, then down to lr/250,000 (the learning rate of Smith's
    1cycle)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the start of the phase over which the learning rate rises linearly from 0."""
    every_epochs: Positive = 1
    """With schedule: step, the epochs between two changes."""
    factor: Annotated[float, Field(gt=0)] = 0.1
    """With schedule: step, the factor on the learning rate at each change."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Whether the optimizer's momentum and moments carry over from the phase before, or start from zero."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a phase has either epochs or steps")
        return self


class TrainConfig(ConfigNode):
    """The training loop."""

    batch_size: Positive | Literal["all", "auto"] = 100
    """Rows per step, the global batch of all workers together. all: the whole training split. auto: 32 below 2,800
    training rows, 64 below 4,500, 128 below 6,400, else 256 (TabM's rule, arXiv 2410.24210)."""
    micro_batch: Positive | None = None
    """Accumulate gradients over micro-batches of this many rows on each worker, to save memory; null: all rows at
    once."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    phases: Annotated[list[PhaseConfig], Field(min_length=1)] = [
        PhaseConfig(epochs=5, lr=0.5),
        PhaseConfig(epochs=5, lr=0.1),
    ]
    """The phases of training, in order, each with its own length and learning rate."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Scale the whole gradient down to this L2 norm if its norm is larger; null: never."""
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    """Floating-point type of the computation. bf16 and fp16 keep the weights in fp32; fp16 scales the loss."""
    compile: Literal["auto", "off", "on"] = "auto"
    """Compile the training step with torch.compile; auto decides by the job and the device."""

    @field_validator("compile", mode="before")
    @classmethod
    def _parse_compile(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
