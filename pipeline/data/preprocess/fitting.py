"""Fits the preprocessing of a table: what stands in for missing values, scales, and which levels there are."""

from __future__ import annotations

import numpy as np

from pipeline.data.preprocess.columns import TabularTransform
from pipeline.data.preprocess.passes import ColumnStatistics, compute_statistics
from pipeline.data.preprocess.samples import WHERE, fixed_mean_and_std
from pipeline.data.sources.arrays import DatasetPart
from pipeline.data.tables.schema import Column, ColumnKind, Schema
from pipeline.errors import DataError
from pipeline.job import ImputationConfig, JobConfig, NormalizeConfig, ParquetDataConfig


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
