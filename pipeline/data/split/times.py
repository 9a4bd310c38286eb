"""The newest rows held out."""

from __future__ import annotations

import numpy as np

from pipeline.data.sources.arrays import Dataset, SplitColumn
from pipeline.data.split.column import get_split_column
from pipeline.errors import DataError
from pipeline.job import TimeSplitsConfig

NANOSECONDS = {"s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9, "w": 7 * 86_400 * 10**9}


def split_by_time(config: TimeSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """The test split's window ends with the newest instant, the validation split's where that of the test split begins.

    A window of a length holds the instants from its end back to, but not including, its end less the length: 14d of
    days are 14 days. A share begins at the instant that brings its rows nearest to it, the later of two. Rows of one
    instant stay together.

    Raises
    ------
    DataError: a length that does not fit the column, or windows that leave nothing to train.
    """
    column = get_split_column(dataset, config.column)
    values = column.values
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    # Where windows may begin in that order: at the first row of an instant, or behind the last.
    begins = np.append(np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])), len(ordered))
    ids: dict[str, np.ndarray] = {}
    end, limit = len(ordered), ordered[-1]
    for name, window in (("test", config.test), ("val", config.val)):
        if window == 0:
            continue
        length = _window_length(name, window, column)
        if length is not None:
            limit = limit - length
            first = int(np.searchsorted(ordered, limit, side="right"))
        else:
            target_row = end - round(len(ordered) * float(window))
            possible_starts = begins[begins <= end]
            first = int(
                possible_starts[len(possible_starts) - 1 - np.argmin(np.abs(possible_starts[::-1] - target_row))]
            )
            limit = ordered[first - 1]
        if first == 0 or first >= end:
            raise DataError(
                f"{name}: {window} takes {'nothing' if first >= end else 'all'} of the {end:,} rows"
                f"{' before the test split' if end < len(ordered) else ''}",
                where=f"data.splits.{name}",
                fix=f"ask for {'more' if first >= end else 'less'}; {_format_span(config.column, column)}",
            )
        ids[name] = np.sort(order[first:end])
        end = first
    return {"train": np.sort(order[:end]), **ids}


def _window_length(name: str, window: float | str, column: SplitColumn) -> float | int | None:
    """A window's length in the column's unit; None for a share."""
    if not isinstance(window, str) and window < 1:
        return None
    if isinstance(window, str) == column.is_time and not column.value_names:
        return window if not isinstance(window, str) else round(float(window[:-1]) * NANOSECONDS[window[-1]])
    kind = "text" if column.value_names else "a timestamp" if column.is_time else "a number"
    fix = {
        "text": "convert it to a timestamp or a number",
        "a timestamp": "give a share below 1, or a length with its unit, such as 14d",
        "a number": "give a share below 1, or a plain number in the column's unit",
    }
    raise DataError(f"{name}: {window} is no length of {kind}", where=f"data.splits.{name}", fix=fix[kind])


def _format_span(name: str, column: SplitColumn) -> str:
    oldest, newest = column.values.min(), column.values.max()
    if column.is_time:
        oldest, newest = (np.datetime64(int(value), "ns").astype("datetime64[s]") for value in (oldest, newest))
    return f"{name} goes from {oldest} to {newest}"
