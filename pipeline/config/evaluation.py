"""`evaluate:`, `best:` and `checkpoint:` when to evaluate and save, and what to keep."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import ConfigNode, Positive, format_suggestion
from pipeline.config.metrics import HIGHER_IS_BETTER, LOWER_IS_BETTER


class EvaluationConfig(ConfigNode):
    """When to evaluate, and on which splits. There is always one evaluation before step 1 and one at the end."""

    every_epochs: Positive | None = None
    """Evaluate each time this many epochs have passed. Without it and every_steps: after each epoch."""
    every_steps: Positive | None = None
    """Evaluate each time this many steps have passed, instead of every_epochs."""
    splits: Annotated[list[Literal["train", "val"]], Field(min_length=1)] | None = None
    """The splits to evaluate. null: val if there is one, else train. Never test: that is for `trainyard evaluate
    --split test`."""
    limit: Positive | None = None
    """At most this many rows of each split: a random sample, stratified by class (for a regression, by the first
    target), drawn once for the whole run. null: all rows, as `trainyard evaluate` always takes."""

    @model_validator(mode="after")
    def _check_one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give either every_epochs or every_steps, and null for the other")
        return self


class BestMetricConfig(ConfigNode):
    """Which checkpoint is the best one; of equal ones, the earliest."""

    metric: str = "val/loss"
    """`split/column` of the evaluations, such as val/loss, val/accuracy or val/auc, or a metric of your own. With
    several targets, val/rmse and val/mae are means in standard deviations, and val/rmse_LABEL is for one target, in its
    own unit; with several classes, val/recall_CLASS and val/precision_CLASS are for one class."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is the best. By default max for accuracy, auc and the like, min for
    losses and errors. Required for a metric of your own and for that of a single target or class."""
    patience: Positive | None = None
    """Stop early after this many consecutive evaluations without a better one; null: never."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_mode(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        metric, mode = str(values.get("metric", "val/loss")), values.get("mode")
        split, _, column = metric.partition("/")
        known = {**dict.fromkeys(HIGHER_IS_BETTER, "max"), **dict.fromkeys(LOWER_IS_BETTER, "min")}
        if mode is None and column and column not in known:
            hint = format_suggestion(metric, [f"{split}/{name}" for name in known])
            raise ValueError(f"set mode: min or mode: max for {metric}{hint}")
        if mode in ("min", "max") and known.get(column, mode) != mode:
            raise ValueError(f"mode: {mode} would choose the worst {metric} as the best; leave mode out")
        return values if mode is not None else {**values, "mode": known.get(column, "min")}

    @field_validator("metric")
    @classmethod
    def _validate_metric(cls, value: str) -> str:
        if not re.fullmatch(r"(train|val)/[A-Za-z_]\w*", value):
            known = [f"{split}/{name}" for split in ("val", "train") for name in HIGHER_IS_BETTER + LOWER_IS_BETTER]
            hint = format_suggestion(value, known)
            raise ValueError(f"{value!r} is not of the form val/loss, val/accuracy, train/loss, ...{hint}")
        return value


class CheckpointConfig(ConfigNode):
    """When to save checkpoints, and how many to keep. An interrupted run resumes from its newest checkpoint."""

    every_epochs: Positive | None = None
    """Save each time this many epochs have passed. Without it and every_steps: after each epoch."""
    every_steps: Positive | None = None
    """Save each time this many steps have passed, instead of every_epochs."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 10
    """Minutes of training after which a checkpoint is saved in any case: an upper bound on what a kill can lose, as far
    as storage is fast enough. Until then (with null, always) a checkpoint that is due may be delayed until the time
    that the last one took is 1 % of the time since."""
    keep: Positive = 3
    """Number of recent checkpoints to keep; each is kept together with the best one up to it."""

    @model_validator(mode="after")
    def _check_one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give either every_epochs or every_steps, and null for the other")
        return self
