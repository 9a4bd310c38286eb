"""The columns of the metric log, and the encoding of its tables as Parquet files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig
from pipeline.errors import StorageError

PARQUET_MAGIC = b"PAR1"
MAX_UNPACKED_BYTES, MAX_UNPACKED_BYTES_PER_ROW = 10_000_000, 4096
"""Maximum unpacked size of a file: a constant plus a size per row. (A typical row takes 100 bytes.)"""

ColumnType = Literal["float64", "int64", "string", "bool"]
_ARROW_TYPES = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string(), "bool": pa.bool_()}
_TIME = pa.timestamp("us", tz="UTC")
_COMMON_COLUMNS = [("run", pa.string()), ("attempt", pa.int64()), ("epoch", pa.int64()), ("step", pa.int64())]
_STEP_COLUMNS = [
    *_COMMON_COLUMNS,
    ("loss", pa.float64()),
    ("correct", pa.int64()),
    ("lr", pa.float64()),
    ("samples", pa.int64()),
    ("seconds", pa.float64()),
    ("time", _TIME),
]
_EVALUATION_COLUMNS = [
    *_COMMON_COLUMNS,
    ("split", pa.string()),
    ("loss", pa.float64()),
    ("accuracy", pa.float64()),
    ("correct", pa.int64()),
    ("samples", pa.int64()),
    ("seconds", pa.float64()),
    ("time", _TIME),
]


@dataclass(frozen=True)
class MetricSchema:
    """Additional columns of a run, as name to type; fixed when the run is created."""

    steps: Mapping[str, ColumnType] = field(default_factory=dict)
    evaluations: Mapping[str, ColumnType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.steps.keys() & self.evaluations.keys():
            if self.steps[name] != self.evaluations[name]:
                raise ValueError(f"the column {name!r} must have one type in both tables")

    @classmethod
    def from_job(cls, job: JobConfig, metric_columns: Sequence[str] | None = None) -> MetricSchema:
        """Return the columns for the metrics of the job's task and of its user, and for fp16 those of the loss scale.

        Parameters
        ----------
        metric_columns: see `JobConfig.metric_columns`; by default those that the job alone determines.
        """
        standard_names = {name for name, _ in _EVALUATION_COLUMNS}
        columns = job.metric_columns() if metric_columns is None else metric_columns
        names = [name for name in columns if name not in standard_names]
        steps = ("loss_scale", "skipped") if job.train.precision == "fp16" else ()
        return cls(steps=dict.fromkeys(steps, "float64"), evaluations=dict.fromkeys(names, "float64"))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> MetricSchema:
        """Return the columns recorded as `columns` when the run was created; none if there is no record.

        Raises
        ------
        StorageError: the record is not valid.
        """
        tree = metadata.get("columns") or {}
        steps, evaluations = tree.get("steps", {}), tree.get("evaluations", {})
        sections = (steps, evaluations)
        if not all(
            isinstance(section, dict) and set(map(str, section.values())) <= _ARROW_TYPES.keys() for section in sections
        ):
            raise StorageError("it contains columns of an unknown type", where="job.yaml", fix="restore it")
        return cls(steps, evaluations)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the `columns` record of a run."""
        return {"steps": dict(self.steps), "evaluations": dict(self.evaluations)}

    def step_schema(self) -> pa.Schema:
        """Return the schema of `metrics/steps`."""
        return pa.schema([*_STEP_COLUMNS, *((name, _ARROW_TYPES[kind]) for name, kind in self.steps.items())])

    def evaluation_schema(self) -> pa.Schema:
        """Return the schema of `metrics/evals`."""
        return pa.schema(
            [*_EVALUATION_COLUMNS, *((name, _ARROW_TYPES[kind]) for name, kind in self.evaluations.items())]
        )


def encode_table(table: pa.Table) -> bytes:
    """Return a Parquet file that any reader supports, at 2 to 5 bytes per row. Deterministic."""
    dictionary = [column.name for column in table.schema if pa.types.is_string(column.type)]
    encodings = {
        column.name: "BYTE_STREAM_SPLIT" if pa.types.is_floating(column.type) else "DELTA_BINARY_PACKED"
        for column in table.schema
        if column.name not in dictionary and not pa.types.is_boolean(column.type)
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


def decode_table(data: bytes, schema: pa.Schema, max_rows: int, where: str) -> pa.Table:
    """Decode a file that `encode_table` wrote. Its metadata is checked before anything is unpacked.

    Parameters
    ----------
    schema: the columns that it must have, in any order.

    Raises
    ------
    StorageError: not a Parquet file, damaged, with other columns or with more rows.
    """
    try:
        if data[:4] != PARQUET_MAGIC:  # pyarrow only checks the end
            raise ValueError("it does not start like a Parquet file")
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        file_schema = file.schema_arrow
        columns, expected = ({column.name: column.type for column in part} for part in (file_schema, schema))
        if columns != expected or len(file_schema) != len(schema):
            raise ValueError("its columns are not those of the run")
        if not 0 <= file.metadata.num_rows <= max_rows:
            raise ValueError(f"{file.metadata.num_rows:,} rows")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        unpacked_bytes = sum(group.total_byte_size for group in groups)
        if unpacked_bytes > MAX_UNPACKED_BYTES + MAX_UNPACKED_BYTES_PER_ROW * file.metadata.num_rows:
            raise ValueError("its rows are too large")
        table: pa.Table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, ValueError, OSError, OverflowError) as error:
        problem = str(error).partition("\n")[0][:200]
        raise StorageError(f"cannot be used: {problem}", where=where, fix="use another checkpoint") from None
    return table.select(schema.names)
