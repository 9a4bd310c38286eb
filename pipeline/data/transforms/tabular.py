"""Transforms of the rows of tables: imputation of missing values, scaling, and encoding of categories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ImputationConfig, JobConfig, NormalizeConfig, TableColumnsConfig
from pipeline.data.dataset import DatasetPart
from pipeline.data.serialization import ENCODINGS_VERSION, VERSION, check_stored_values, parse_float_name
from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.hashing import bucket_of
from pipeline.data.tabular.schema import Column, ColumnKind, Schema
from pipeline.data.tabular.times import TIME_WIDTHS
from pipeline.data.transforms.arrays import WHERE, TransformFn, fixed_mean_and_std
from pipeline.data.transforms.column_statistics import (
    ColumnStatistics,
    categorical_columns_of,
    compute_statistics,
    numeric_columns_of,
)
from pipeline.data.transforms.number_encodings import (
    ENCODING_KINDS,
    QUARTILES,
    EncodingKind,
    Knots,
    check_knots,
    compute_knots,
    compute_robust_scale,
    count_outputs,
    make_encoding_fn,
    select_encoding,
)
from pipeline.errors import DataError

MISSING_VALUE_HINTS: dict[ColumnKind, str] = {
    "number": "median, mean or a number",
    "category": "own_level or the category to use",
}

REQUIRED_STATISTICS = ("fill", "mean", "std")
"""Stored for each number of a column."""

STORED_STATISTICS = (*REQUIRED_STATISTICS, "low", "high")
"""The same, with those that checkpoints of earlier versions lack."""


@dataclass(frozen=True)
class TabularTransform:
    """How rows of a table are transformed: plain values, the same for training, evaluation and prediction.

    A transformed row contains first its numbers, filled and scaled, or encoded otherwise; then each categorical column
    of at most `one_hot_up_to` codes, one-hot encoded; then each categorical column with more codes as its code, an
    integer.

    The codes of a categorical column are 1 for its first category, 2 for the next, and so on: the categories of the
    training rows, and after them one for missing values, if a training row has one and `data.missing` makes them a
    separate category. Code 0 stands for every value that no training row has. It is neutral: one-hot it is all zeros;
    as a code it is an index that no training row uses.

    schema: the columns of a raw row, with the categories of the training rows only.
    fill, mean, std: for each number, in the order of the schema: the replacement for a missing value; (x - mean) / std.
        With an encoding they are numbers near its values and the scale of their differences; for robust, the median and
        the scale.
    missing_codes: for each categorical column, the code of a missing value.
    one_hot_up_to: the largest number of codes that is one-hot encoded.
    kinds_without_missing: kinds of columns in which missing values are an error.
    dtype: NumPy's name of the raw rows' type, to which new rows are converted too: float64 if float32 would lose digits
        that matter. Numbers are shifted and scaled in it, then converted to the type of the computation. Empty if an
        earlier version fitted: the type of the computation.
    low, high: for each number, its smallest and its largest value in training; if it had none, its fill value.
    null_fractions: for each column, the fraction of training rows without a value.
        These three are not used by the transform: new data is compared with them. They are empty in checkpoints of
        earlier versions.
    encoding: of the numbers, see `number_encodings`; None for (x - mean) / std.
    knots: for each number, what its encoding was fitted to; empty for None and robust.
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
    encoding: EncodingKind | None = None
    knots: Knots = ()

    @property
    def num_numbers(self) -> int:
        """How many of the first elements of a transformed row are numbers; one-hot columns follow, then codes."""
        return count_outputs(self.encoding, len(self.fill), self.knots)

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
        """For each of the last elements of a transformed row, which hold codes: the number of codes, 0 to size - 1."""
        return tuple(codes + 1 for codes in self._max_codes() if codes > self.one_hot_up_to)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a transformed row."""
        one_hot = sum(codes for codes in self._max_codes() if codes <= self.one_hot_up_to)
        return (self.num_numbers + one_hot + len(self.code_sizes),)

    def check_missing_values(self, raw: np.ndarray, schema: Schema | None = None) -> None:
        """Check that columns have no missing values where `data.missing` is fail.

        Parameters
        ----------
        raw: rows (N, schema.width).
        schema: their layout, if it differs from `self.schema`: the same columns in another order, with any categories.

        Raises
        ------
        DataError: names the column, the number of rows, and the first of them.
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
            column_counts = counts[offset : offset + column.width]
            kind: ColumnKind = "number" if column.is_numeric else "category"
            if kind in self.kinds_without_missing and column_counts.any():
                column_first_rows = first_rows[offset : offset + column.width]
                raise DataError(
                    f"{column_counts.max():,} of {len(raw):,} rows have no value in column {column.name!r}, the first "
                    f"is row {column_first_rows[column_first_rows >= 0].min()}",
                    where=f"data.missing.{'numeric' if column.is_numeric else 'categorical'}",
                    fix=f"fill them, leave the column out of data.features, or set {MISSING_VALUE_HINTS[kind]}",
                )

    def make_transform_fn(
        self, device: torch.device, dtype: torch.dtype, input_schema: Schema | None = None
    ) -> TransformFn:
        """Return a function from raw rows (B, schema.width) on `device` to (B, *output_shape) of `dtype`.

        Its result never shares memory with its argument.

        Parameters
        ----------
        input_schema: the schema that the rows are encoded with, if it differs from `self.schema`: the same columns in
            any order, with other categories. A code equal to the number of categories stands for any other category.
        """
        layouts = [
            [replace(column, categories=()) for column in schema.columns]
            for schema in (input_schema or self.schema, self.schema)
        ]
        if input_schema is not None and layouts[0] != layouts[1]:
            return self._make_reordering_fn(device, dtype, input_schema)
        numeric_fn = self._make_numeric_fn(device, dtype)
        if not self.categorical_columns:
            return numeric_fn
        offsets = torch.from_numpy(categorical_columns_of(self.schema)).to(device)
        starts, targets, values = (part.to(device) for part in self._build_lookup(input_schema or self.schema))
        values = values.to(dtype)
        count, width = self.num_numbers, self.output_shape[0]

        def transform(rows: Tensor) -> Tensor:
            codes = rows.index_select(1, offsets)
            entries = torch.where(codes.isnan(), -1, codes).long() + starts
            transformed = rows.new_zeros((len(rows), width), dtype=dtype)
            if count:
                transformed[:, :count] = numeric_fn(rows)
            return transformed.scatter_(1, targets[entries], values[entries])

        return transform

    def _make_reordering_fn(self, device: torch.device, dtype: torch.dtype, input_schema: Schema) -> TransformFn:
        """As `make_transform_fn`, for rows whose columns are in another order."""
        columns_by_name = {
            column.name: (column, offset)
            for column, offset in zip(input_schema.columns, input_schema.offsets, strict=True)
        }
        ordered = [columns_by_name[column.name] for column in self.schema.columns]
        same = all(
            column.width == input_column.width
            for column, (input_column, _) in zip(self.schema.columns, ordered, strict=True)
        )
        assert same, "other columns"
        positions = [offset + index for column, offset in ordered for index in range(column.width)]
        transform = self.make_transform_fn(device, dtype, Schema(tuple(column for column, _ in ordered)))
        order = torch.tensor(positions, device=device)
        return lambda rows: transform(rows.index_select(1, order))

    def _max_codes(self) -> list[int]:
        """Return the highest code of each categorical column."""
        return [
            max(len(column.categories), code)
            for column, code in zip(self.categorical_columns, self.missing_codes, strict=True)
        ]

    def _make_numeric_fn(self, device: torch.device, dtype: torch.dtype) -> TransformFn:
        work = torch.float64 if self.dtype == "float64" else dtype
        numeric_columns = torch.from_numpy(numeric_columns_of(self.schema)).to(device)
        has_numbers_only = len(numeric_columns) == self.schema.width
        if self.encoding is not None:
            encode = make_encoding_fn(self.encoding, self.fill, self.mean, self.std, self.knots, device, work)
            return lambda rows: encode(rows.index_select(1, numeric_columns).to(work)).to(dtype)
        fill, mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.fill, self.mean, self.std))
        # Columns far from zero keep their digits only if the mean is subtracted first. `offset` corrects the rounding
        # of the mean to `work`.
        shift = mean.to(work)
        offset, factor, filled = ((shift.double() - mean) / std, 1 / std, (fill - mean) / std)
        shift, offset, factor, filled = (values.to(device, work) for values in (shift, offset, factor, filled))

        def transform(rows: Tensor) -> Tensor:
            values = (rows if has_numbers_only else rows.index_select(1, numeric_columns)).to(work)
            scaled = torch.addcmul(offset, values - shift, factor)
            return torch.where(scaled.isnan(), filled, scaled).to(dtype)

        return transform

    def _build_lookup(self, input_schema: Schema) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table that encodes the category codes of `input_schema`: the index of each column's first entry,
        int64 (k,); and for each entry the index in the transformed row and the value to write there. The entry before a
        column's first is for a missing value, the one after its last for any other category."""
        codes = self._max_codes()
        is_one_hot = np.array([highest <= self.one_hot_up_to for highest in codes])
        widths = np.where(is_one_hot, codes, 1)
        begins = np.empty(len(codes), np.int64)
        order = np.argsort(~is_one_hot, kind="stable")  # one-hot columns first
        begins[order] = self.num_numbers + np.concatenate([[0], widths[order].cumsum()[:-1]])
        input_columns = [column for column in input_schema.columns if column.kind == "category"]
        targets: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for index, (column, input_column) in enumerate(zip(self.categorical_columns, input_columns, strict=True)):
            code_of = {category: code for code, category in enumerate(column.categories, start=1)}
            input_codes = (code_of.get(category, 0) for category in input_column.categories)
            entries = np.array([self.missing_codes[index], *input_codes, 0])
            targets.append(begins[index] + (np.maximum(entries - 1, 0) if is_one_hot[index] else 0 * entries))
            values.append(entries > 0 if is_one_hot[index] else entries)
        starts = [0, *accumulate(len(entries) for entries in targets)][:-1]
        return (
            torch.tensor(starts) + 1,
            torch.from_numpy(np.concatenate(targets)),
            torch.from_numpy(np.concatenate(values).astype(np.float64)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `input_transform_from_json` restores the same object from them."""
        parts = {name: iter(getattr(self, name)) for name in (STORED_STATISTICS if self.low else REQUIRED_STATISTICS)}
        missing, nulls, knots = iter(self.missing_codes), iter(self.null_fractions), iter(self.knots)
        columns: list[dict[str, Any]] = []
        for column in self.schema.columns:
            stored: dict[str, Any]
            if column.kind == "category":
                stored = {"levels": list(column.categories), "missing": next(missing)}
                if column.buckets:
                    stored["hashed"] = column.buckets
            else:
                stored = {name: list(islice(part, column.width)) for name, part in parts.items()}
                if self.knots:
                    stored["knots"] = [list(values) for values in islice(knots, column.width)]
            if self.null_fractions:
                stored["nulls"] = next(nulls)
            columns.append({"name": column.name, "kind": column.kind, **stored})
        is_new = self.encoding is not None or any(
            column.buckets or column.kind == "time" for column in self.schema.columns
        )
        return {
            "version": ENCODINGS_VERSION if is_new else VERSION,
            "kind": "table",
            **({} if self.encoding is None else {"encoding": self.encoding}),
            "one_hot_up_to": self.one_hot_up_to,
            "refused": list(self.kinds_without_missing),
            "dtype": self.dtype,
            "columns": columns,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TabularTransform:
        """Restore an object from the values that `to_json` returned.

        Raises
        ------
        DataError: the values were written by another version, or are damaged.
        """
        with check_stored_values(values):
            columns: list[Column] = []
            stored_parts = {name for stored in values["columns"] for name in stored}
            numbers: dict[str, list[float]] = {
                name: [] for name in STORED_STATISTICS if name in {*REQUIRED_STATISTICS, *stored_parts}
            }
            missing: list[int] = []
            nulls: list[float] = []
            knots: list[tuple[float, ...]] = []
            encoding = values.get("encoding")
            if encoding not in (None, *ENCODING_KINDS):
                raise ValueError(f"encoding {encoding!r}")
            for stored in values["columns"]:
                name = str(stored["name"])
                if "nulls" in stored_parts:
                    nulls.append(float(stored["nulls"]))
                if stored["kind"] == "category":
                    levels = tuple(map(str, stored["levels"]))
                    columns.append(Column(name, "category", categories=levels, buckets=int(stored.get("hashed", 0))))
                    missing.append(int(stored["missing"]))
                elif stored["kind"] in ("number", "time"):
                    widths = {len(stored[part]) for part in numbers}
                    if len(widths) != 1:
                        raise ValueError(f"column {name!r} has parts of different lengths")
                    columns.append(Column(name, stored["kind"], widths.pop()))
                    if stored["kind"] == "time" and columns[-1].width not in TIME_WIDTHS:
                        raise ValueError(f"column {name!r} has {columns[-1].width} numbers of a time")
                    for part, values_of_part in numbers.items():
                        values_of_part += map(float, stored[part])
                    knots += (tuple(map(float, positions)) for positions in stored.get("knots", ()))
                else:
                    raise ValueError(f"kind {stored['kind']!r}")
            check_knots(encoding, len(numbers["fill"]), tuple(knots))
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
                encoding=encoding,
                knots=tuple(knots),
            )


def fit_tabular_transform(
    job: JobConfig, dataset_part: DatasetPart, schema: Schema, indices: np.ndarray
) -> TabularTransform:
    """Fit what `data.missing`, `data.normalize` and `model.numeric_embedding` ask for; auto is standard.

    Standard deviations are those of the filled columns, and 1 for constant ones. Quantiles are those of the values that
    are present. A column without any value is filled with 0.

    Parameters
    ----------
    dataset_part: the training part of the dataset, of this schema.
    indices: the training split in it, int64 (n,): what is fitted depends on no other row.

    Raises
    ------
    DataError: the normalization does not fit a table; with `missing: fail`, any row has a missing value.
    """
    assert isinstance(job.data, TableColumnsConfig), "only tables have a schema"
    missing, encoding = job.data.missing, select_encoding(job)
    probabilities = QUARTILES if encoding == "robust" else (0.5,) if missing.numeric == "median" else ()
    statistics = compute_statistics(dataset_part.inputs, indices, schema, probabilities=probabilities)
    fill = _fill_values(missing, statistics)
    normalize = job.data.normalize if encoding is None else "standard"
    mean, std = _compute_mean_and_std(normalize, statistics, fill, len(indices))
    if encoding == "robust":
        first, median, third = (statistics.quantiles[quartile] for quartile in QUARTILES)
        mean = np.where(statistics.num_present > 0, median, fill)
        std = compute_robust_scale(first, third, statistics.low, statistics.high)
    columns: list[Column] = []
    codes: list[int] = []
    for column in schema.columns:
        if column.is_numeric:
            columns.append(column)
            continue
        is_present, has_missing = statistics.present_categories[len(codes)], bool(statistics.num_missing[len(codes)])
        categories, code = _fit_categories(column, is_present, has_missing, missing.categorical)
        columns.append(replace(column, categories=categories))
        codes.append(code)
    imputation: dict[ColumnKind, object] = {"number": missing.numeric, "category": missing.categorical}
    fitted = TabularTransform(
        Schema(tuple(columns)),
        tuple(fill.tolist()),
        tuple(mean.tolist()),
        tuple(std.tolist()),
        tuple(codes),
        job.data.one_hot_up_to,
        tuple(kind for kind, strategy in imputation.items() if strategy == "fail"),
        dataset_part.inputs.dtype.name,
        low=tuple(np.where(statistics.num_present > 0, statistics.low, fill).tolist()),
        high=tuple(np.where(statistics.num_present > 0, statistics.high, fill).tolist()),
        null_fractions=_compute_null_fractions(schema, statistics, len(indices)),
        encoding=encoding,
        knots=(
            compute_knots(encoding, dataset_part.inputs, indices, numeric_columns_of(schema), fill)
            if encoding is not None
            else ()
        ),
    )
    fitted.check_missing_values(dataset_part.inputs)
    return fitted


def _fill_values(config: ImputationConfig, statistics: ColumnStatistics) -> np.ndarray:
    if isinstance(config.numeric, float):
        return np.full(len(statistics.num_present), config.numeric)
    fill = statistics.quantiles[0.5] if config.numeric == "median" else statistics.mean
    return np.where(statistics.num_present > 0, fill, 0.0)


def _compute_null_fractions(schema: Schema, statistics: ColumnStatistics, num_rows: int) -> tuple[float, ...]:
    """Return the fraction of rows without a value for each column; for lists, of the element that is missing most."""
    missing_numbers, missing_categories = num_rows - statistics.num_present, iter(statistics.num_missing.tolist())
    fractions, offset = [], 0
    for column in schema.columns:
        if column.kind == "category":
            fractions.append(next(missing_categories) / num_rows)
        else:
            fractions.append(int(missing_numbers[offset : offset + column.width].max()) / num_rows)
            offset += column.width
    return tuple(fractions)


def _compute_mean_and_std(
    normalize: str | NormalizeConfig, statistics: ColumnStatistics, fill: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations of the filled columns, float64 (n,) each."""
    if normalize in ("unit", "imagenet"):
        raise DataError(
            f"{normalize} is for images, but the data is a table", where=WHERE, fix="use standard, scalar or none"
        )
    num_columns = len(fill)
    if isinstance(normalize, NormalizeConfig):
        mean, std = fixed_mean_and_std(normalize, num_columns)
        return np.broadcast_to(mean, num_columns), np.broadcast_to(std, num_columns)
    if normalize == "none":
        return np.zeros(num_columns), np.ones(num_columns)
    missing = 1 - statistics.num_present / num_rows
    gap = np.where(statistics.num_present > 0, fill - statistics.mean, 0.0)
    mean = np.where(statistics.num_present > 0, statistics.mean + missing * gap, fill)
    variance = (1 - missing) * statistics.variance + missing * (1 - missing) * np.square(gap)
    if normalize == "scalar" and num_columns:
        joint_mean = mean.mean()
        variance = np.broadcast_to((variance + np.square(mean - joint_mean)).mean(), num_columns)
        mean = np.broadcast_to(joint_mean, num_columns)
    return mean, np.where(variance == 0, 1.0, np.sqrt(variance))


def _fit_categories(
    column: Column, is_present: np.ndarray, has_missing: bool, strategy: str
) -> tuple[tuple[str, ...], int]:
    """Return the categories of the training rows in the source's order, and the code of a missing value.

    strategy: the value of `data.missing.categorical`.
    """
    categories = [category for category, present in zip(column.categories, is_present, strict=True) if present]
    if strategy in ("own_level", "fail"):
        return tuple(categories), len(categories) + 1 if has_missing and strategy == "own_level" else 0
    if column.buckets:
        strategy = str(bucket_of(strategy, column.buckets))
    if has_missing and strategy not in categories:
        categories.append(strategy)
    return tuple(categories), categories.index(strategy) + 1 if strategy in categories else 0
