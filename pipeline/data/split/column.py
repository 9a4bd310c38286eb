"""The column that splits go by."""

from __future__ import annotations

import numpy as np

from pipeline.data.sources.arrays import Dataset, SplitColumn
from pipeline.errors import DataError

WHERE = "data.splits.column"


def get_split_column(dataset: Dataset, name: str) -> SplitColumn:
    """The column of that name, with a value in every row.

    Raises
    ------
    DataError: the source has no such column, or rows have no value in it.
    """
    if name not in dataset.split_columns:
        raise DataError(
            f"the data has no column {name!r} to split by",
            where=WHERE,
            fix="splits by group, time or column need a table: use data.source: parquet, or split by random or range",
        )
    column = dataset.split_columns[name]
    values = column.values
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    if column.value_names:
        missing = missing | (values < 0)
    if missing.any():
        raise DataError(
            f"{int(missing.sum()):,} of {len(values):,} rows have no value in {name!r}, the first is row "
            f"{int(np.argmax(missing))}",
            where=WHERE,
            fix="fill them in the data, or drop these rows",
        )
    return column
