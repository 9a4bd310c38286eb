"""A user function that returns a table as a data source: its columns are selected and encoded as those of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.config import JobConfig, UserTableDataConfig
from pipeline.data.dataset import Dataset, DatasetPart
from pipeline.data.sources.tables import read_dataset
from pipeline.data.sources.tables.memory import MemoryTables
from pipeline.data.tabular.in_memory import to_labeled_table
from pipeline.errors import DataError

PARTS = ("train", "test")


def open_returned_tables(
    returned: Any, job: JobConfig, where: str, on_progress: Callable[[str], None], *, float64: bool
) -> Dataset:
    """Return the dataset of what a function returned.

    Parameters
    ----------
    returned: a table with the columns of `data.label`, or a pair `(inputs, labels)`, see `to_labeled_table`; or
        `{"train": ..., "test": ...}` of such.
    where: the function, for messages.
    float64: as in `open_dataset`.

    Raises
    ------
    DataError: it is not a table, or has columns or values that cannot be used.
    """
    is_parts = isinstance(returned, Mapping) and "train" in returned and not set(returned) - set(PARTS)
    parts = {name: returned[name] for name in PARTS if name in returned} if is_parts else {"train": returned}
    tables = MemoryTables(
        {
            name: _to_table(part, job, f"{where}, {name}" if len(parts) > 1 else where)
            for name, part in parts.items()
            if part is not None
        },
        where,
    )
    return _open(tables, job, on_progress, float64)


def _open(tables: MemoryTables, job: JobConfig, on_progress: Callable[[str], None], float64: bool) -> Dataset:
    """Read the tables, and divide their rows into the training part and the test set."""

    def reopen(job: JobConfig, float64: bool) -> Dataset:
        return _open(tables, job, on_progress, float64)

    dataset = read_dataset(tables, job, on_progress, float64=float64, reopen=reopen)
    if len(tables.files) == 1:
        return dataset
    rows, both = tables.row_counts[0], dataset.train
    return replace(
        dataset,
        train=DatasetPart(both.inputs[:rows], both.targets[:rows]),
        test=DatasetPart(both.inputs[rows:], both.targets[rows:]),
        split_columns={
            name: replace(column, values=column.values[:rows]) for name, column in dataset.split_columns.items()
        },
    )


def _to_table(returned: Any, job: JobConfig, where: str) -> pa.Table:
    """Convert what the function returned. Whole numbers that its library marks as categories become text."""
    assert isinstance(job.data, UserTableDataConfig), "a job with source: {call: module:function} and a label"
    try:
        converted = to_labeled_table(returned, label=job.data.label)
    except DataError as error:
        error.where = where if error.where == "table" else f"{where}, {error.where}"
        raise
    table = converted.table
    for name in converted.categorical:
        index = table.schema.get_field_index(name)
        if pa.types.is_integer(table.schema.field(index).type):
            table = table.set_column(index, name, table.column(index).cast(pa.string()))
    return table
