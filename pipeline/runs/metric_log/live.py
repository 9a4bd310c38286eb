"""Rows that are not yet in a segment of the metric log, for displays of a running run. Never part of the log.

`live/steps/0001.parquet` and `live/evals/0001.parquet` have the log's columns and are replaced every few seconds. Each
attempt has separate files, so a late write of an attempt that was presumed dead does not change those of the next one;
the one with the highest number is current. Steps that a resume repeats are dropped first and appear again.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, TypeVar

import pyarrow as pa

from pipeline.errors import StorageError, TrainyardError
from pipeline.runs.metric_log.schema import MetricSchema, decode_table, encode_table
from pipeline.runs.metric_log.segments import EvaluationRow, PendingRows, SegmentLayout, StepBlock
from pipeline.runs.run import Run

T = TypeVar("T")

LIVE_FOLDER = "live"
LIVE_STEPS_FOLDER = f"{LIVE_FOLDER}/steps"
LIVE_EVALUATIONS_FOLDER = f"{LIVE_FOLDER}/evals"
MAX_LIVE_ROWS = 500
"""Maximum number of rows per file. Of more steps only every second is kept, or every fourth, ...; of more evaluations
the last."""
LIVE_STORAGE_LIMIT_S = 5.0
"""Seconds that storage may be unavailable before a write is skipped."""


class LiveWriter:
    """Write the live rows of one attempt.

    `log_steps` and `log_evaluation` are for the training thread and do not block; all other methods are for one other
    thread. Failures of these files do not affect the run.

    Parameters
    ----------
    layout, metric_schema: of the run, as fixed when it was created.
    """

    def __init__(self, run: Run, attempt: int, layout: SegmentLayout, metric_schema: MetricSchema) -> None:
        self._run = run
        self._storage = run.storage.with_timeout(LIVE_STORAGE_LIMIT_S)
        self._attempt = attempt
        self._rows = PendingRows(run.name, attempt, layout, metric_schema)
        self._first_step = 1
        self._has_resumed = False
        self._blocks: deque[StepBlock] = deque()
        self._evaluations: deque[EvaluationRow] = deque()
        self._written_tables: dict[str, pa.Table] = {}

    @property
    def has_new_rows(self) -> bool:
        """Whether rows were logged since the last write."""
        return bool(self._blocks or self._evaluations)

    def log_steps(self, block: StepBlock) -> None:
        """Log a block of consecutive steps."""
        self._blocks.append(block)

    def log_evaluation(self, row: EvaluationRow) -> None:
        """Log one evaluation of one split."""
        self._evaluations.append(row)

    def resume(self, rows: PendingRows) -> None:
        """Start with the rows from which the attempt resumes: those of its checkpoint that are not in a segment."""
        self._rows.steps, self._rows.evaluations = rows.steps, rows.evaluations
        self._first_step = rows.first_step
        self._has_resumed = True

    def drop_published(self, rows: PendingRows) -> None:
        """Drop the rows that are in segments now. Must be called after the segments were written, so that a reader of
        first the live rows and then the segments misses none.

        Parameters
        ----------
        rows: those of the writer, after a commit and everything that follows from it.
        """
        self._first_step = rows.first_step

    def write(self) -> None:
        """Replace the files if there are new rows and `resume` was called. Storage errors are ignored: the next write
        contains the same rows."""
        self._rows.add(_drain(self._blocks), _drain(self._evaluations))
        self._rows.steps = _downsample(self._rows.steps, self._first_step)
        self._rows.evaluations = _keep_newest(self._rows.evaluations, self._first_step)
        if self._has_resumed:
            with suppress(TrainyardError):
                self._replace()

    def close(self) -> None:
        """Remove all live rows and stop writing: training is over."""
        self._has_resumed = False
        remove_live_tables(self._run)

    def _replace(self) -> None:
        is_first = not self._written_tables
        for folder, table in ((LIVE_EVALUATIONS_FOLDER, self._rows.evaluations), (LIVE_STEPS_FOLDER, self._rows.steps)):
            if not table.equals(self._written_tables.get(folder)):
                self._storage.replace(f"{folder}/{_file_name(self._attempt)}", encode_table(table))
                self._written_tables[folder] = table
        if is_first and self._attempt > 1:
            for folder in (LIVE_EVALUATIONS_FOLDER, LIVE_STEPS_FOLDER):
                for number in _attempt_numbers(self._storage.list(folder)):
                    if number < self._attempt:
                        self._storage.delete(f"{folder}/{_file_name(number)}")


class LiveTables(NamedTuple):
    """The live rows of one attempt."""

    attempt: int
    steps: pa.Table
    evaluations: pa.Table


def read_live_tables(run: Run, metric_schema: MetricSchema) -> LiveTables | None:
    """Return the live rows of the newest attempt that has any; None if there are none, or they are unusable.

    To extend the log, read these first, then list the segments, and take the rows after the last step of the last
    segment. They are meaningless after the run is finished.
    """
    attempt = max(_attempt_numbers(run.storage.list(LIVE_STEPS_FOLDER)), default=0)
    if not attempt:
        return None
    tables = []
    schemas = (
        (LIVE_EVALUATIONS_FOLDER, metric_schema.evaluation_schema()),
        (LIVE_STEPS_FOLDER, metric_schema.step_schema()),
    )
    for folder, schema in schemas:
        path = f"{folder}/{_file_name(attempt)}"
        try:
            tables.append(decode_table(run.storage.read(path), schema, MAX_LIVE_ROWS + 1, path))
        except (FileNotFoundError, StorageError):  # the run has just ended; or damage, which the next write repairs
            return None
    evaluations, steps = tables
    return LiveTables(attempt, steps, evaluations)


def remove_live_tables(run: Run) -> None:
    """Remove all live rows of a finished run, which are all in segments. Storage errors are ignored."""
    with suppress(TrainyardError):
        run.storage.with_timeout(LIVE_STORAGE_LIMIT_S).delete_folder(LIVE_FOLDER)


def _file_name(attempt: int) -> str:
    return f"{attempt:04d}.parquet"


def _attempt_numbers(names: Iterable[str]) -> list[int]:
    return [int(name[:-8]) for name in names if re.fullmatch(r"[0-9]{4,9}\.parquet", name)]


def _drain(queue: deque[T]) -> list[T]:
    """Remove and return all current items; another thread may append meanwhile."""
    return [queue.popleft() for _ in range(len(queue))]


def _downsample(steps: pa.Table, first: int) -> pa.Table:
    """Select from the rows from step `first` on those whose step is a multiple of a power of two, so that a later
    selection is a subset of an earlier one; and the last row."""
    step_numbers = steps["step"].to_numpy()
    stride = 1
    while len(step_numbers) and (step_numbers[-1] - first) // stride >= MAX_LIVE_ROWS:
        stride *= 2
    return steps.filter(
        pa.array((step_numbers >= first) & ((step_numbers % stride == 0) | (step_numbers == step_numbers[-1:])))
    ).combine_chunks()


def _keep_newest(evaluations: pa.Table, first: int) -> pa.Table:
    """Return the last rows of those from step `first` on; step 0 belongs to step 1."""
    step_numbers = evaluations["step"].to_numpy()
    rows = evaluations.filter(pa.array(step_numbers >= (first if first > 1 else 0)))
    return rows.slice(max(0, len(rows) - MAX_LIVE_ROWS)).combine_chunks()
