"""Splits that a column of the data tells."""

from __future__ import annotations

import numpy as np

from pipeline.data.sources.arrays import Dataset, SplitColumn
from pipeline.data.split.column import get_split_column
from pipeline.data.split.rows import SPLIT_NAMES
from pipeline.data.targets.labels import sample_repr
from pipeline.errors import DataError
from pipeline.job import ColumnSplitsConfig


def split_by_column(config: ColumnSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """The rows whose value means each split; val and test only where there are any.

    Raises
    ------
    DataError: a value that means no split.
    """
    column = get_split_column(dataset, config.column)
    numbers, of_row, counts = np.unique(column.values, return_inverse=True, return_counts=True)
    split_of_value = {value: place for place, name in enumerate(SPLIT_NAMES) for value in getattr(config, name)}
    texts = [_value_text(column, number) for number in numbers]
    unknown = [place for place, text in enumerate(texts) if text not in split_of_value]
    if unknown:
        raise DataError(
            f"{sample_repr([texts[place] for place in unknown])} in column {config.column!r} mean no split "
            f"({int(counts[unknown].sum()):,} of {len(of_row):,} rows)",
            where="data.splits.column",
            fix=f"list them under train, val or test; listed are {', '.join(split_of_value)}",
        )
    split = np.array([split_of_value[text] for text in texts], dtype=np.int64)[of_row.reshape(-1)]
    ids = {name: np.flatnonzero(split == place).astype(np.int64) for place, name in enumerate(SPLIT_NAMES)}
    return {name: rows for name, rows in ids.items() if name == "train" or len(rows)}


def _value_text(column: SplitColumn, number: np.generic) -> str:
    if column.value_names:
        return column.value_names[int(number)]
    value = number.item()
    return str(int(value)) if value == int(value) else str(value)
