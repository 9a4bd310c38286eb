"""The schema of a table's rows: which columns a row has, as numbers and categories."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipeline.data.tabular.times import CLOCK_WIDTH

ColumnKind = Literal["number", "category", "time"]


@dataclass(frozen=True)
class Column:
    """One feature.

    kind: number: `width` numbers (1, or the length of a fixed-size list), NaN if missing; booleans are 0 and 1.
        category: one integer, the position of the text in `categories`, NaN if missing. time: `width` numbers of a date
        or time, see `times`.
    buckets: of a category whose texts are hashed: their number. `categories` are then bucket numbers, see `hashing`.
    """

    name: str
    kind: ColumnKind
    width: int = 1
    categories: tuple[str, ...] = ()
    buckets: int = 0

    @property
    def is_date(self) -> bool:
        """Whether the column is dates, with or without a time of day."""
        return self.kind == "time" and self.width != CLOCK_WIDTH

    @property
    def is_numeric(self) -> bool:
        """Whether the column is one or more numbers, not a category."""
        return self.kind != "category"


@dataclass(frozen=True)
class Schema:
    """The layout of a matrix (N, width): the columns in this order, one after another."""

    columns: tuple[Column, ...]

    @cached_property
    def width(self) -> int:
        return sum(column.width for column in self.columns)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The index in a row at which each column begins."""
        ends = [0]
        for column in self.columns:
            ends.append(ends[-1] + column.width)
        return tuple(ends[:-1])
