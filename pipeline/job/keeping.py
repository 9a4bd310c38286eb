"""`evaluate:`, `best:` and `checkpoint:` when to look, and what to keep."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.job.metrics import HIGHER_IS_BETTER, LOWER_IS_BETTER
from pipeline.job.node import Node, Positive, did_you_mean


class Evaluate(Node):
    """When to evaluate, and on what. There is always one evaluation before step 1 and one at the end."""

    every_epochs: Positive | None = None
    """The default is every epoch."""
    every_steps: Positive | None = None
    splits: Annotated[list[Literal["train", "val"]], Field(min_length=1)] | None = None
    """Default: val where there is one, else train. Never test: `trainyard evaluate --split test` reads that."""
    limit: Positive | None = None
    """At most this many rows of each split: a random sample, stratified by class (for a regression, by the first
    target), drawn once for the whole run. `trainyard evaluate` always takes all rows."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give either every_epochs or every_steps, and null for the other")
        return self


class Best(Node):
    """Which checkpoint counts as the best: the earliest of equals."""

    metric: str = "val/loss"
    """`split/column` of the evaluations, such as val/loss, val/accuracy or val/auc, or a metric of your own. Of several
    targets val/rmse and val/mae are means in standard deviations, and val/rmse_LABEL is that of one in its unit."""
    mode: Literal["min", "max"] = "min"
    """Where not given: max for accuracy and its like, min for losses and errors. A metric of your own needs it, and so
    does that of a single target."""
    patience: Positive | None = None
    """Stop after this many evaluations without a better one."""

    @model_validator(mode="before")
    @classmethod
    def _direction_is_known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        metric, mode = str(values.get("metric", "val/loss")), values.get("mode")
        split, _, column = metric.partition("/")
        known = {**dict.fromkeys(HIGHER_IS_BETTER, "max"), **dict.fromkeys(LOWER_IS_BETTER, "min")}
        if mode is None and column and column not in known:
            hint = did_you_mean(metric, [f"{split}/{name}" for name in known])
            raise ValueError(f"say mode: min or mode: max for {metric}{hint}")
        if mode in ("min", "max") and known.get(column, mode) != mode:
            raise ValueError(f"mode: {mode} would take the worst {metric} for the best; leave mode out")
        return values if mode is not None else {**values, "mode": known.get(column, "min")}

    @field_validator("metric")
    @classmethod
    def _split_and_column(cls, value: str) -> str:
        if not re.fullmatch(r"(train|val)/[A-Za-z_]\w*", value):
            known = [f"{split}/{name}" for split in ("val", "train") for name in HIGHER_IS_BETTER + LOWER_IS_BETTER]
            hint = did_you_mean(value, known)
            raise ValueError(f"{value!r} is not of the form val/loss, val/accuracy, train/loss, ...{hint}")
        return value


class Checkpoint(Node):
    """When to save, and how much to keep. Whatever a kill interrupts goes on from here."""

    every_epochs: Positive | None = None
    """The default is every epoch."""
    every_steps: Positive | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 10
    """Save before this much training is unsaved: an upper bound on what a kill can lose, as far as storage is fast
    enough. Without it, or before it, a due checkpoint may wait until the last one's cost is 1 % of the time since."""
    keep: Positive = 3
    """The last so many, each with the best until then."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give either every_epochs or every_steps, and null for the other")
        return self
