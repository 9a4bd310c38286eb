"""Dates, times and durations as numbers: an elapsed time, and positions in cycles as sine and cosine.

A point in time becomes the days since 1970 with their fraction, and its positions in the year (by the day of the year)
and in the week (by the day of the week). A column that can have a time of day also has the position in the day. A time
of day alone becomes its fraction of the day and that position. So the ends of a cycle are neighbors.

Times with a time zone are instants in UTC; times without one are taken as they are.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

DATE_WIDTH, TIMESTAMP_WIDTH, CLOCK_WIDTH = 5, 7, 3
"""Numbers of a date, of a date with a time of day, and of a time of day."""

TIME_WIDTHS = (DATE_WIDTH, TIMESTAMP_WIDTH, CLOCK_WIDTH)

SECONDS_PER_DAY = 86_400

UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

FIRST_WEEKDAY = 3
"""1970-01-01 was a Thursday; weeks begin on Monday."""


def feature_width(arrow_type: pa.DataType) -> int:
    """Return how many numbers a column of dates, times or text that is parsed becomes."""
    if pa.types.is_time(arrow_type):
        return CLOCK_WIDTH
    return DATE_WIDTH if pa.types.is_date(arrow_type) else TIMESTAMP_WIDTH


def times_to_numbers(array: pa.Array, width: int) -> np.ndarray:
    """Return the numbers of a column, float64 (n, width), NaN where null.

    Parameters
    ----------
    array: of dates, timestamps, or ISO 8601 text; with `CLOCK_WIDTH`, of times of day.

    Raises
    ------
    pa.ArrowInvalid: a text is not a date or time.
    """
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    days, fraction = _split_days(array)
    numbers = np.empty((len(array), width))
    if width == CLOCK_WIDTH:
        numbers[:, 0] = fraction
    else:
        dates = days.astype("datetime64[D]")
        years = dates.astype("datetime64[Y]")
        first, next_first = (start.astype("datetime64[D]").astype(np.int64) for start in (years, years + 1))
        numbers[:, 0] = days + fraction
        numbers[:, 1:3] = _to_circle((days - first) / (next_first - first))
        numbers[:, 3:5] = _to_circle((days + FIRST_WEEKDAY) % 7 / 7)
    if width != DATE_WIDTH:
        numbers[:, -2:] = _to_circle(fraction)
    numbers[is_null] = np.nan
    return numbers


def durations_to_seconds(array: pa.Array) -> np.ndarray:
    """Return durations in seconds, float64 (n,), NaN where null."""
    counts = array.cast(pa.int64())
    seconds: np.ndarray = counts.fill_null(0).to_numpy(zero_copy_only=False) / UNITS_PER_SECOND[array.type.unit]
    seconds[counts.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return seconds


def format_number(number: float, width: int) -> str:
    """Return the first of a column's numbers as text: a date, a date with its time of day, or a time of day."""
    seconds = round(number * SECONDS_PER_DAY)
    if width == CLOCK_WIDTH:
        return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    text = str(np.datetime64(seconds, "s")).replace("T", " ")
    return text.removesuffix(" 00:00:00")


def _split_days(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return whole days since 1970, int64 (n,), and the fraction of the day, float64 (n,); 0 where null."""
    kind: Any = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        array = _parse(array)
        kind = array.type
    if pa.types.is_date32(kind):
        counts, units_per_day = array.cast(pa.int32()).cast(pa.int64()), 1
    elif pa.types.is_date64(kind):
        counts, units_per_day = array.cast(pa.int64()), SECONDS_PER_DAY * UNITS_PER_SECOND["ms"]
    else:
        integers = pa.int32() if pa.types.is_time32(kind) else pa.int64()
        counts, units_per_day = array.cast(integers).cast(pa.int64()), SECONDS_PER_DAY * UNITS_PER_SECOND[kind.unit]
    units = counts.fill_null(0).to_numpy(zero_copy_only=False)
    days = units // units_per_day
    return days, (units - days * units_per_day) / units_per_day


def _parse(array: pa.Array) -> pa.Array:
    """Return ISO 8601 texts as timestamps; all of them have a time zone, or none has."""
    array = array.cast(pa.string())
    with suppress(pa.ArrowInvalid):
        return array.cast(pa.timestamp("us"))
    with suppress(pa.ArrowInvalid):
        return array.cast(pa.timestamp("us", "UTC"))
    return array.cast(pa.timestamp("ns"))  # more digits; else an error with the text


def _to_circle(turns: np.ndarray) -> np.ndarray:
    """Return the sine and the cosine of an angle in turns, (n, 2)."""
    return np.stack([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], 1)
