"""Preprocessing of the rows of tables: missing values, scales and levels.

Fits the preprocessing of a table: what stands in for missing values, scales, and which levels there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ImputationConfig, JobConfig, NormalizeConfig, ParquetDataConfig
from pipeline.data.dataset import DatasetPart
from pipeline.data.serialization import VERSION, check_stored_values, parse_float_name
from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.schema import Column, ColumnKind, Schema
from pipeline.data.transforms.arrays import WHERE, TransformFn, fixed_mean_and_std
from pipeline.data.transforms.column_statistics import (
    ColumnStatistics,
    categorical_columns_of,
    compute_statistics,
    numeric_columns_of,
)
from pipeline.errors import DataError

MISSING_VALUE_HINTS: dict[ColumnKind, str] = {
    "number": "median, mean or a number",
    "category": "own_level or the level it counts as",
}


REQUIRED_STATISTICS = ("fill", "mean", "std")
"""What is stored of each number of a column."""
STORED_STATISTICS = (*REQUIRED_STATISTICS, "low", "high")
"""... and with these, which checkpoints of earlier versions lack."""


@dataclass(frozen=True)
class TabularTransform:
    """How rows of a table are prepared: plain values, the same for training, evaluation and prediction.

    A prepared row has first its numbers, filled and scaled; then each categorical column of at most `one_hot_up_to`
    codes, one place a code, 1 where the row has it; then each larger one as its code, a whole number.

    The codes of a categorical column are 1 for its first level, 2 for the next, and so on: the levels of the training
    rows, and behind them one for being missing, where a training row is and `data.missing` gives it a level of its own.
    Code 0 stands for all that no training row has. It is neutral: one-hot it is all zeros, and among the codes it is
    a place of its own that no training row touches.

    schema: the columns of a raw row, with the levels of the training rows alone.
    fill, mean, std: for each number, in the order of the schema: what stands in for a missing one; (x - mean) / std.
    missing: for each categorical column, the code of a missing value.
    refused: kinds of column in which missing values are refused.
    dtype: NumPy's name of the raw rows' type, which new rows are brought to as well: float64 where float32 would lose
        digits that matter. Numbers are shifted and scaled in it before they become the arithmetic's. Empty where an
        earlier version fitted: the arithmetic's.
    low, high: for each number, its smallest and its largest value in training; where it had none, what fills it.
    nulls: for each column, the share of training rows without a value.
        These three prepare nothing: new data is compared with them. They are empty in checkpoints that lack them.
    """

    schema: Schema
    fill: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    missing_codes: tuple[int, ...]
    one_hot_up_to: int
    kinds_without_missing: tuple[ColumnKind, ...] = ()
    dtype: str = ""
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    null_fractions: tuple[float, ...] = ()

    @property
    def named_columns(self) -> Schema:
        """The columns of a raw row."""
        return self.schema

    @property
    def categorical_columns(self) -> list[Column]:
        """The categorical columns."""
        return [column for column in self.schema.columns if column.kind == "category"]

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """For each of the last places of a prepared row that hold codes, how many there are: 0 to size - 1."""
        return tuple(codes + 1 for codes in self._max_codes() if codes > self.one_hot_up_to)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a prepared row."""
        one_hot = sum(codes for codes in self._max_codes() if codes <= self.one_hot_up_to)
        return (len(self.fill) + one_hot + len(self.code_sizes),)

    def check_missing_values(self, raw: np.ndarray, schema: Schema | None = None) -> None:
        """Refuse missing values where `data.missing` says fail.

        Parameters
        ----------
        raw: rows (N, schema.width). schema: their layout, where it is not this one's: the same columns in another
            order, with any levels.

        Raises
        ------
        DataError: names the column, how many rows, and the first of them.
        """
        if not self.kinds_without_missing:
            return
        counts, first_rows = np.zeros(self.schema.width, np.int64), np.full(self.schema.width, -1)
        row = 0
        for block in iter_blocks(raw, np.arange(len(raw))):
            missing = np.isnan(block)
            first_rows = np.where((first_rows < 0) & missing.any(0), row + missing.argmax(0), first_rows)
            counts += missing.sum(0)
            row += len(block)
        schema = schema or self.schema
        for column, offset in zip(schema.columns, schema.offsets, strict=True):
            if column.kind in self.kinds_without_missing and (places := counts[offset : offset + column.width]).any():
                begins = first_rows[offset : offset + column.width]
                raise DataError(
                    f"{places.max():,} of {len(raw):,} rows have no value in column {column.name!r}, the first is row "
                    f"{begins[begins >= 0].min()}",
                    where=f"data.missing.{'numeric' if column.kind == 'number' else 'categorical'}",
                    fix=f"fill them, leave the column out of data.features, or say {MISSING_VALUE_HINTS[column.kind]}",
                )

    def make_transform_fn(
        self, device: torch.device, dtype: torch.dtype, input_schema: Schema | None = None
    ) -> TransformFn:
        """A function from raw rows (B, schema.width) on `device` to prepared ones (B, *output_shape) of `dtype`.

        The result never shares memory with its argument.

        Parameters
        ----------
        raw: the schema by which the rows were encoded, where it is not this one: the same columns in any order, with
            other levels. A position of as many as there are levels stands for any other level.
        """
        layouts = [
            [replace(column, categories=()) for column in one.columns]
            for one in (input_schema or self.schema, self.schema)
        ]
        if input_schema is not None and layouts[0] != layouts[1]:
            return self._make_reordering_fn(device, dtype, input_schema)
        numeric_fn = self._make_numeric_fn(device, dtype)
        if not self.categorical_columns:
            return numeric_fn
        offsets = torch.from_numpy(categorical_columns_of(self.schema)).to(device)
        starts, targets, values = (part.to(device) for part in self._build_lookup(input_schema or self.schema))
        values = values.to(dtype)
        count, width = len(self.fill), self.output_shape[0]

        def prepare(rows: Tensor) -> Tensor:
            positions = rows.index_select(1, offsets)
            entries = torch.where(positions.isnan(), -1, positions).long() + starts
            prepared = rows.new_zeros((len(rows), width), dtype=dtype)
            if count:
                prepared[:, :count] = numeric_fn(rows)
            return prepared.scatter_(1, targets[entries], values[entries])

        return prepare

    def _make_reordering_fn(self, device: torch.device, dtype: torch.dtype, input_schema: Schema) -> TransformFn:
        """As `to`, from rows whose columns come in another order."""
        columns_by_name = {
            column.name: (column, offset)
            for column, offset in zip(input_schema.columns, input_schema.offsets, strict=True)
        }
        ordered = [columns_by_name[column.name] for column in self.schema.columns]
        same = all(own.width == column.width for own, (column, _) in zip(self.schema.columns, ordered, strict=True))
        assert same, "other columns"
        positions = [offset + place for column, offset in ordered for place in range(column.width)]
        prepare = self.make_transform_fn(device, dtype, Schema(tuple(column for column, _ in ordered)))
        order = torch.tensor(positions, device=device)
        return lambda rows: prepare(rows.index_select(1, order))

    def _max_codes(self) -> list[int]:
        """For each categorical column, its highest code."""
        return [
            max(len(one.categories), code)
            for one, code in zip(self.categorical_columns, self.missing_codes, strict=True)
        ]

    def _make_numeric_fn(self, device: torch.device, dtype: torch.dtype) -> TransformFn:
        fill, mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.fill, self.mean, self.std))
        work = torch.float64 if self.dtype == "float64" else dtype
        # Columns far from zero keep their digits only if the mean goes first; what it loses in `work` is made good.
        shift = mean.to(work)
        offset, factor, filled = ((shift.double() - mean) / std, 1 / std, (fill - mean) / std)
        shift, offset, factor, filled = (values.to(device, work) for values in (shift, offset, factor, filled))
        numeric_columns = torch.from_numpy(numeric_columns_of(self.schema)).to(device)
        has_numbers_only = len(numeric_columns) == self.schema.width

        def prepare(rows: Tensor) -> Tensor:
            values = (rows if has_numbers_only else rows.index_select(1, numeric_columns)).to(work)
            scaled = torch.addcmul(offset, values - shift, factor)
            return torch.where(scaled.isnan(), filled, scaled).to(dtype)

        return prepare

    def _build_lookup(self, input_schema: Schema) -> tuple[Tensor, Tensor, Tensor]:
        """What a position among the levels of `raw` becomes: where each column's entries begin, int64 (k,); and for
        each entry the place in the prepared row and the value there. Before a column's first entry is that for a
        missing value, behind its last that for any other level."""
        codes = self._max_codes()
        is_one_hot = np.array([highest <= self.one_hot_up_to for highest in codes])
        widths = np.where(is_one_hot, codes, 1)
        begins = np.empty(len(codes), np.int64)
        order = np.argsort(~is_one_hot, kind="stable")  # one-hot columns first
        begins[order] = len(self.fill) + np.concatenate([[0], widths[order].cumsum()[:-1]])
        input_columns = [column for column in input_schema.columns if column.kind == "category"]
        targets: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for number, (column, given) in enumerate(zip(self.categorical_columns, input_columns, strict=True)):
            known = {level: code for code, level in enumerate(column.categories, start=1)}
            entries = np.array([self.missing_codes[number], *(known.get(level, 0) for level in given.categories), 0])
            targets.append(begins[number] + (np.maximum(entries - 1, 0) if is_one_hot[number] else 0 * entries))
            values.append(entries > 0 if is_one_hot[number] else entries)
        starts = [0, *accumulate(len(entries) for entries in targets)][:-1]
        return (
            torch.tensor(starts) + 1,
            torch.from_numpy(np.concatenate(targets)),
            torch.from_numpy(np.concatenate(values).astype(np.float64)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `preprocess_from_json` gives the same object back."""
        parts = {name: iter(getattr(self, name)) for name in (STORED_STATISTICS if self.low else REQUIRED_STATISTICS)}
        missing, nulls = iter(self.missing_codes), iter(self.null_fractions)
        columns: list[dict[str, Any]] = []
        for column in self.schema.columns:
            stored: dict[str, Any]
            if column.kind == "category":
                stored = {"levels": list(column.categories), "missing": next(missing)}
            else:
                stored = {name: list(islice(part, column.width)) for name, part in parts.items()}
            if self.null_fractions:
                stored["nulls"] = next(nulls)
            columns.append({"name": column.name, "kind": column.kind, **stored})
        return {
            "version": VERSION,
            "kind": "table",
            "one_hot_up_to": self.one_hot_up_to,
            "refused": list(self.kinds_without_missing),
            "dtype": self.dtype,
            "columns": columns,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TabularTransform:
        """What `to_json` gave.

        Raises
        ------
        DataError: written by another version, or damaged.
        """
        with check_stored_values(values):
            columns: list[Column] = []
            stored_parts = {name for stored in values["columns"] for name in stored}
            numbers: dict[str, list[float]] = {
                name: [] for name in STORED_STATISTICS if name in {*REQUIRED_STATISTICS, *stored_parts}
            }
            missing: list[int] = []
            nulls: list[float] = []
            for stored in values["columns"]:
                name = str(stored["name"])
                if "nulls" in stored_parts:
                    nulls.append(float(stored["nulls"]))
                if stored["kind"] == "category":
                    columns.append(Column(name, "category", categories=tuple(map(str, stored["levels"]))))
                    missing.append(int(stored["missing"]))
                elif stored["kind"] == "number":
                    widths = {len(stored[part]) for part in numbers}
                    if len(widths) != 1:
                        raise ValueError(f"column {name!r} has parts of different lengths")
                    columns.append(Column(name, "number", widths.pop()))
                    for part, values_of_part in numbers.items():
                        values_of_part += map(float, stored[part])
                else:
                    raise ValueError(f"kind {stored['kind']!r}")
            return cls(
                Schema(tuple(columns)),
                tuple(numbers["fill"]),
                tuple(numbers["mean"]),
                tuple(numbers["std"]),
                tuple(missing),
                int(values["one_hot_up_to"]),
                tuple(kind for kind in MISSING_VALUE_HINTS if kind in values["refused"]),
                parse_float_name(values.get("dtype", "")),
                low=tuple(numbers.get("low", ())),
                high=tuple(numbers.get("high", ())),
                null_fractions=tuple(nulls),
            )


def fit_tabular_transform(
    job: JobConfig, dataset_part: DatasetPart, schema: Schema, indices: np.ndarray
) -> TabularTransform:
    """Fit what `data.missing` and `data.normalize` ask for; auto is standard.

    Deviations are those of the filled columns; constant ones have 1. A column without any value is filled with 0.

    Parameters
    ----------
    arrays: the training part of the source, of this schema.
    rows: positions of the training split in it, int64 (n,): what is fitted depends on no other row.

    Raises
    ------
    DataError: a normalisation that does not fit a table; with `missing: fail`, a missing value anywhere.
    """
    assert isinstance(job.data, ParquetDataConfig), "only tables have a schema"
    missing = job.data.missing
    statistics = compute_statistics(dataset_part.inputs, indices, schema, with_medians=missing.numeric == "median")
    fill = _fill_values(missing, statistics)
    mean, std = _compute_mean_and_std(job.data.normalize, statistics, fill, len(indices))
    columns: list[Column] = []
    codes: list[int] = []
    for column in schema.columns:
        if column.kind == "number":
            columns.append(column)
            continue
        occur, misses = statistics.present_categories[len(codes)], bool(statistics.num_missing[len(codes)])
        categories, code = _fit_categories(column, occur, misses, missing.categorical)
        columns.append(Column(column.name, "category", categories=categories))
        codes.append(code)
    imputation: dict[ColumnKind, object] = {"number": missing.numeric, "category": missing.categorical}
    fitted = TabularTransform(
        Schema(tuple(columns)),
        tuple(fill.tolist()),
        tuple(mean.tolist()),
        tuple(std.tolist()),
        tuple(codes),
        job.data.one_hot_up_to,
        tuple(kind for kind, stand_in in imputation.items() if stand_in == "fail"),
        dataset_part.inputs.dtype.name,
        low=tuple(np.where(statistics.num_present > 0, statistics.low, fill).tolist()),
        high=tuple(np.where(statistics.num_present > 0, statistics.high, fill).tolist()),
        null_fractions=_compute_null_fractions(schema, statistics, len(indices)),
    )
    fitted.check_missing_values(dataset_part.inputs)
    return fitted


def _fill_values(config: ImputationConfig, statistics: ColumnStatistics) -> np.ndarray:
    if isinstance(config.numeric, float):
        return np.full(len(statistics.num_present), config.numeric)
    fill = statistics.mean if statistics.median is None else statistics.median
    return np.where(statistics.num_present > 0, fill, 0.0)


def _compute_null_fractions(schema: Schema, statistics: ColumnStatistics, num_rows: int) -> tuple[float, ...]:
    """For each column, the share of rows without a value; of a list, at the place where most are without."""
    absent, misses, shares, offset = num_rows - statistics.num_present, iter(statistics.num_missing.tolist()), [], 0
    for column in schema.columns:
        if column.kind == "category":
            shares.append(next(misses) / num_rows)
        else:
            shares.append(int(absent[offset : offset + column.width].max()) / num_rows)
            offset += column.width
    return tuple(shares)


def _compute_mean_and_std(
    normalize: str | NormalizeConfig, statistics: ColumnStatistics, fill: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of the filled columns, float64 (n,) each."""
    if normalize in ("unit", "imagenet"):
        raise DataError(
            f"{normalize} is for images, but the data is a table", where=WHERE, fix="use standard, scalar or none"
        )
    columns = len(fill)
    if isinstance(normalize, NormalizeConfig):
        mean, std = fixed_mean_and_std(normalize, columns)
        return np.broadcast_to(mean, columns), np.broadcast_to(std, columns)
    if normalize == "none":
        return np.zeros(columns), np.ones(columns)
    share = 1 - statistics.num_present / num_rows
    gap = np.where(statistics.num_present > 0, fill - statistics.mean, 0.0)
    mean = np.where(statistics.num_present > 0, statistics.mean + share * gap, fill)
    variance = (1 - share) * statistics.variance + share * (1 - share) * np.square(gap)
    if normalize == "scalar" and columns:
        joint_mean = mean.mean()
        variance = np.broadcast_to((variance + np.square(mean - joint_mean)).mean(), columns)
        mean = np.broadcast_to(joint_mean, columns)
    return mean, np.where(variance == 0, 1.0, np.sqrt(variance))


def _fit_categories(column: Column, occur: np.ndarray, misses: bool, fallback: str) -> tuple[tuple[str, ...], int]:
    """The levels of the training rows in the source's order, and the code of a missing value."""
    categories = [level for level, found in zip(column.categories, occur, strict=True) if found]
    if fallback in ("own_level", "fail"):
        return tuple(categories), len(categories) + 1 if misses and fallback == "own_level" else 0
    if misses and fallback not in categories:
        categories.append(fallback)
    return tuple(categories), categories.index(fallback) + 1 if fallback in categories else 0
