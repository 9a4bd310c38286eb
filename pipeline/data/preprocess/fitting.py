"""Fits the preprocessing of a table: what stands in for missing values, scales, and which levels there are."""

from __future__ import annotations

import numpy as np

from pipeline.data.preprocess.columns import TablePreprocess
from pipeline.data.preprocess.passes import Seen, look
from pipeline.data.preprocess.samples import WHERE, given_normalization
from pipeline.data.sources.arrays import Arrays
from pipeline.data.tables.schema import Column, Kind, Schema
from pipeline.errors import DataError
from pipeline.job import Job, Missing, Normalization, ParquetDataConfig


def fit_table(job: Job, arrays: Arrays, schema: Schema, rows: np.ndarray) -> TablePreprocess:
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
    statistics = look(arrays.inputs, rows, schema, medians=missing.numeric == "median")
    fill = _fill(missing, statistics)
    mean, std = _scales(job.data.normalize, statistics, fill, len(rows))
    columns: list[Column] = []
    codes: list[int] = []
    for column in schema.columns:
        if column.kind == "number":
            columns.append(column)
            continue
        occur, misses = statistics.levels[len(codes)], bool(statistics.misses[len(codes)])
        categories, code = _levels(column, occur, misses, missing.categorical)
        columns.append(Column(column.name, "category", levels=categories))
        codes.append(code)
    imputation: dict[Kind, object] = {"number": missing.numeric, "category": missing.categorical}
    fitted = TablePreprocess(
        Schema(tuple(columns)),
        tuple(fill.tolist()),
        tuple(mean.tolist()),
        tuple(std.tolist()),
        tuple(codes),
        job.data.one_hot_up_to,
        tuple(kind for kind, stand_in in imputation.items() if stand_in == "fail"),
        arrays.inputs.dtype.name,
        low=tuple(np.where(statistics.present > 0, statistics.low, fill).tolist()),
        high=tuple(np.where(statistics.present > 0, statistics.high, fill).tolist()),
        nulls=_null_shares(schema, statistics, len(rows)),
    )
    fitted.check(arrays.inputs)
    return fitted


def _fill(missing: Missing, seen: Seen) -> np.ndarray:
    if isinstance(missing.numeric, float):
        return np.full(len(seen.present), missing.numeric)
    fill = seen.mean if seen.median is None else seen.median
    return np.where(seen.present > 0, fill, 0.0)


def _null_shares(schema: Schema, seen: Seen, rows: int) -> tuple[float, ...]:
    """For each column, the share of rows without a value; of a list, at the place where most are without."""
    absent, misses, shares, offset = rows - seen.present, iter(seen.misses.tolist()), [], 0
    for column in schema.columns:
        if column.kind == "category":
            shares.append(next(misses) / rows)
        else:
            shares.append(int(absent[offset : offset + column.width].max()) / rows)
            offset += column.width
    return tuple(shares)


def _scales(wanted: str | Normalization, seen: Seen, fill: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of the filled columns, float64 (n,) each."""
    if wanted in ("unit", "imagenet"):
        raise DataError(
            f"{wanted} is for images, but the data is a table", where=WHERE, fix="use standard, scalar or none"
        )
    columns = len(fill)
    if isinstance(wanted, Normalization):
        mean, std = given_normalization(wanted, columns)
        return np.broadcast_to(mean, columns), np.broadcast_to(std, columns)
    if wanted == "none":
        return np.zeros(columns), np.ones(columns)
    share = 1 - seen.present / rows
    gap = np.where(seen.present > 0, fill - seen.mean, 0.0)
    mean = np.where(seen.present > 0, seen.mean + share * gap, fill)
    variance = (1 - share) * seen.variance + share * (1 - share) * np.square(gap)
    if wanted == "scalar" and columns:
        joint_mean = mean.mean()
        variance = np.broadcast_to((variance + np.square(mean - joint_mean)).mean(), columns)
        mean = np.broadcast_to(joint_mean, columns)
    return mean, np.where(variance == 0, 1.0, np.sqrt(variance))


def _levels(column: Column, occur: np.ndarray, misses: bool, stand_in: str) -> tuple[tuple[str, ...], int]:
    """The levels of the training rows in the source's order, and the code of a missing value."""
    categories = [level for level, found in zip(column.levels, occur, strict=True) if found]
    if stand_in in ("own_level", "fail"):
        return tuple(categories), len(categories) + 1 if misses and stand_in == "own_level" else 0
    if misses and stand_in not in categories:
        categories.append(stand_in)
    return tuple(categories), categories.index(stand_in) + 1 if stand_in in categories else 0
