"""The metric log as followers read it: whole cells, then the live rows after them, as names and numbers."""

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
"""How long a follower waits for storage before it says so and tries again later."""

TRAIN_STEPS_SPLIT = "steps"
"""What stands for a split in the rows of training steps."""
_NON_METRIC_COLUMNS = ("run", "attempt", "step", "split", "time", "seconds", "samples", "correct")


@dataclass(frozen=True)
class MetricRow:
    """One training step, or one evaluation of one split."""

    split: str
    """`steps` for a training step: its loss is that of a batch, before the update."""
    step: int
    time: float
    """Seconds since 1970."""
    values: dict[str, float]
    """What is finite of its metrics, by column."""


@dataclass(frozen=True)
class LiveRows:
    """What comes after the last cell, as it looks now: a resume may take it back."""

    segment: int
    """The cell that will hold the first of these rows."""
    attempt: int
    """Number of the attempt that shows them; 0 for none."""
    first_step: int
    """At which they begin, or would."""
    rows: list[MetricRow]
    """Some of them where they are many: evaluations, then steps, each in order."""


@dataclass(frozen=True)
class MetricLogView:
    """What is there of a run at one moment."""

    status: StatusName
    segments: list[int]
    """Indices of the cells, ascending. A cell that is listed is whole, and so are all below it."""
    live: LiveRows


class MetricLogReader:
    """The metric log of a run.

    Raises
    ------
    StorageLostError: in any method, where storage stays away for longer than `STORAGE_LIMIT_S`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run.with_timeout(TRACKER_STORAGE_LIMIT_S)

    def read_view(self, status: StatusName) -> MetricLogView:
        """What is there now, of a run that stands like this."""
        metadata = self.run.read_metadata()
        layout = SegmentLayout.from_metadata(metadata)
        live_tables = (
            live.read_live_tables(self.run, MetricSchema.from_metadata(metadata)) if status != "finished" else None
        )  # before the cells
        segments = self._list_segments()
        segment = segments[-1] + 1 if segments else 0
        first = layout.first_step(segment) if segment else 0
        rows: list[MetricRow] = []
        if live_tables is not None:
            both = [
                *_iter_evaluation_rows(_timestamps_to_int(live_tables.evaluations)),
                *_iter_step_rows(_timestamps_to_int(live_tables.steps)),
            ]
            rows = [row for row in both if row.step >= first]
        return MetricLogView(
            status, segments, LiveRows(segment, live_tables.attempt if live_tables is not None else 0, first, rows)
        )

    def _list_segments(self) -> list[int]:
        names = self.run.storage.list(STEPS_FOLDER)
        return sorted(int(name[:-8]) for name in names if name.endswith(".parquet") and name[:-8].isdigit())

    def read_rows(self, segment: int) -> list[MetricRow]:
        """The rows of a cell: its evaluations, then its steps, each in order.

        Raises
        ------
        WorkError: the cell is not what a writer leaves; names it.
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
            first = str(error).partition("\n")[0]
            raise WorkError(
                f"this part of the metric log cannot be read ({first})", where=self.run.storage.url + "/" + path
            ) from None


def group_by_split(rows: Iterable[MetricRow]) -> dict[str, list[MetricRow]]:
    """Rows of each split, in order; the training steps last."""
    rows_by_split: dict[str, list[MetricRow]] = {}
    for row in rows:
        rows_by_split.setdefault(row.split, []).append(row)
    return {
        split: rows_by_split[split]
        for split in sorted(rows_by_split, key=lambda split: (split == TRAIN_STEPS_SPLIT, split))
    }


def _timestamps_to_int(table: pa.Table) -> pa.Table:
    """Times as whole microseconds: no need of a time zone database."""
    kinds = [
        (schema_field.name, pa.int64() if pa.types.is_timestamp(schema_field.type) else schema_field.type)
        for schema_field in table.schema
    ]
    return table.cast(pa.schema(kinds))


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
