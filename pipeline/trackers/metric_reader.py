"""The metric log as trackers read it: complete segments, then the live rows after them, as names and numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import WorkError
from pipeline.runs.metric_log import live
from pipeline.runs.metric_log.segments import MetricSchema, SegmentLayout
from pipeline.runs.run import Run
from pipeline.runs.status import StatusName
from pipeline.runs.writer import EVALUATIONS_FOLDER, STEPS_FOLDER

TRACKER_STORAGE_LIMIT_S = 10.0
"""Seconds that a tracker waits for storage before it reports the failure and tries again later."""

TRAIN_STEPS_SPLIT = "steps"
"""The value of `MetricRow.split` for training steps."""
_NON_METRIC_COLUMNS = ("run", "attempt", "step", "split", "time", "seconds", "samples", "correct")


@dataclass(frozen=True)
class MetricRow:
    """One training step, or one evaluation of one split."""

    split: str
    """`steps` for a training step, whose loss is that of its batch before the update."""
    step: int
    time: float
    """Seconds since 1970."""
    values: dict[str, float]
    """Finite metrics by column."""


@dataclass(frozen=True)
class LiveRows:
    """The rows after the last segment, as of now. A resume may revoke them."""

    segment: int
    """Index of the segment that will hold the first of these rows."""
    attempt: int
    """Number of the attempt that wrote them; 0 if there are none."""
    first_step: int
    """Their first step, or the next step if there are none."""
    rows: list[MetricRow]
    """Evaluations, then steps, each in order; a sample of them if there are many."""


@dataclass(frozen=True)
class MetricLogView:
    """The metric log of a run at one moment."""

    status: StatusName
    segments: list[int]
    """Indices of the segments, ascending. A listed segment is complete, and so are all before it."""
    live: LiveRows


class MetricLogReader:
    """Reads the metric log of a run.

    Raises
    ------
    StorageLostError: in any method, if storage is unavailable for longer than `TRACKER_STORAGE_LIMIT_S`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run.with_timeout(TRACKER_STORAGE_LIMIT_S)

    def read_view(self, status: StatusName) -> MetricLogView:
        """Return the metric log as of now, for a run with this status."""
        metadata = self.run.read_metadata()
        layout = SegmentLayout.from_metadata(metadata)
        # Before the segments, so that no row is in neither.
        live_tables = None
        if status != "finished":
            live_tables = live.read_live_tables(self.run, MetricSchema.from_metadata(metadata))
        segments = self._list_segments()
        segment = segments[-1] + 1 if segments else 0
        first = layout.first_step(segment) if segment else 0
        rows: list[MetricRow] = []
        if live_tables is not None:
            live_rows = [
                *_iter_evaluation_rows(_timestamps_to_int(live_tables.evaluations)),
                *_iter_step_rows(_timestamps_to_int(live_tables.steps)),
            ]
            rows = [row for row in live_rows if row.step >= first]
        return MetricLogView(
            status, segments, LiveRows(segment, live_tables.attempt if live_tables is not None else 0, first, rows)
        )

    def _list_segments(self) -> list[int]:
        names = self.run.storage.list(STEPS_FOLDER)
        return sorted(int(name[:-8]) for name in names if name.endswith(".parquet") and name[:-8].isdigit())

    def read_rows(self, segment: int) -> list[MetricRow]:
        """Return the rows of a segment: its evaluations, then its steps, each in order.

        Raises
        ------
        WorkError: a file of the segment is damaged; names it.
        """
        evaluations, steps = (
            self._read_table(f"{folder}/{segment:06d}.parquet") for folder in (EVALUATIONS_FOLDER, STEPS_FOLDER)
        )
        return [*_iter_evaluation_rows(evaluations), *_iter_step_rows(steps)]

    def _read_table(self, path: str) -> pa.Table:
        try:
            table: pa.Table = pq.read_table(io.BytesIO(self.run.storage.read(path)))
            return _timestamps_to_int(table)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise WorkError(
                f"this part of the metric log cannot be read ({reason})", where=self.run.storage.url + "/" + path
            ) from None


def group_by_split(rows: Iterable[MetricRow]) -> dict[str, list[MetricRow]]:
    """Group rows by split, keeping their order; training steps are the last group."""
    rows_by_split: dict[str, list[MetricRow]] = {}
    for row in rows:
        rows_by_split.setdefault(row.split, []).append(row)
    return {
        split: rows_by_split[split]
        for split in sorted(rows_by_split, key=lambda split: (split == TRAIN_STEPS_SPLIT, split))
    }


def _timestamps_to_int(table: pa.Table) -> pa.Table:
    """Convert timestamps to integer microseconds, which needs no time zone database."""
    types = [
        (schema_field.name, pa.int64() if pa.types.is_timestamp(schema_field.type) else schema_field.type)
        for schema_field in table.schema
    ]
    return table.cast(pa.schema(types))


def _iter_step_rows(table: pa.Table) -> Iterator[MetricRow]:
    for row in table.to_pylist():
        extra: dict[str, float | None] = {}
        if row["samples"] and row["correct"] is not None:
            extra["accuracy"] = row["correct"] / row["samples"]
        if row["seconds"]:
            extra["samples_per_second"] = row["samples"] / row["seconds"]
        yield _build_row(TRAIN_STEPS_SPLIT, row, extra)


def _iter_evaluation_rows(table: pa.Table) -> Iterator[MetricRow]:
    for row in table.to_pylist():
        yield _build_row(str(row["split"]), row, {"epoch": None})


def _build_row(split: str, row: dict[str, Any], extra: dict[str, float | None]) -> MetricRow:
    columns = {**row, **extra}
    values = {
        name: float(value) for name, value in columns.items() if name not in _NON_METRIC_COLUMNS and _is_finite(value)
    }
    return MetricRow(split, int(row["step"]), (row["time"] or 0) / 1e6, values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
