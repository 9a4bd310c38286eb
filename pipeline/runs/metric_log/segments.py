"""The metric log: rows as Parquet tables, in segments, which are ranges of steps fixed when the run is created."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import StorageError
from pipeline.runs.metric_log.schema import MetricSchema, decode_table, encode_table

__all__ = ["Segment", "SegmentLayout", "MetricSchema", "EvaluationRow", "PendingRows", "StepBlock", "encode_table"]

MAX_CHECKPOINT_ROWS = 10_000_000
"""Maximum number of rows in a checkpoint; commits are made long before."""

_TABLE_COLUMN = "table"
"""The column of rows.parquet that distinguishes rows of steps and of evaluations."""

StepBlock = Mapping[str, np.ndarray[Any, Any]]
"""Consecutive steps: one array per column, `time` in seconds since 1970. A missing column, or NaN in an integer column,
becomes null."""
EvaluationRow = Mapping[str, Any]


@dataclass(frozen=True)
class SegmentLayout:
    """The ranges of steps that share a file of the metric log.

    The first segment has `first_segment_steps` steps; each further one has as many as all before it together, but at
    most `max_segment_steps`. So the first rows of a run are soon in a segment, and a long run has few segments. If
    both are equal, all segments have the same size, as in earlier versions.

    Raises
    ------
    ValueError: not 1 <= first_segment_steps <= max_segment_steps.
    """

    first_segment_steps: int
    max_segment_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.first_segment_steps <= self.max_segment_steps:
            raise ValueError(f"segments of {self.first_segment_steps} to {self.max_segment_steps} steps")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> SegmentLayout:
        """Return the layout recorded when the run was created, as `cell_steps` and `first_cell_steps` (absent in runs
        of earlier versions).

        Raises
        ------
        StorageError: the record is not valid.
        """
        max_steps = metadata["cell_steps"]
        try:
            return cls(metadata.get("first_cell_steps", max_steps), max_steps)
        except ValueError as error:
            raise StorageError(str(error), where="job.yaml", fix="restore it") from None

    @property
    def _last_growing_segment(self) -> int:
        """The last segment that is as long as all before it together."""
        return (self.max_segment_steps // self.first_segment_steps).bit_length()

    def last_step(self, segment: int) -> int:
        """Return the last step of a segment."""
        last_growing = self._last_growing_segment
        return (self.first_segment_steps << min(segment, last_growing)) + max(
            0, segment - last_growing
        ) * self.max_segment_steps

    def first_step(self, segment: int) -> int:
        """Return the first step of a segment, from 1 (step 0, which only has evaluations, belongs to segment 0)."""
        return self.last_step(segment - 1) + 1 if segment else 1

    def segment_of(self, step: int) -> int:
        """Return the segment of a step."""
        last_growing = self._last_growing_segment
        steps_beyond = step - (self.first_segment_steps << last_growing)
        if steps_beyond > 0:
            return last_growing - (-steps_beyond // self.max_segment_steps)
        return (-(-max(step, 1) // self.first_segment_steps) - 1).bit_length()

    def count_complete(self, step: int) -> int:
        """Return how many segments are complete when training is at `step`."""
        return self.segment_of(step + 1)


@dataclass(frozen=True)
class Segment:
    """The rows of one segment."""

    index: int
    steps: pa.Table
    evaluations: pa.Table

    @property
    def file_name(self) -> str:
        """Name of the segment's file in both folders."""
        return f"{self.index:06d}.parquet"


class PendingRows:
    """Rows that are not yet in a complete segment in storage, from the first step of a segment on.

    Parameters
    ----------
    run, attempt: values of those columns for the rows that are added.
    layout: of the run's segments, fixed when it was created.
    """

    def __init__(self, run: str, attempt: int, layout: SegmentLayout, metric_schema: MetricSchema) -> None:
        self._run = run
        self._attempt = attempt
        self._layout = layout
        self._step_schema = metric_schema.step_schema()
        self._evaluation_schema = metric_schema.evaluation_schema()
        self.first_segment = 0
        self.steps = self._step_schema.empty_table()
        self.evaluations = self._evaluation_schema.empty_table()

    def load(self, data: bytes, first_segment: int, step: int | None = None) -> None:
        """Load the rows of a checkpoint, replacing all current ones.

        Parameters
        ----------
        data: `rows.parquet` of the checkpoint.
        step: that of the checkpoint, at which the rows must end.

        Raises
        ------
        StorageError: the rows are not valid for this run.
        """
        table = decode_table(data, self._combined_schema(), MAX_CHECKPOINT_ROWS, "rows.parquet of the checkpoint")
        is_step = table[_TABLE_COLUMN].to_numpy() == "steps"
        self.steps = table.filter(pa.array(is_step)).select(self._step_schema.names).cast(self._step_schema)
        self.evaluations = (
            table.filter(pa.array(~is_step)).select(self._evaluation_schema.names).cast(self._evaluation_schema)
        )
        self.first_segment = first_segment
        last_step = self.first_step - 1 + len(self.steps)
        try:
            self.check_contiguous(last_step)
        except (ValueError, OverflowError) as error:
            raise StorageError(str(error), where="rows.parquet of the checkpoint", fix="use another --name") from None
        if step is not None and step != last_step:
            raise StorageError(
                f"the rows end at step {last_step}, not {step}",
                where="rows.parquet of the checkpoint",
                fix="use another --name",
            )

    @property
    def first_step(self) -> int:
        """The first step that is not in a complete segment in storage."""
        return self._layout.first_step(self.first_segment)

    def add(self, blocks: Sequence[StepBlock], evaluations: Sequence[EvaluationRow]) -> None:
        """Append rows.

        Raises
        ------
        ValueError: a column that the run does not have.
        """
        if blocks:
            self.steps = pa.concat_tables([self.steps, self._build_step_table(blocks)])
        if evaluations:
            self.evaluations = pa.concat_tables([self.evaluations, self._build_evaluation_table(evaluations)])

    def _combined_schema(self) -> pa.Schema:
        combined = pa.unify_schemas([self._step_schema, self._evaluation_schema])
        return combined.append(pa.field(_TABLE_COLUMN, pa.string()))

    def check_contiguous(self, step: int) -> None:
        """Check that every step up to `step` is present once, in order, with no evaluation of another step.

        Raises
        ------
        ValueError: otherwise.
        """
        first = self.first_step
        steps = self.steps["step"].to_numpy()
        if not np.array_equal(steps, np.arange(first, step + 1)):
            raise ValueError(f"a commit at step {step} needs every row from step {first} on, once and in order")
        evaluation_steps = self.evaluations["step"].to_numpy()
        if len(evaluation_steps) and (
            np.any(np.diff(evaluation_steps) < 0)
            or evaluation_steps[-1] > step
            or evaluation_steps[0] < (first if first > 1 else 0)
        ):
            raise ValueError(f"evaluations must come in order, from step {first} to {step}")

    def to_parquet(self) -> bytes:
        """Return `rows.parquet`: both tables in one, distinguished by the column `table`."""
        combined = pa.concat_tables(
            [
                self.steps.append_column(_TABLE_COLUMN, pa.repeat("steps", len(self.steps))),
                self.evaluations.append_column(_TABLE_COLUMN, pa.repeat("evals", len(self.evaluations))),
            ],
            promote_options="default",
        )
        return encode_table(combined)

    def iter_segments(self, step: int, *, is_final: bool) -> Iterator[Segment]:
        """Yield the segments that a commit at `step` completes, ascending; at the end also the incomplete last one."""
        layout, offset = self._layout, self.first_step
        count = layout.segment_of(step) + 1 if is_final else layout.count_complete(step)
        evaluation_steps = self.evaluations["step"].to_numpy()
        for index in range(self.first_segment, count):
            first, last = layout.first_step(index), layout.last_step(index)
            begin, stop = np.searchsorted(evaluation_steps, [first if index else 0, last + 1])
            yield Segment(
                index,
                self.steps.slice(first - offset, last - first + 1),
                self.evaluations.slice(int(begin), int(stop - begin)),
            )

    def drop_published(self, step: int) -> None:
        """Drop the complete segments up to `step`: they are in storage."""
        first_segment = max(self.first_segment, self._layout.count_complete(step))
        first = self._layout.first_step(first_segment)
        offset = first - self.first_step
        evaluation_steps = self.evaluations["step"].to_numpy()
        begin = int(np.searchsorted(evaluation_steps, first)) if first_segment else 0
        # Copies, because a slice would keep all original rows in memory.
        self.steps = _copy_table(self.steps.slice(offset))
        self.evaluations = _copy_table(self.evaluations.slice(begin))
        self.first_segment = first_segment

    def find_nonfinite_row(self) -> dict[str, Any] | None:
        """Return the first row whose loss is NaN or infinite."""
        for table in (self.steps, self.evaluations):
            nonfinite = np.flatnonzero(~np.isfinite(table["loss"].fill_null(0.0).to_numpy()))
            if len(nonfinite):
                row: dict[str, Any] = table.slice(int(nonfinite[0]), 1).to_pylist()[0]
                return {**row, "time": row["time"].isoformat() if row["time"] is not None else None}
        return None

    def last_learning_rate(self) -> float | None:
        """Return the learning rate of the last step."""
        return float(self.steps["lr"][-1].as_py()) if len(self.steps) else None

    def _build_step_table(self, blocks: Sequence[StepBlock]) -> pa.Table:
        reserved = {"run", "attempt"}
        for block in blocks:
            _check_column_names(block, reserved, self._step_schema)
        lengths = [len(block["step"]) for block in blocks]
        columns = []
        for schema_field in self._step_schema:
            parts = [block.get(schema_field.name) for block in blocks]
            if schema_field.name in reserved:
                value = self._run if schema_field.name == "run" else self._attempt
                columns.append(pa.repeat(pa.scalar(value, schema_field.type), sum(lengths)))
            elif any(part is None for part in parts):
                columns.append(
                    pa.chunked_array(
                        [
                            pa.nulls(length, schema_field.type) if part is None else _to_arrow(part, schema_field.type)
                            for part, length in zip(parts, lengths, strict=True)
                        ],
                        schema_field.type,
                    )
                )
            else:
                columns.append(
                    _to_arrow(np.concatenate([part for part in parts if part is not None]), schema_field.type)
                )
        return pa.table(columns, schema=self._step_schema)

    def _build_evaluation_table(self, rows: Sequence[EvaluationRow]) -> pa.Table:
        reserved = {"run", "attempt"}
        for row in rows:
            _check_column_names(row, reserved, self._evaluation_schema)
        columns = []
        for schema_field in self._evaluation_schema:
            name = schema_field.name
            fixed: dict[str, Any] = {"run": self._run, "attempt": self._attempt}
            values = [fixed.get(name, row.get(name)) for row in rows]
            if pa.types.is_integer(schema_field.type) or pa.types.is_timestamp(schema_field.type):
                floats = [np.nan if value is None else float(value) for value in values]
                columns.append(_to_arrow(np.array(floats), schema_field.type))
            else:
                # An undefined metric is NaN and stored as null, so that readers do not average it; a NaN loss is kept.
                columns.append(pa.array(values, schema_field.type, from_pandas=name != "loss"))
        return pa.table(columns, schema=self._evaluation_schema)


def _to_arrow(values: np.ndarray[Any, Any], data_type: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(data_type):
        missing = np.isnan(values)
        whole = np.rint(np.where(missing, 0.0, values) * 1e6).astype(np.int64)
        return pa.array(whole, pa.int64(), mask=missing).cast(data_type)
    if pa.types.is_integer(data_type) and np.issubdtype(values.dtype, np.floating):
        missing = np.isnan(values)
        return pa.array(np.rint(np.where(missing, 0.0, values)).astype(np.int64), data_type, mask=missing)
    return pa.array(values, data_type)


def _check_column_names(row: Mapping[str, Any], reserved: set[str], schema: pa.Schema) -> None:
    unknown = row.keys() - set(schema.names) | row.keys() & reserved
    if unknown:
        raise ValueError(f"not among the columns fixed when the run was created: {', '.join(sorted(unknown))}")


def _copy_table(table: pa.Table) -> pa.Table:
    return pa.table({name: table[name].combine_chunks() for name in table.column_names}, schema=table.schema).take(
        pa.array(np.arange(len(table)))
    )
