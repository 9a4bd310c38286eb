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
from pipeline.record import live
from pipeline.record.cells import CellLayout, Columns
from pipeline.record.run import Run
from pipeline.record.standing import Status
from pipeline.record.writer import EVALUATIONS, STEPS

STORAGE_LIMIT_S = 10.0
"""How long a follower waits for storage before it says so and tries again later."""

TRAIN_STEPS = "steps"
"""What stands for a split in the rows of training steps."""
_NO_METRICS = ("run", "attempt", "step", "split", "time", "seconds", "samples", "correct")


@dataclass(frozen=True)
class Row:
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

    cell: int
    """The cell that will hold the first of these rows."""
    attempt: int
    """Number of the attempt that shows them; 0 for none."""
    first_step: int
    """At which they begin, or would."""
    rows: list[Row]
    """Some of them where they are many: evaluations, then steps, each in order."""


@dataclass(frozen=True)
class Look:
    """What is there of a run at one moment."""

    status: Status
    cells: list[int]
    """Indices of the cells, ascending. A cell that is listed is whole, and so are all below it."""
    live: LiveRows


class MetricLog:
    """The metric log of a run.

    Raises
    ------
    StorageLostError: in any method, where storage stays away for longer than `STORAGE_LIMIT_S`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run.within(STORAGE_LIMIT_S)

    def look(self, status: Status) -> Look:
        """What is there now, of a run that stands like this."""
        metadata = self.run.facts()
        layout = CellLayout.from_facts(metadata)
        live_tables = live.read(self.run, Columns.from_facts(metadata)) if status != "finished" else None  # before the cells
        segments = self._cells()
        segment = segments[-1] + 1 if segments else 0
        first = layout.first_step(segment) if segment else 0
        rows: list[Row] = []
        if live_tables is not None:
            both = [*_evaluation_rows(_plain(live_tables.evaluations)), *_step_rows(_plain(live_tables.steps))]
            rows = [row for row in both if row.step >= first]
        return Look(status, segments, LiveRows(segment, live_tables.attempt if live_tables is not None else 0, first, rows))

    def _cells(self) -> list[int]:
        names = self.run.storage.list(STEPS)
        return sorted(int(name[:-8]) for name in names if name.endswith(".parquet") and name[:-8].isdigit())

    def rows(self, cell: int) -> list[Row]:
        """The rows of a cell: its evaluations, then its steps, each in order.

        Raises
        ------
        WorkError: the cell is not what a writer leaves; names it.
        """
        evaluations, steps = (self._table(f"{folder}/{cell:06d}.parquet") for folder in (EVALUATIONS, STEPS))
        return [*_evaluation_rows(evaluations), *_step_rows(steps)]

    def _table(self, path: str) -> pa.Table:
        try:
            table: pa.Table = pq.read_table(io.BytesIO(self.run.storage.read(path)))
            return _plain(table)
        except (pa.ArrowException, OSError) as error:
            first = str(error).partition("\n")[0]
            raise WorkError(
                f"this part of the metric log cannot be read ({first})", where=self.run.storage.url + "/" + path
            ) from None


def by_split(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each split, in order; the training steps last."""
    rows_by_split: dict[str, list[Row]] = {}
    for row in rows:
        rows_by_split.setdefault(row.split, []).append(row)
    return {split: rows_by_split[split] for split in sorted(rows_by_split, key=lambda split: (split == TRAIN_STEPS, split))}


def _plain(table: pa.Table) -> pa.Table:
    """Times as whole microseconds: no need of a time zone database."""
    kinds = [(schema_field.name, pa.int64() if pa.types.is_timestamp(schema_field.type) else schema_field.type) for schema_field in table.schema]
    return table.cast(pa.schema(kinds))


def _step_rows(table: pa.Table) -> Iterator[Row]:
    for row in table.to_pylist():
        extra: dict[str, float | None] = {}
        if row["samples"] and row["correct"] is not None:
            extra["accuracy"] = row["correct"] / row["samples"]
        if row["seconds"]:
            extra["samples_per_second"] = row["samples"] / row["seconds"]
        yield _row(TRAIN_STEPS, row, extra)


def _evaluation_rows(table: pa.Table) -> Iterator[Row]:
    for row in table.to_pylist():
        yield _row(str(row["split"]), row, {"epoch": None})


def _row(split: str, row: dict[str, Any], extra: dict[str, float | None]) -> Row:
    columns = {**row, **extra}
    values = {name: float(value) for name, value in columns.items() if name not in _NO_METRICS and _is_finite(value)}
    return Row(split, int(row["step"]), (row["time"] or 0) / 1e6, values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
