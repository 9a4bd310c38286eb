"""`data.splits:` which rows are for training, validation and test."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from pipeline.config.base import ConfigNode, IndexRange

SPLIT_NAMES = ("train", "val", "test")
"""Splits, in the order in which they are returned and stored."""

STORED = "stored"
"""Key of the validation context of a job that is read back from a run: there, 1.0 is a count of 1."""


def _reject_fraction_of_one(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, float) and value == 1.0 and not (info.context or {}).get(STORED):
        raise ValueError("1.0 would be all rows: a share is below 1, and a count is a whole number, such as 1 or 200")
    return value


RejectFractionOfOne = BeforeValidator(_reject_fraction_of_one)


class RandomSplitsConfig(ConfigNode):
    """Rows drawn at random: fractions of all rows (below 1) or counts."""

    by: Literal["random"] = "random"
    """At random, by `seed.split`."""
    val: Annotated[float, Field(ge=0), RejectFractionOfOne] = 0.2
    """Share (below 1) or number of rows for validation; 0 for none."""
    test: Annotated[float, Field(ge=0), RejectFractionOfOne] = 0
    """Share (below 1) or number of rows for the test split; 0 leaves the source's own test set, if it has one."""
    train: Annotated[float, Field(gt=0), RejectFractionOfOne] | None = None
    """Share (below 1) or number of rows for training; null: all remaining rows."""
    stratify: bool = False
    """Draw from each class in proportion to its size."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        for name in SPLIT_NAMES:
            value = getattr(self, name)
            if value is not None and value >= 1 and value != int(value):
                raise ValueError(f"{name} must be a fraction below 1 or a whole number of rows, not {value}")
        return self


class RangeSplitsConfig(ConfigNode):
    """Rows by position: `{by: range, train: [0, 1024], val: [1024, 2048]}`, the end excluded."""

    by: Literal["range"]
    """By position."""
    train: IndexRange
    """[first, end] of the rows for training, counted from 0; the end is excluded."""
    val: IndexRange | None = None
    """[first, end] of the rows for validation; null for none."""
    test: IndexRange | None = None
    """[first, end] of the rows of the test split; null leaves the source's own test set, if it has one."""

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name in SPLIT_NAMES:
            value = getattr(self, name)
            if value is not None and not 0 <= value[0] < value[1]:
                raise ValueError(f"{name} must be [first, end] with 0 <= first < end, not {list(value)}")
        return self


class GroupSplitsConfig(ConfigNode):
    """Groups drawn at random, so that no group is in two splits: `{by: group, column: user, val: 0.2}`."""

    by: Literal["group"]
    """By groups of rows, drawn by `seed.split`."""
    column: str
    """The column that names the group: rows with the same value stay together."""
    val: Annotated[float, Field(ge=0), RejectFractionOfOne] = 0.2
    """Share of the rows (below 1), approximated by whole groups, or number of groups, for validation; 0 for none."""
    test: Annotated[float, Field(ge=0), RejectFractionOfOne] = 0
    """The same for the test split."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        for name in ("val", "test"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise ValueError(f"{name} must be a fraction below 1 or a whole number of groups, not {value}")
        return self


Window = Annotated[float, Field(ge=0)] | str
"""Share of the rows (below 1), or a length: `14d`, `12h`, `30m`, `90s`, `2w`; a number for a column of numbers."""


class TimeSplitsConfig(ConfigNode):
    """The newest rows are held out, the test split after the validation split: `{by: time, column: day, val: 14d}`."""

    by: Literal["time"]
    """By time."""
    column: str
    """A column of timestamps, dates or numbers. Rows with the same value stay together."""
    val: Window = 0.2
    """Share of the rows (below 1) for validation, or the length of the window: 14d, 12h, 30m, 90s or 2w; for a column
    of numbers, a number of 1 or more; 0 for none."""
    test: Window = 0
    """The same for the test split."""

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        for name in ("val", "test"):
            value = getattr(self, name)
            if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?[wdhms]", value):
                raise ValueError(
                    f"{name} must be a share below 1, or a length such as 14d, 12h, 30m or 2w, not {value!r}"
                )
        return self


class ColumnSplitsConfig(ConfigNode):
    """A column of the data names the split of each row: `{by: column, column: split}`."""

    by: Literal["column"]
    """By a column of the data."""
    column: str
    """The column that names the split."""
    train: list[str] = ["train"]
    """Values of the column, as text, that mean the training split."""
    val: list[str] = ["val", "validation"]
    """Values that mean the validation split."""
    test: list[str] = ["test"]
    """Values that mean the test split."""

    @model_validator(mode="after")
    def _check_distinct_values(self) -> Self:
        values = [*self.train, *self.val, *self.test]
        duplicates = sorted({value for value in values if values.count(value) > 1})
        if duplicates:
            raise ValueError(f"{duplicates[0]!r} cannot mean two splits")
        return self


SplitsConfig = Annotated[
    RandomSplitsConfig | RangeSplitsConfig | GroupSplitsConfig | TimeSplitsConfig | ColumnSplitsConfig,
    Field(discriminator="by"),
]
