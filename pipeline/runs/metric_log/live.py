"""Rows that no cell of the metric log holds yet, for whoever watches a run. Never part of the log.

`live/steps/0001.parquet` and `live/evals/0001.parquet` have the log's columns and are replaced every few seconds. Each
attempt has files of its own, so a late write of one that was taken for dead changes nothing of the next one's; the
highest number counts. What a resume does again it takes back: such a row may come a second time.
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
"""So many rows a file at the most. Of more steps than that, every second is left out, or three of four, ...; of more
evaluations the first."""
LIVE_STORAGE_LIMIT_S = 5.0
"""How long storage may stay away; then this write is left out."""


class LiveWriter:
    """Writes the live rows of one attempt.

    `steps` and `evaluation` are for the training thread and cost nothing; all else is for one other thread. Nothing
    that happens to these files matters to the run.

    Parameters
    ----------
    layout, columns: of the run, as fixed at its birth.
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
        """Whether rows came since the last write."""
        return bool(self._blocks or self._evaluations)

    def log_steps(self, block: StepBlock) -> None:
        """A block of consecutive steps."""
        self._blocks.append(block)

    def log_evaluation(self, row: EvaluationRow) -> None:
        """One evaluation of one split."""
        self._evaluations.append(row)

    def resume(self, rows: PendingRows) -> None:
        """Begin with the rows from which the attempt goes on: those of its base that no cell holds."""
        self._rows.steps, self._rows.evaluations = rows.steps, rows.evaluations
        self._first_step = rows.first_step
        self._has_resumed = True

    def drop_published(self, rows: PendingRows) -> None:
        """Forget the rows that lie in cells now. Only ever after those were written: whoever reads this first and the
        cells after it misses none.

        rows: those of the writer, after a commit and all that followed from it.
        """
        self._first_step = rows.first_step

    def write(self) -> None:
        """Replace the files, where there is something new and `begin` was called. Faults of storage are passed over:
        the next write holds all that this one would have."""
        self._rows.add(_drain(self._blocks), _drain(self._evaluations))
        self._rows.steps = _downsample(self._rows.steps, self._first_step)
        self._rows.evaluations = _keep_newest(self._rows.evaluations, self._first_step)
        if self._has_resumed:
            with suppress(TrainyardError):
                self._replace()

    def close(self) -> None:
        """Remove all live rows, and write no more: training is over."""
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
    """The live rows of one attempt, as read."""

    attempt: int
    steps: pa.Table
    evaluations: pa.Table


def read_live_tables(run: Run, metric_schema: MetricSchema) -> LiveTables | None:
    """The live rows of the newest attempt that has any; None where there are none, or none that can be used.

    Who wants what the log does not have yet reads these first, then lists the cells, and takes the rows after the last
    cell's last step. They mean nothing once the run is finished.
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
        except (FileNotFoundError, StorageError):  # a run that just ended; or damage, which the next write repairs
            return None
    evaluations, steps = tables
    return LiveTables(attempt, steps, evaluations)


def remove_live_tables(run: Run) -> None:
    """Remove all live rows of a run that is over: each lies in a cell. Faults of storage are passed over."""
    with suppress(TrainyardError):
        run.storage.with_timeout(LIVE_STORAGE_LIMIT_S).delete_folder(LIVE_FOLDER)


def _file_name(attempt: int) -> str:
    return f"{attempt:04d}.parquet"


def _attempt_numbers(names: Iterable[str]) -> list[int]:
    return [int(name[:-8]) for name in names if re.fullmatch(r"[0-9]{4,9}\.parquet", name)]


def _drain(queue: deque[T]) -> list[T]:
    """All that waits now; another thread may append meanwhile."""
    return [queue.popleft() for _ in range(len(queue))]


def _downsample(steps: pa.Table, first: int) -> pa.Table:
    """Of the rows from step `first` on: those whose step is a multiple of a power of two, so that a later choice is a
    part of an earlier one; and the last."""
    step_numbers = steps["step"].to_numpy()
    stride = 1
    while len(step_numbers) and (step_numbers[-1] - first) // stride >= MAX_LIVE_ROWS:
        stride *= 2
    return steps.filter(
        pa.array((step_numbers >= first) & ((step_numbers % stride == 0) | (step_numbers == step_numbers[-1:])))
    ).combine_chunks()


def _keep_newest(evaluations: pa.Table, first: int) -> pa.Table:
    """The last rows of those from step `first` on; step 0 belongs to step 1."""
    step_numbers = evaluations["step"].to_numpy()
    rows = evaluations.filter(pa.array(step_numbers >= (first if first > 1 else 0)))
    return rows.slice(max(0, len(rows) - MAX_LIVE_ROWS)).combine_chunks()
