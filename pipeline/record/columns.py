"""Columns of the metric log, and how its tables become files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.job import Job

MAGIC = b"PAR1"
MOST_BYTES, MOST_BYTES_A_ROW = 10_000_000, 4096
"""What a file may take unpacked: so much, and so much a row. (A row of ours takes a hundred.)"""

Kind = Literal["float64", "int64", "string", "bool"]
_TYPES = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string(), "bool": pa.bool_()}
_TIME = pa.timestamp("us", tz="UTC")
_LEAD = [("run", pa.string()), ("attempt", pa.int64()), ("epoch", pa.int64()), ("step", pa.int64())]
_STEPS = [
    *_LEAD,
    ("loss", pa.float64()),
    ("correct", pa.int64()),
    ("lr", pa.float64()),
    ("samples", pa.int64()),
    ("seconds", pa.float64()),
    ("time", _TIME),
]
_EVALUATIONS = [
    *_LEAD,
    ("split", pa.string()),
    ("loss", pa.float64()),
    ("accuracy", pa.float64()),
    ("correct", pa.int64()),
    ("samples", pa.int64()),
    ("seconds", pa.float64()),
    ("time", _TIME),
]


@dataclass(frozen=True)
class Columns:
    """What is logged besides the columns that every run has, as name to type; fixed at a run's birth."""

    steps: Mapping[str, Kind] = field(default_factory=dict)
    evaluations: Mapping[str, Kind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.steps.keys() & self.evaluations.keys():
            if self.steps[name] != self.evaluations[name]:
                raise ValueError(f"the column {name!r} must have one type in both tables")

    @classmethod
    def of_job(cls, job: Job, targets: int | None = None) -> Columns:
        """What the job's task and its user measure besides loss and accuracy, and for fp16 how the loss is scaled.

        Parameters
        ----------
        targets: of a regression, how many numbers it learns; those of `data.label` by default.
        """
        standard_names = {name for name, _ in _EVALUATIONS}
        names = [name for name in job.measured(targets) if name not in standard_names]
        steps = ("loss_scale", "skipped") if job.train.precision == "fp16" else ()
        return cls(steps=dict.fromkeys(steps, "float64"), evaluations=dict.fromkeys(names, "float64"))

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Columns:
        """Those that a run's birth recorded as `columns`; none without it.

        Raises
        ------
        StorageError: not what `to_json` gave.
        """
        tree = facts.get("columns") or {}
        steps, evaluations = tree.get("steps", {}), tree.get("evaluations", {})
        sections = (steps, evaluations)
        if not all(isinstance(section, dict) and set(map(str, section.values())) <= _TYPES.keys() for section in sections):
            raise StorageError("columns of a type that no run has", where="job.yaml", fix="restore it")
        return cls(steps, evaluations)

    def beyond(self, there: Columns) -> list[str]:
        """Columns of evaluations that a run does not have which was born with others."""
        return [name for name in self.evaluations if name not in there.evaluations]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a birth's `columns`."""
        return {"steps": dict(self.steps), "evaluations": dict(self.evaluations)}

    def step_schema(self) -> pa.Schema:
        """Columns of `metrics/steps`."""
        return pa.schema([*_STEPS, *((name, _TYPES[kind]) for name, kind in self.steps.items())])

    def evaluation_schema(self) -> pa.Schema:
        """Columns of `metrics/evals`."""
        return pa.schema([*_EVALUATIONS, *((name, _TYPES[kind]) for name, kind in self.evaluations.items())])


def encode(table: pa.Table) -> bytes:
    """A Parquet file, small and readable by all: 2 to 5 bytes a row. The same table gives the same bytes."""
    dictionary = [one.name for one in table.schema if pa.types.is_string(one.type)]
    encodings = {
        one.name: "BYTE_STREAM_SPLIT" if pa.types.is_floating(one.type) else "DELTA_BINARY_PACKED"
        for one in table.schema
        if one.name not in dictionary and not pa.types.is_boolean(one.type)
    }
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_dictionary=dictionary,
        column_encoding=encodings,
        row_group_size=10_000,
        write_statistics=["step", "epoch", "loss"],
        write_page_checksum=True,
    )
    return buffer.getvalue()


def decode(data: bytes, schema: pa.Schema, most_rows: int, what: str) -> pa.Table:
    """The table of a file that `encode` wrote. What the file says of itself is checked before anything is unpacked.

    Parameters
    ----------
    schema: the columns that it must have, in any order.

    Raises
    ------
    StorageError: no such file, damaged, of other columns or of more rows.
    """
    try:
        if data[:4] != MAGIC:  # pyarrow looks at the end alone
            raise ValueError("it does not begin as a Parquet file")
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        file_schema = file.schema_arrow
        if {one.name: one.type for one in file_schema} != {one.name: one.type for one in schema} or len(file_schema) != len(schema):
            raise ValueError("its columns are others")
        if not 0 <= file.metadata.num_rows <= most_rows:
            raise ValueError(f"{file.metadata.num_rows:,} rows")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > MOST_BYTES + MOST_BYTES_A_ROW * file.metadata.num_rows:
            raise ValueError("rows that are too large")
        table: pa.Table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, ValueError, OSError, OverflowError) as error:
        problem = str(error).partition("\n")[0][:200]
        raise StorageError(f"cannot be used: {problem}", where=what, fix="use another checkpoint") from None
    return table.select(schema.names)
