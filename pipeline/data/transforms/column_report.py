"""What new data holds that the training rows did not, by column: unseen levels, missing values, far-away numbers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.transforms.arrays import ArrayTransform
from pipeline.data.transforms.column_statistics import numeric_columns_of
from pipeline.data.transforms.tabular import TabularTransform

WARNING_FRACTION = 0.1
"""Share of the rows above which a warning is given; of missing values, above the share that training rows had."""

MAX_LISTED = 5
"""Columns that are warned of one by one, and that are listed."""

OriginalValueFn = Callable[[str, int], Any]
"""The value of a column in a row of the new data, as it was handed over."""


@dataclass
class _ColumnCounts:
    """Of one column. example: the first value that is unseen, or far outside the range."""

    num_rows: int = 0
    num_unseen: int = 0
    num_filled: int = 0
    example: str = ""


class DataReport:
    """Counts, by column, of values in new data that no training row had. Empty for images and other arrays.

    unseen: values of a categorical column that no training row has.
    filled: rows without a value; of lists, without all values.
    outside: numbers that lie farther outside the training range, smallest to largest value, than this range is wide: a
        rule under which no training row ever counts. Where all training rows had one value, any other counts.
    """

    def __init__(self, preprocess: TabularTransform | ArrayTransform) -> None:
        self._preprocess = preprocess
        self._schema = preprocess.named_columns
        self._counts = {column.name: _ColumnCounts() for column in self._schema.columns}
        low, high = (np.array(ends, np.float64) for ends in (preprocess.low, preprocess.high))
        self._has_ranges = len(low) == len(numeric_columns_of(self._schema))
        self._low, self._high = low - (high - low), high + (high - low)

    def add(
        self,
        raw: np.ndarray,
        indices: np.ndarray | None = None,
        schema: Schema | None = None,
        original_value: OriginalValueFn | None = None,
    ) -> None:
        """Count some rows, a block at a time.

        Parameters
        ----------
        raw: the matrix (N, schema.width) before it is prepared. rows: positions of those that count, int64 (n,).
        schema: its layout, where it is not that of training: the same columns in another order, with other levels.
        original: gives an unseen value where `schema` does not hold it.
        """
        if not self._counts:
            return
        schema = schema or self._schema
        offsets_by_name = dict(zip((column.name for column in schema.columns), schema.offsets, strict=True))
        order = [
            offsets_by_name[column.name] + offset for column in self._schema.columns for offset in range(column.width)
        ]
        is_ordered = order == list(range(schema.width))
        input_categories = {column.name: column.categories for column in schema.columns}
        unknown = {
            offset: np.array([*_unknown_categories(input_categories[column.name], column.categories), True])
            for column, offset in zip(self._schema.columns, self._schema.offsets, strict=True)
            if column.kind == "category"
        }
        numbers, offsets = numeric_columns_of(self._schema), self._schema.offsets
        chosen, first = np.arange(len(raw)) if indices is None else indices, 0
        for block in iter_blocks(raw, chosen):
            values = block if is_ordered else block[:, order]
            missing, foreign = np.isnan(values), np.zeros(values.shape, bool)
            if self._has_ranges:
                foreign[:, numbers] = (values[:, numbers] < self._low) | (values[:, numbers] > self._high)
            for offset, is_unknown in unknown.items():
                positions = np.where(missing[:, offset], 0, values[:, offset]).astype(np.int64)
                foreign[:, offset] = is_unknown[positions] & ~missing[:, offset]
            by_column = [foreign, missing]
            if schema.width > len(offsets):
                by_column = [np.logical_or.reduceat(marked, offsets, axis=1) for marked in by_column]
            totals = zip(self._schema.columns, *(marked.sum(0).tolist() for marked in by_column), strict=True)
            for number, (column, unseen_count, missing_count) in enumerate(totals):
                counts = self._counts[column.name]
                if unseen_count and not counts.num_unseen:
                    row = int(np.argmax(by_column[0][:, number]))
                    offset = offsets[number] + int(np.argmax(foreign[row, offsets[number] :]))
                    counts.example = _format_example(
                        column,
                        input_categories[column.name],
                        float(values[row, offset]),
                        int(chosen[first + row]),
                        original_value,
                    )
                counts.num_rows += len(block)
                counts.num_unseen += unseen_count
                counts.num_filled += missing_count
            first += len(block)

    def to_json(self) -> dict[str, dict[str, float | int | None]]:
        """By column: rows, and the shares of them that are unseen, filled and outside. None where it is not known, in
        a checkpoint of an earlier version."""
        return {
            column.name: {
                "rows": self._counts[column.name].num_rows,
                "unseen": self._unseen_fraction(column, "category"),
                "filled": self._filled_fraction(column),
                "outside": self._unseen_fraction(column, "number") if self._has_ranges else None,
            }
            for column in self._schema.columns
        }

    def format_warnings(self) -> list[str]:
        """What is large, the largest shares first."""
        warnings_by_fraction: list[tuple[float, str]] = []
        for number, column in enumerate(self._schema.columns):
            if (share := self._unseen_fraction(column, "category")) > WARNING_FRACTION:
                warnings_by_fraction.append((share, self._describe_unseen(column, share)))
            if (share := self._unseen_fraction(column, "number")) > WARNING_FRACTION:
                warnings_by_fraction.append((share, self._describe_outside(number, column, share)))
            known = self._preprocess.null_fractions[number] if self._preprocess.null_fractions else 0.0
            if (share := self._filled_fraction(column)) > known + WARNING_FRACTION:
                warnings_by_fraction.append((share, self._describe_filled(number, column, share)))
        warnings_by_fraction.sort(key=lambda pair: -pair[0])
        messages = [text for _, text in warnings_by_fraction[:MAX_LISTED]]
        if len(warnings_by_fraction) > MAX_LISTED:
            messages.append(
                f"{len(warnings_by_fraction) - MAX_LISTED:,} more like these: see `columns` of --json, or "
                "`column_report`"
            )
        return messages

    def format_lines(self) -> list[str]:
        """A line for each of the columns with the largest shares, whatever they are."""
        shares = []
        for column in self._schema.columns:
            kinds = {
                "never seen in training": self._unseen_fraction(column, "category"),
                "far outside the training range": self._unseen_fraction(column, "number"),
                "without a value": self._filled_fraction(column),
            }
            words = [f"{_format_percent(share)} {kind}" for kind, share in kinds.items() if share]
            shares.append((max(kinds.values()), f"column {column.name!r}: {', '.join(words)}"))
        shares.sort(key=lambda pair: -pair[0])
        messages = [text for share, text in shares if share]
        more = [f"and {len(messages) - MAX_LISTED:,} more columns: see --json"] if len(messages) > MAX_LISTED else []
        return messages[:MAX_LISTED] + more

    def _unseen_fraction(self, column: Column, kind: str) -> float:
        counts = self._counts[column.name]
        return counts.num_unseen / max(counts.num_rows, 1) if column.kind == kind else 0.0

    def _filled_fraction(self, column: Column) -> float:
        counts = self._counts[column.name]
        return counts.num_filled / max(counts.num_rows, 1)

    def _describe_unseen(self, column: Column, share: float) -> str:
        counts = self._counts[column.name]
        near = difflib.get_close_matches(counts.example, column.categories[:1000], n=1) or column.categories[:1]
        had = f" (training had {near[0]!r})" if near else ""
        return (
            f"column {column.name!r}: {_format_percent(share)} of {counts.num_rows:,} values were never seen in "
            "training, such as "
            f"{counts.example!r}{had}; each counts as none of the {len(column.categories):,} known ones"
        )

    def _describe_outside(self, number: int, column: Column, share: float) -> str:
        counts, place = self._counts[column.name], self._numeric_offset(number)
        ends = slice(place, place + column.width)
        low, high = min(self._preprocess.low[ends]), max(self._preprocess.high[ends])
        return (
            f"column {column.name!r}: {_format_percent(share)} of {counts.num_rows:,} values lie far outside the "
            "training range, "
            f"{low:g} to {high:g}, such as {counts.example}; they are used as they are"
        )

    def _describe_filled(self, number: int, column: Column, share: float) -> str:
        counts, preprocess = self._counts[column.name], self._preprocess
        before = (
            f", in training {_format_percent(preprocess.null_fractions[number])}" if preprocess.null_fractions else ""
        )
        assert isinstance(preprocess, TabularTransform), "arrays have no missing values"
        if column.kind == "number":
            fill = preprocess.fill[self._numeric_offset(number)]
            becomes = f"filled with {fill:g}" if column.width == 1 else "filled in place by place"
        else:
            code = preprocess.missing_codes[[one.name for one in preprocess.categorical_columns].index(column.name)]
            becomes = "counted as none of the known values"
            if code > len(column.categories):
                becomes = "counted as a value of its own, as in training"
            elif code:
                becomes = f"counted as {column.categories[code - 1]!r}"
        rows = f"{_format_percent(share)} of {counts.num_rows:,} rows"
        return f"column {column.name!r}: {rows} have no value{before}; {becomes}"

    def _numeric_offset(self, number: int) -> int:
        """Where a column's numbers begin among all numbers."""
        return sum(column.width for column in self._schema.columns[:number] if column.kind == "number")


def _format_example(
    column: Column, levels: tuple[str, ...], value: float, row: int, original: OriginalValueFn | None
) -> str:
    if column.kind == "number":
        return f"{value:g}"
    if value < len(levels):
        return levels[int(value)]
    return str(original(column.name, row)) if original is not None else "another"


def _unknown_categories(levels: tuple[str, ...], trained: tuple[str, ...]) -> list[bool]:
    known = set(trained)
    return [level not in known for level in levels]


def _format_percent(share: float) -> str:
    if share in (0.0, 1.0):
        return "all" if share else "none"
    return f"{share:.1%}" if 0.001 <= share < 0.9995 else "under 0.1%" if share < 0.001 else "over 99.9%"
