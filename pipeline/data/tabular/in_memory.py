"""Tables in memory: data frames, Arrow tables and arrays become an Arrow table with named labels."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.tabular.arrow_types import NUMERIC_KINDS, arrow_kind
from pipeline.data.tabular.encoder import suggest_columns, to_arrow_table
from pipeline.errors import DataError

WHERE = "table"
TARGET_NAME = "y"
"""Name of the label column if labels are given apart from the inputs and have no name."""

ARRAY_COLUMN_PREFIX = "x"
"""The columns of an array (N, F) are called x0, x1, ..."""

ONE_TYPE = "use one type per column; text and numbers mixed: convert with astype(str)"


@dataclass(frozen=True)
class InMemoryTable:
    """A table to train on.

    table: columns with unique names and without dictionaries; never an index of pandas.
    labels: names of the label columns.
    categorical: numeric columns that the caller's library marks as categorical.
    notes: what was left out of the caller's data, for the user.
    """

    table: pa.Table
    labels: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_table(data: Any) -> bool:
    """Return whether the data has named columns: a data frame, an Arrow table or record batch, or anything else with
    Arrow's C stream interface that is not a single column. Dicts and lists are not recognized, since they may be
    something else."""
    if _is_pandas(data, "DataFrame") or isinstance(data, pa.Table | pa.RecordBatch):
        return True
    return hasattr(data, "__arrow_c_stream__") and hasattr(data, "columns")


def to_labeled_table(data: Any, target: Any = None, label: str | Sequence[str] | None = None) -> InMemoryTable:
    """Convert inputs and labels to one table.

    Parameters
    ----------
    data: a data frame of pandas or polars, an Arrow table, a dict of columns, a list of dicts (one per row), or an
        array (N, F), whose columns are called x0, x1, ...; a pair `(data, target)` if `target` is None.
    target: labels (N,) or (N, T): a sequence, an array, or a column of a data frame; None if they are in `data`.
    label: the label columns of `data`; with `target`, the names that its columns get. By default those are the name of
        a named column, else `y`, or `y0`, `y1`, ...

    Raises
    ------
    DataError: anything else; no or unknown labels; columns without a usable name, of mixed types, sparse, or of unequal
        length.
    """
    if target is None and isinstance(data, tuple) and len(data) == 2:
        data, target = data
    columns, notes = _to_columns(data)
    names = [label] if isinstance(label, str | int) else None if label is None else list(label)
    labels = None if names is None else [_column_name(name, "label") for name in names]
    if target is None:
        labels = _find_labels(labels, columns)
    else:
        target_columns = _to_target_columns(target, labels, columns)
        labels = list(target_columns)
        lengths = {len(column) for column in target_columns.values()}
        num_rows = len(next(iter(columns.values()))) if columns else 0
        if lengths != {num_rows}:
            raise DataError(
                f"{num_rows:,} rows of inputs, but {max(lengths):,} labels", where=WHERE, fix="give one label per row"
            )
        columns |= target_columns
    categorical = [
        name
        for name, column in columns.items()
        if name not in labels and _is_dictionary(column) and arrow_kind(column.type).kind in NUMERIC_KINDS
    ]
    table = pa.table({name: _plain_column(column) for name, column in columns.items()})
    if not table.num_rows:
        raise DataError("has no rows", where=WHERE, fix="give at least one row")
    if not set(columns) - set(labels):
        raise DataError("has no columns but the labels", where=WHERE, fix="give at least one column of inputs")
    return InMemoryTable(table, tuple(labels), tuple(categorical), tuple(notes))


def to_input_table(data: Any, names: Sequence[str] | None = None) -> pa.Table:
    """Convert inputs without labels to a table.

    Parameters
    ----------
    data: as in `to_labeled_table`.
    names: the names that the columns get, by position; by default their own.

    Raises
    ------
    DataError: as `to_labeled_table`.
    """
    columns, _ = _to_columns(data)
    return pa.table(list(columns.values()), list(columns) if names is None else list(names))


def _to_columns(data: Any) -> tuple[dict[str, pa.ChunkedArray | pa.Array], list[str]]:
    """Return the columns by name, and notes for the user."""
    if _is_scipy_sparse(data):
        raise DataError("a sparse matrix cannot be used", where=WHERE, fix="convert it with .toarray()")
    if _is_pandas(data, "DataFrame"):
        return _pandas_columns(data), _index_notes(data)
    if is_table(data) or isinstance(data, Mapping) or _is_list_of_rows(data):
        if isinstance(data, Mapping):
            data = dict(zip(_column_names(data), data.values(), strict=True))
        table = to_arrow_table(data)
        return dict(zip(_column_names(table.column_names), table.columns, strict=True)), []
    if type(data).__name__ == "LazyFrame":
        raise DataError("a LazyFrame has no rows yet", where=WHERE, fix="give data.collect()")
    if hasattr(data, "__array__") or isinstance(data, list | tuple):
        return _array_columns(_to_array(data)), []
    raise DataError(
        f"a {type(data).__name__} is not a table",
        where=WHERE,
        fix="give a DataFrame of pandas or polars, an Arrow table, a dict of columns, or an array (N, F)",
    )


def _pandas_columns(frame: Any) -> dict[str, pa.ChunkedArray | pa.Array]:
    if getattr(frame.columns, "nlevels", 1) > 1:
        raise DataError(
            f"its columns have {frame.columns.nlevels} levels (a MultiIndex)",
            where=WHERE,
            fix='join them to one: df.columns = ["_".join(map(str, names)) for names in df.columns]',
        )
    names = _column_names(frame.columns)
    return {name: _to_arrow(frame.iloc[:, number], name) for number, name in enumerate(names)}


def _index_notes(frame: Any) -> list[str]:
    """Return a note if the index holds a column of its own, which `set_index` made of it."""
    names = [str(name) for name in frame.index.names if name is not None]
    if not names:
        return []
    return [f"the index ({', '.join(names)}) is not an input of the model; df.reset_index() makes it a column"]


def _array_columns(array: np.ndarray) -> dict[str, pa.ChunkedArray | pa.Array]:
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(
            f"the inputs have the shape {array.shape}, not (N, F)",
            where=WHERE,
            fix="give one row per sample; for images and the like, write a function: source: {call: module:function}",
        )
    if array.dtype.names is not None or array.dtype.kind not in "biufOUSmM":
        raise DataError(f"the inputs have the type {array.dtype}", where=WHERE, fix="give numbers or text")
    names = [f"{ARRAY_COLUMN_PREFIX}{number}" for number in range(array.shape[1])]
    return {name: _to_arrow(np.ascontiguousarray(array[:, number]), name) for number, name in enumerate(names)}


def _to_target_columns(
    target: Any, labels: list[str] | None, inputs: Mapping[str, Any]
) -> dict[str, pa.ChunkedArray | pa.Array]:
    """Return the columns of labels that are given apart from the inputs, under names that no input has."""
    if is_table(target):
        columns, _ = _to_columns(target)
        given = list(columns)
        arrays = list(columns.values())
    elif _is_column(target):
        name = getattr(target, "name", None)
        given = [_column_name(name, "name of the labels")] if name not in (None, "") else []
        arrays = [_to_arrow(target, "labels")]
    else:
        array = _to_array(target)
        if array.ndim not in (1, 2) or 0 in array.shape[1:]:
            raise DataError(f"the labels have the shape {array.shape}", where=WHERE, fix="give (N,), or (N, T) numbers")
        given = []
        arrays = [_to_arrow(np.ascontiguousarray(column), "labels") for column in np.atleast_2d(array.T)]
    if labels is None:
        defaults = [TARGET_NAME] if len(arrays) == 1 else [f"{TARGET_NAME}{number}" for number in range(len(arrays))]
        names = [unused_name(name, inputs) for name in (given or defaults)]
    else:
        names = labels
    if len(names) != len(arrays) or len(set(names)) < len(names):
        raise DataError(f"{len(arrays)} columns of labels, but label={names}", where=WHERE, fix="give a name for each")
    if clash := next((name for name in names if name in inputs), None):
        raise DataError(
            f"the inputs have a column {clash!r} too", where=f"label={clash!r}", fix="give the labels another name"
        )
    return dict(zip(names, arrays, strict=True))


def _find_labels(labels: list[str] | None, columns: Mapping[str, Any]) -> list[str]:
    if not labels:
        raise DataError(
            "the column to predict is not named",
            where="label",
            fix=f'give label="NAME", or the labels apart: train(X, y); {suggest_columns("", columns)}',
        )
    for name in labels:
        if name not in columns:
            raise DataError(f"there is no column {name!r}", where="label", fix=suggest_columns(name, columns))
    return labels


def _column_names(names: Iterable[Any]) -> list[str]:
    """Return names of columns as text.

    Raises
    ------
    DataError: a name is neither text nor a whole number, or two are equal.
    """
    texts = [_column_name(name, "column name") for name in names]
    if len(set(texts)) < len(texts):
        duplicate = next(text for text in texts if texts.count(text) > 1)
        raise DataError(f"two columns are called {duplicate!r}", where=WHERE, fix="rename one of them")
    return texts


def _column_name(name: Any, what: str) -> str:
    if isinstance(name, str):
        return str(name)
    if isinstance(name, int | np.integer) and not isinstance(name, bool):
        return str(int(name))
    raise DataError(f"the {what} {name!r} is not text", where=WHERE, fix="rename the column: df.rename(columns=...)")


def unused_name(name: str, inputs: Container[str]) -> str:
    """Return a name that no input has: `name`, or with underscores added."""
    while name in inputs:
        name += "_"
    return name


def _to_arrow(values: Any, name: str) -> pa.ChunkedArray | pa.Array:
    """Convert one column: a Series of pandas or polars, an Arrow array, or a NumPy array (n,)."""
    where = f"{WHERE}, column {name!r}" if name != "labels" else f"{WHERE}, labels"
    type_name = str(getattr(values, "dtype", ""))
    if type_name.startswith("Sparse"):
        raise DataError("is sparse", where=where, fix="convert it with df.sparse.to_dense()")
    if type_name.startswith("period"):
        raise DataError(f"holds periods ({type_name})", where=where, fix="convert it with .dt.to_timestamp()")
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        if type(values).__module__.startswith("polars"):
            return pa.chunked_array(values)
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        first_line = str(error.args[0] if error.args else error).strip().splitlines()[0]
        raise DataError(f"cannot be read as one type: {first_line}", where=where, fix=ONE_TYPE) from error


def _plain_column(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return a column whose content does not depend on the library that made it: dictionaries are decoded, and views
    and 16-bit floats are converted to the usual types."""
    if _is_dictionary(column):
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        decoded = [_plain_column(chunk.dictionary).take(chunk.indices) for chunk in chunks]
        column = pa.chunked_array(decoded, None if decoded else column.type.value_type)
    kind = column.type
    if pa.types.is_string_view(kind):
        return column.cast(pa.large_string())
    if pa.types.is_binary_view(kind):
        return column.cast(pa.large_binary())
    return column.cast(pa.float32()) if pa.types.is_float16(kind) else column


def _is_dictionary(column: pa.ChunkedArray | pa.Array) -> bool:
    return bool(pa.types.is_dictionary(column.type))


def _to_array(data: Any) -> np.ndarray:
    """Return a NumPy array, of objects if values are of several types."""
    if hasattr(data, "detach"):  # a tensor
        data = data.detach().cpu()
    if not isinstance(data, list | tuple):
        return np.asarray(data)
    try:
        array = np.asarray(data)
        # NumPy converts numbers beside text to text
        is_mixed = array.dtype.kind in "US" and not all(isinstance(value, str) for value in _flatten(data))
        return np.asarray(data, object) if is_mixed else array
    except ValueError as error:
        raise DataError(f"cannot be read as an array: {error}", where=WHERE, fix="give rows of equal length") from error


def _flatten(data: Any) -> Iterable[Any]:
    for value in data:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        else:
            yield value


def _is_list_of_rows(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and all(isinstance(row, Mapping) for row in data)


def _is_column(data: Any) -> bool:
    """Return whether the data is one column of a data frame, or an Arrow array."""
    is_polars = type(data).__module__.startswith("polars") and type(data).__name__ == "Series"
    return is_polars or _is_pandas(data, "Series") or isinstance(data, pa.Array | pa.ChunkedArray)


def _is_pandas(data: Any, class_name: str) -> bool:
    pandas = sys.modules.get("pandas")  # imported already if the data is of it
    return pandas is not None and isinstance(data, getattr(pandas, class_name))


def _is_scipy_sparse(data: Any) -> bool:
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and bool(sparse.issparse(data))
