"""Splits that a column of the data tells."""

from __future__ import annotations

import numpy as np

from pipeline.data.sources.arrays import Source, SplitColumn
from pipeline.data.split.column import split_column
from pipeline.data.split.rows import NAMES
from pipeline.data.targets.labels import some
from pipeline.errors import DataError
from pipeline.job import ColumnSplits


def told_rows(spec: ColumnSplits, source: Source) -> dict[str, np.ndarray]:
    """The rows whose value means each split; val and test only where there are any.

    Raises
    ------
    DataError: a value that means no split.
    """
    column = split_column(source, spec.column)
    numbers, of_row, counts = np.unique(column.values, return_inverse=True, return_counts=True)
    split_of_value = {value: place for place, name in enumerate(NAMES) for value in getattr(spec, name)}
    texts = [_text(column, number) for number in numbers]
    unknown = [place for place, text in enumerate(texts) if text not in split_of_value]
    if unknown:
        raise DataError(
            f"{some([texts[place] for place in unknown])} in column {spec.column!r} mean no split "
            f"({int(counts[unknown].sum()):,} of {len(of_row):,} rows)",
            where="data.splits.column",
            fix=f"list them under train, val or test; listed are {', '.join(split_of_value)}",
        )
    split = np.array([split_of_value[text] for text in texts], dtype=np.int64)[of_row.reshape(-1)]
    ids = {name: np.flatnonzero(split == place).astype(np.int64) for place, name in enumerate(NAMES)}
    return {name: rows for name, rows in ids.items() if name == "train" or len(rows)}


def _text(column: SplitColumn, number: np.generic) -> str:
    if column.names:
        return column.names[int(number)]
    value = number.item()
    return str(int(value)) if value == int(value) else str(value)
