"""Report by column of values in new data that training rows did not have: unseen categories, missing values, numbers
outside the training range."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.tabular.times import format_number
from pipeline.data.transforms.arrays import ArrayTransform
from pipeline.data.transforms.column_statistics import numeric_columns_of
from pipeline.data.transforms.tabular import TabularTransform

WARNING_FRACTION = 0.1
"""Fraction of the rows above which a warning is given; for missing values, in excess of the fraction in training."""

MAX_LISTED = 5
"""Maximum number of separate warnings, and of listed columns."""

OriginalValueFn = Callable[[str, int], Any]
"""Returns the original value of a column in a row of the new data."""


@dataclass
class _ColumnCounts:
    """Counts of one column.

    num_unseen: values that are unseen, or far outside the range. num_filled: rows without a value.
    example: the first such unseen value.
    """

    num_rows: int = 0
    num_unseen: int = 0
    num_filled: int = 0
    example: str = ""


class DataReport:
    """Counts, by column, of values in new data that no training row had. Empty for images and other arrays without
    column names.

    unseen: values of a categorical column that no training row has.
    filled: rows without a value; for lists, with any value missing.
    outside: numbers farther outside the training range, smallest to largest value, than the width of this range. By
        this rule no training row counts. If all training rows had one value, any other value counts.
    """

    def __init__(self, input_transform: TabularTransform | ArrayTransform) -> None:
        self._transform = input_transform
        self._schema = input_transform.named_columns
        self._counts = {column.name: _ColumnCounts() for column in self._schema.columns}
        low, high = (np.array(ends, np.float64) for ends in (input_transform.low, input_transform.high))
        self._has_ranges = len(low) == len(numeric_columns_of(self._schema))
        self._low, self._high = low - (high - low), high + (high - low)
        if self._has_ranges:
            is_position = _positions_in_cycles(self._schema)
            self._low[is_position], self._high[is_position] = -np.inf, np.inf

    def add(
        self,
        raw: np.ndarray,
        indices: np.ndarray | None = None,
        schema: Schema | None = None,
        original_value: OriginalValueFn | None = None,
    ) -> None:
        """Count values in some rows, a block at a time.

        Parameters
        ----------
        raw: the matrix (N, schema.width) before it is transformed.
        indices: of the rows to count, int64 (n,); all by default.
        schema: the layout of `raw`, if it differs from that of training: the same columns in another order, with other
            categories.
        original_value: returns an unseen value that is not a category of `schema`.
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
        numeric_columns, offsets = numeric_columns_of(self._schema), self._schema.offsets
        indices, first = np.arange(len(raw)) if indices is None else indices, 0
        for block in iter_blocks(raw, indices):
            values = block if is_ordered else block[:, order]
            missing, unseen = np.isnan(values), np.zeros(values.shape, bool)
            if self._has_ranges:
                numbers = values[:, numeric_columns]
                unseen[:, numeric_columns] = (numbers < self._low) | (numbers > self._high)
            for offset, is_unknown in unknown.items():
                codes = np.where(missing[:, offset], 0, values[:, offset]).astype(np.int64)
                unseen[:, offset] = is_unknown[codes] & ~missing[:, offset]
            by_column = [unseen, missing]
            if schema.width > len(offsets):
                by_column = [np.logical_or.reduceat(mask, offsets, axis=1) for mask in by_column]
            totals = zip(self._schema.columns, *(mask.sum(0).tolist() for mask in by_column), strict=True)
            for number, (column, unseen_count, missing_count) in enumerate(totals):
                counts = self._counts[column.name]
                if unseen_count and not counts.num_unseen:
                    row = int(np.argmax(by_column[0][:, number]))
                    offset = offsets[number] + int(np.argmax(unseen[row, offsets[number] :]))
                    counts.example = _format_example(
                        column,
                        input_categories[column.name],
                        float(values[row, offset]),
                        int(indices[first + row]),
                        original_value,
                    )
                counts.num_rows += len(block)
                counts.num_unseen += unseen_count
                counts.num_filled += missing_count
            first += len(block)

    def to_json(self) -> dict[str, dict[str, float | int | None]]:
        """Return, by column, the number of rows, and the fractions of them that are unseen, filled and outside. None if
        not available, in a checkpoint of an earlier version."""
        return {
            column.name: {
                "rows": self._counts[column.name].num_rows,
                "unseen": self._unseen_fraction(column),
                "filled": self._filled_fraction(column),
                "outside": self._outside_fraction(column) if self._has_ranges else None,
            }
            for column in self._schema.columns
        }

    def format_warnings(self) -> list[str]:
        """Return warnings about large fractions, the largest first."""
        warnings_by_fraction: list[tuple[float, str]] = []
        for number, column in enumerate(self._schema.columns):
            if (fraction := self._unseen_fraction(column)) > WARNING_FRACTION:
                warnings_by_fraction.append((fraction, self._describe_unseen(column, fraction)))
            if (fraction := self._outside_fraction(column)) > WARNING_FRACTION:
                warnings_by_fraction.append((fraction, self._describe_outside(number, column, fraction)))
            training_fraction = self._transform.null_fractions[number] if self._transform.null_fractions else 0.0
            if (fraction := self._filled_fraction(column)) > training_fraction + WARNING_FRACTION:
                warnings_by_fraction.append((fraction, self._describe_filled(number, column, fraction)))
        warnings_by_fraction.sort(key=lambda pair: -pair[0])
        messages = [text for _, text in warnings_by_fraction[:MAX_LISTED]]
        if len(warnings_by_fraction) > MAX_LISTED:
            messages.append(
                f"{len(warnings_by_fraction) - MAX_LISTED:,} more like these: see `columns` of --json, or "
                "`column_report`"
            )
        return messages

    def format_lines(self) -> list[str]:
        """Return a line for each of the columns with the largest fractions, however small."""
        lines_by_fraction = []
        for column in self._schema.columns:
            kinds = {
                "never seen in training": self._unseen_fraction(column),
                "far outside the training range": self._outside_fraction(column),
                "without a value": self._filled_fraction(column),
            }
            parts = [f"{_format_percent(fraction)} {kind}" for kind, fraction in kinds.items() if fraction]
            lines_by_fraction.append((max(kinds.values()), f"column {column.name!r}: {', '.join(parts)}"))
        lines_by_fraction.sort(key=lambda pair: -pair[0])
        messages = [text for fraction, text in lines_by_fraction if fraction]
        more = [f"and {len(messages) - MAX_LISTED:,} more columns: see --json"] if len(messages) > MAX_LISTED else []
        return messages[:MAX_LISTED] + more

    def _unseen_fraction(self, column: Column) -> float:
        counts = self._counts[column.name]
        return 0.0 if column.is_numeric else counts.num_unseen / max(counts.num_rows, 1)

    def _outside_fraction(self, column: Column) -> float:
        counts = self._counts[column.name]
        return counts.num_unseen / max(counts.num_rows, 1) if column.is_numeric else 0.0

    def _filled_fraction(self, column: Column) -> float:
        counts = self._counts[column.name]
        return counts.num_filled / max(counts.num_rows, 1)

    def _describe_unseen(self, column: Column, fraction: float) -> str:
        counts = self._counts[column.name]
        if column.buckets:
            return (
                f"column {column.name!r}: {_format_percent(fraction)} of {counts.num_rows:,} values are in a bucket "
                f"that no training row was in, such as {counts.example!r}; each is encoded as none of the "
                f"{len(column.categories):,} buckets of training"
            )
        near = difflib.get_close_matches(counts.example, column.categories[:1000], n=1) or column.categories[:1]
        training_example = f" (training had {near[0]!r})" if near else ""
        return (
            f"column {column.name!r}: {_format_percent(fraction)} of {counts.num_rows:,} values were never seen in "
            f"training, such as {counts.example!r}{training_example}; each is encoded as none of the "
            f"{len(column.categories):,} known categories"
        )

    def _describe_outside(self, number: int, column: Column, fraction: float) -> str:
        counts, offset = self._counts[column.name], self._numeric_offset(number)
        ends = slice(offset, offset + column.width)
        if column.kind == "time":
            ends = slice(offset, offset + 1)  # the others are positions in cycles
        low, high = min(self._transform.low[ends]), max(self._transform.high[ends])
        return (
            f"column {column.name!r}: {_format_percent(fraction)} of {counts.num_rows:,} values are far outside the "
            f"training range, {_format_number(column, low)} to {_format_number(column, high)}, such as "
            f"{counts.example}; they are used unchanged"
        )

    def _describe_filled(self, number: int, column: Column, fraction: float) -> str:
        counts, transform = self._counts[column.name], self._transform
        before = (
            f", in training {_format_percent(transform.null_fractions[number])}" if transform.null_fractions else ""
        )
        assert isinstance(transform, TabularTransform), "arrays have no missing values"
        if column.is_numeric:
            fill = transform.fill[self._numeric_offset(number)]
            treatment = f"filled with {fill:g}" if column.width == 1 else "filled element by element"
        else:
            names = [categorical_column.name for categorical_column in transform.categorical_columns]
            code = transform.missing_codes[names.index(column.name)]
            treatment = "encoded as none of the known categories"
            if code > len(column.categories):
                treatment = "encoded as a separate category, as in training"
            elif code:
                treatment = f"encoded as {column.categories[code - 1]!r}"
        rows = f"{_format_percent(fraction)} of {counts.num_rows:,} rows"
        return f"column {column.name!r}: {rows} have no value{before}; {treatment}"

    def _numeric_offset(self, number: int) -> int:
        """Return the index of a column's first number among all numbers."""
        return sum(column.width for column in self._schema.columns[:number] if column.is_numeric)


def _format_example(
    column: Column, categories: tuple[str, ...], value: float, row: int, original_value: OriginalValueFn | None
) -> str:
    if column.is_numeric:
        return _format_number(column, value)
    if value < len(categories):
        return categories[int(value)]
    return str(original_value(column.name, row)) if original_value is not None else "another"


def _format_number(column: Column, value: float) -> str:
    return format_number(value, column.width) if column.kind == "time" else f"{value:g}"


def _positions_in_cycles(schema: Schema) -> np.ndarray:
    """Return which numbers of a row are positions in cycles: all of a date or time but the first, bool (n,)."""
    numbers = [column for column in schema.columns if column.is_numeric]
    return np.array([column.kind == "time" and index > 0 for column in numbers for index in range(column.width)], bool)


def _unknown_categories(categories: tuple[str, ...], training_categories: tuple[str, ...]) -> list[bool]:
    known = set(training_categories)
    return [category not in known for category in categories]


def _format_percent(fraction: float) -> str:
    if fraction in (0.0, 1.0):
        return "all" if fraction else "none"
    return f"{fraction:.1%}" if 0.001 <= fraction < 0.9995 else "under 0.1%" if fraction < 0.001 else "over 99.9%"
