"""Columns of a table of pictures: paths, labels, and what splits go by. Read as those of any table are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.data.sources.arrays import SplitColumn
from pipeline.data.sources.parquet.values import parse_times, read_label_values, read_split_values
from pipeline.data.tables.contents import arrow_kind, dictionary_encode, unwrap_storage
from pipeline.data.tables.findings import InvalidValues
from pipeline.errors import DataError


def read_paths(table: pa.Table, name: str, where: str) -> tuple[str, ...]:
    """The paths of the rows.

    Raises
    ------
    DataError: nulls, or no text.
    """
    array, findings = _get_column(table, name, where)
    if arrow_kind(array.type).kind != "text":
        raise DataError(
            f"the column {name!r} holds {arrow_kind(array.type)}, not paths", where=where, fix="see data.path"
        )
    findings.add(name, "nulls", "remove these rows", array.is_null().to_numpy(zero_copy_only=False))
    _raise_if_invalid(findings, len(array))
    return tuple(unwrap_storage(array).to_pylist())


def read_labels(table: pa.Table, name: str, task: str, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Targets of the rows, and the sorted texts that they are positions in: int64 (N,), or float64 (N,) for regression.

    Raises
    ------
    DataError: nulls, NaN or infinity, or a type that the task cannot learn.
    """
    array, findings = _get_column(table, name, where)
    kind, is_regression = arrow_kind(array.type).kind, task == "regression"
    if kind not in ("whole", "real", "truth") and (is_regression or kind != "text"):
        raise DataError(
            f"the label {name!r} holds {arrow_kind(array.type)}, which {task} cannot learn",
            where=where,
            fix="see task" if kind == "text" else "use a column of numbers or text",
        )
    names = _sorted_categories(array, name, findings) if kind == "text" else None
    values = read_label_values(array, name, names, is_regression, findings)
    _raise_if_invalid(findings, len(array))
    return values, () if names is None else tuple(names.to_pylist())


def read_splits(table: pa.Table, name: str, is_time: bool, where: str) -> SplitColumn:
    """What splits go by, one value a row.

    Parameters
    ----------
    is_time: whether text is to be read as times.

    Raises
    ------
    DataError: nulls, or a type that is neither text, number nor time.
    """
    array, findings = _get_column(table, name, where)
    kind = arrow_kind(array.type).kind
    if kind not in ("text", "whole", "real", "truth", "time"):
        raise DataError(f"the column {name!r} holds {arrow_kind(array.type)}", where=where, fix="see data.splits")
    categories = _sorted_categories(array, name, findings) if kind == "text" else None
    values = read_split_values(array, name, categories, kind == "real", findings)
    _raise_if_invalid(findings, len(array))
    texts = () if categories is None else tuple(categories.to_pylist())
    if categories is not None and is_time:
        return SplitColumn(parse_times(texts, name, where)[values], is_time=True)
    return SplitColumn(values, ("false", "true") if kind == "truth" else texts, kind == "time")


def _get_column(table: pa.Table, name: str, where: str) -> tuple[pa.Array, InvalidValues]:
    array = table.column(name).combine_chunks()
    return array, InvalidValues(where)


def _raise_if_invalid(findings: InvalidValues, rows: int) -> None:
    """Raise DataError for what was found; all rows have gone by at once."""
    findings.num_rows = rows
    findings.raise_if_any()


def _sorted_categories(array: pa.Array, name: str, findings: InvalidValues) -> pa.Array:
    """The distinct texts of the rows, sorted."""
    distinct, rows = dictionary_encode(array, name, findings)
    present = np.unique(rows)
    return pa.array(sorted(distinct.take(pa.array(present[present >= 0])).to_pylist()), pa.string())
