"""Decode the selected columns to arrays: categories in a first pass, then the rows batch by batch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.cache import CacheEntry
from pipeline.data.dataset import SplitColumn
from pipeline.data.sources.tables.columns import FeatureColumn, TableSelection
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.tabular.arrow_types import (
    FloatType,
    InvalidValues,
    arrow_kind,
    bytes_to_array,
    dictionary_encode,
    has_inner_null,
    to_float_array,
    unwrap_storage,
)
from pipeline.data.tabular.encoder import TableEncoder
from pipeline.data.tabular.hashing import bucket_names
from pipeline.data.tabular.schema import Column, Schema
from pipeline.errors import DataError
from pipeline.events import ProgressFn

BATCH_BYTES = 1 << 21
MAX_BATCH_ROWS = 1 << 16
MAX_CATEGORIES = 1_000_000
MAX_COLUMNS_PER_PASS = 128
"""Number of columns that are read together: Arrow allocates 2 to 3 MB for each."""
PROGRESS_INTERVAL_S = 1.0

REMOVE_ROWS_HINT = "remove these rows: missing values of a sample that is one column are not replaced"

Categories = dict[str, tuple[str, ...]]
"""The sorted categories of each text or categorical column."""

INPUTS_FILE = "inputs.npy"


@dataclass(frozen=True, eq=False)
class DecodedTable:
    """The arrays of a table.

    inputs, targets: as in `DatasetPart`.
    split: values of the column that the splits use, (N,).
    categories: the categories of all text columns.
    rounding: the largest rounding error of the inputs in each column of the matrix, float64 (width,).
    """

    inputs: np.ndarray
    targets: np.ndarray
    split: np.ndarray | None
    categories: Categories
    rounding: np.ndarray

    def save(self, folder: Path) -> None:
        """Write all but the inputs."""
        np.save(folder / "targets.npy", self.targets)
        np.save(folder / "rounding.npy", self.rounding)
        if self.split is not None:
            np.save(folder / "split.npy", self.split)
        (folder / "levels.json").write_text(json.dumps(self.categories))

    @classmethod
    def load(cls, entry: CacheEntry) -> DecodedTable:
        """Read a cache entry, with memory-mapped inputs."""
        folder = entry.folder
        categories = json.loads((folder / "levels.json").read_text())
        return cls(
            entry.map_array(INPUTS_FILE),
            np.load(folder / "targets.npy"),
            np.load(folder / "split.npy") if (folder / "split.npy").exists() else None,
            {name: tuple(texts) for name, texts in categories.items()},
            np.load(folder / "rounding.npy"),
        )


def decode_files(
    files: TableFiles, selection: TableSelection, inputs: np.ndarray, on_bytes: Callable[[int], None]
) -> DecodedTable:
    """Decode the rows of all files into `inputs`, and return them with the other arrays.

    Parameters
    ----------
    on_bytes: called with the number of bytes of the inputs that are filled.

    Raises
    ------
    DataError: unusable values, with file, column, row and count.
    """
    categories = _collect_categories(files, selection)
    filler = _ArrayFiller(files, selection, categories, inputs, on_bytes)
    for number in range(len(files.files)):
        filler.fill_file(number)
    pa.default_memory_pool().release_unused()  # Arrow keeps freed memory, which training needs
    return DecodedTable(inputs, filler.targets, filler.split, categories, filler.rounding)


def decode_to_cache(
    folder: Path, files: TableFiles, selection: TableSelection, dtype: FloatType, on_progress: ProgressFn
) -> None:
    """Decode the rows of all files into a cache entry."""
    shape, kind = input_array_layout(selection, files.num_rows, dtype)
    inputs = np.lib.format.open_memmap(folder / INPUTS_FILE, mode="w+", dtype=kind, shape=shape)
    if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, and not a SIGBUS during a later write
        with (folder / INPUTS_FILE).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, (folder / INPUTS_FILE).stat().st_size)
    decoded = decode_files(files, selection, inputs, _throttle_progress(on_progress, inputs.nbytes))
    decoded.save(folder)  # the cache syncs the files to disk


def input_array_layout(
    selection: TableSelection, num_rows: int, dtype: FloatType
) -> tuple[tuple[int, ...], type[np.generic]]:
    """Return the shape and type of the inputs."""
    return (num_rows, *(selection.shape or (selection.width,))), np.uint8 if selection.raw_bytes else dtype


def build_schema(selection: TableSelection, categories: Categories) -> Schema | None:
    """Return the layout of the inputs; None if a sample is one column with a shape."""
    if selection.shape:
        return None
    return Schema(
        tuple(
            Column(
                feature.name,
                feature.kind,
                feature.width,
                _feature_categories(feature, categories),
                feature.buckets,
            )
            for feature in selection.features
        )
    )


def _feature_categories(feature: FeatureColumn, categories: Categories) -> tuple[str, ...]:
    if feature.buckets:
        return bucket_names(feature.buckets)
    return categories[feature.name] if feature.kind == "category" else ()


def build_split_column(selection: TableSelection, decoded: DecodedTable, url: str) -> dict[str, SplitColumn]:
    """Return the column that the splits use, by name; empty if they use none."""
    if selection.split is None or decoded.split is None:
        return {}
    name, arrow_kind = selection.split
    texts = decoded.categories.get(name, ())
    if arrow_kind.kind == "text" and selection.split_is_time:
        return {name: SplitColumn(parse_times(texts, name, url)[decoded.split], is_time=True)}
    names = ("false", "true") if arrow_kind.kind == "truth" else texts
    return {
        name: SplitColumn(decoded.split, names if decoded.split.dtype.kind == "i" else (), arrow_kind.kind == "time")
    }


def _collect_categories(files: TableFiles, selection: TableSelection) -> Categories:
    """Return the texts of categorical features, labels and the split column, in a pass over these columns alone."""
    categorical = {feature.name for feature in selection.features if feature.kind == "category" and not feature.buckets}
    others = [*selection.labels, *([selection.split] if selection.split else [])]
    names = sorted(categorical | {name for name, kind in others if kind.kind == "text"})
    texts: dict[str, set[str]] = {name: set() for name in names}
    for number, file in enumerate(files.files if names else []):
        invalid = InvalidValues(file.where)
        for batch in files.iter_batches(number, names, MAX_BATCH_ROWS):
            for name in names:
                distinct, codes = dictionary_encode(batch.column(name), name, invalid)
                present = np.unique(codes)
                texts[name].update(distinct.take(pa.array(present[present >= 0])).to_pylist())
                if name in categorical and len(texts[name]) > MAX_CATEGORIES:
                    raise DataError(
                        f"the column {name!r} has more than {MAX_CATEGORIES:,} categories in {files.num_rows:,} rows: "
                        "it looks like a key",
                        where=file.where,
                        fix="list it under data.keys, or give it buckets in data.hashed",
                    )
            invalid.num_rows += batch.num_rows
        invalid.raise_if_any()
    return {name: tuple(sorted(values)) for name, values in texts.items()}


class _ArrayFiller:
    """Decodes the rows of files into preallocated arrays."""

    def __init__(
        self,
        files: TableFiles,
        selection: TableSelection,
        categories: Categories,
        inputs: np.ndarray,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._files, self._selection, self._on_bytes = files, selection, on_bytes
        self._inputs = inputs
        schema = build_schema(selection, categories) or _flat_schema(selection)
        self._groups = [
            _ColumnGroup.from_schema(schema, first) for first in range(0, len(schema.columns), MAX_COLUMNS_PER_PASS)
        ]
        self._texts = {name: pa.array(texts, pa.string()) for name, texts in categories.items()}
        self._is_regression = selection.label_as == "numbers"
        self._is_split_numeric = selection.split is not None and selection.split[1].kind == "real"
        labels, rows = len(selection.labels), files.num_rows
        self.targets = np.empty((rows, labels) if labels > 1 else rows, np.float64 if self._is_regression else np.int64)
        self.split = np.empty(rows, np.float64 if self._is_split_numeric else np.int64) if selection.split else None
        self.rounding = np.zeros(selection.width)
        self._num_rows = self._num_bytes = 0

    def fill_file(self, number: int) -> None:
        selection, where = self._selection, self._files.files[number].where
        others = [name for name, _ in (*selection.labels, *([selection.split] if selection.split else []))]
        end = self._num_rows
        for group in self._groups:
            first, invalid = self._num_rows, InvalidValues(where)
            is_first = group is self._groups[0]
            names = dict.fromkeys([*group.names, *(others if is_first else [])])
            row_bytes = max(self._inputs.itemsize * group.width, 1)
            for batch in self._files.iter_batches(number, list(names), _rows_per_batch(row_bytes)):
                end = first + batch.num_rows
                rows = self._inputs[first:end]
                self._fill_inputs(batch, rows.reshape(len(rows), -1)[:, group.columns], group, invalid)
                if is_first:
                    self._fill_others(batch, slice(first, end), invalid)
                first = end
                invalid.num_rows += batch.num_rows
                self._num_bytes += batch.num_rows * row_bytes
                self._on_bytes(self._num_bytes)
            invalid.raise_if_any()
        self._num_rows = end

    def _fill_others(self, batch: pa.RecordBatch, rows: slice, invalid: InvalidValues) -> None:
        selection = self._selection
        for index, (name, _) in enumerate(selection.labels):
            out = self.targets if self.targets.ndim == 1 else self.targets[:, index]
            array, categories = batch.column(name), self._texts.get(name)
            out[rows] = read_label_values(array, name, categories, self._is_regression, invalid)
        if self.split is not None and selection.split is not None:
            name = selection.split[0]
            array, categories = batch.column(name), self._texts.get(name)
            self.split[rows] = read_split_values(array, name, categories, self._is_split_numeric, invalid)

    def _fill_inputs(self, batch: pa.RecordBatch, out: np.ndarray, group: _ColumnGroup, invalid: InvalidValues) -> None:
        """Write the group's columns of a batch to `out`, (rows of the batch, width of the group)."""
        selection = self._selection
        if not selection.shape:
            group.encoder.write(batch, out, invalid, self.rounding[group.columns])
            return
        name = selection.features[0].name
        array = batch.column(name)
        nulls = array.is_null().to_numpy(zero_copy_only=False)
        invalid.add(name, "nulls", REMOVE_ROWS_HINT, nulls)
        if selection.raw_bytes:
            invalid.add(name, "nulls inside its lists", REMOVE_ROWS_HINT, has_inner_null(array, selection.width))
            out[:] = bytes_to_array(array, selection.width)
        else:
            group.encoder.write(batch, out, invalid, self.rounding[group.columns])
            invalid.add(name, "nulls (or NaN) inside its lists", REMOVE_ROWS_HINT, np.isnan(out).any(1) & ~nulls)


@dataclass(frozen=True)
class _ColumnGroup:
    """Columns that are read together, and their columns in the matrix of inputs."""

    names: tuple[str, ...]
    columns: slice
    encoder: TableEncoder

    @classmethod
    def from_schema(cls, schema: Schema, first: int) -> _ColumnGroup:
        columns = schema.columns[first : first + MAX_COLUMNS_PER_PASS]
        begin, part = schema.offsets[first], Schema(columns)
        return cls(tuple(column.name for column in columns), slice(begin, begin + part.width), TableEncoder(part))

    @property
    def width(self) -> int:
        return int(self.columns.stop - self.columns.start)


def _flat_schema(selection: TableSelection) -> Schema:
    return Schema(tuple(Column(feature.name, "number", feature.width) for feature in selection.features))


def _rows_per_batch(row_bytes: int) -> int:
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // row_bytes))


def _throttle_progress(on_progress: ProgressFn, total: int) -> Callable[[int], None]:
    last_report_s = [time.monotonic()]

    def on_bytes(filled: int) -> None:
        if time.monotonic() - last_report_s[0] >= PROGRESS_INTERVAL_S:
            last_report_s[0] = time.monotonic()
            on_progress(f"caching {filled / 1e9:.1f} of {total / 1e9:.1f} GB")

    return on_bytes


def read_label_values(
    array: pa.Array, name: str, categories: pa.Array | None, as_numbers: bool, invalid: InvalidValues
) -> np.ndarray:
    """Return the labels of a batch: int64 (n,), for text indices into `categories`; or float64 (n,) if `as_numbers`."""
    if categories is not None:
        return _category_codes(array, name, categories, invalid)
    if not as_numbers and arrow_kind(array.type).kind != "real":
        return _to_int64(array, name, invalid)
    values = to_float_array(array, np.float64)
    _note_nulls(np.isnan(values), name, invalid)
    invalid.add(name, "infinite values", "remove these rows", np.isinf(values))
    if as_numbers:
        return values
    broken = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) >= 2.0**63)
    fix = "use whole numbers or text, or task: regression"
    invalid.add(name, "labels that are not whole", fix, broken & np.isfinite(values))
    return np.where(broken, 0, values).astype(np.int64)


def read_split_values(
    array: pa.Array, name: str, categories: pa.Array | None, as_numbers: bool, invalid: InvalidValues
) -> np.ndarray:
    """Return the values of the split column: int64 (n,), for text indices into `categories`, for times nanoseconds; or
    float64 (n,) if `as_numbers`."""
    if categories is not None:
        return _category_codes(array, name, categories, invalid)
    if arrow_kind(array.type).kind == "time":
        return _to_nanoseconds(array, name, invalid)
    if not as_numbers:
        return _to_int64(array, name, invalid)
    values = to_float_array(array, np.float64)
    _note_nulls(np.isnan(values), name, invalid)
    return values


def parse_times(texts: tuple[str, ...], name: str, url: str) -> np.ndarray:
    """Parse ISO 8601 dates and times to nanoseconds since 1970, int64 (n,)."""
    array = pa.array(texts, pa.string())
    for zone in (None, "UTC"):
        try:
            times: np.ndarray = array.cast(pa.timestamp("ns", tz=zone)).cast(pa.int64()).to_numpy()
            return times
        except pa.ArrowInvalid as error:
            failure = error
    raise DataError(
        f"the column {name!r} has text that is not a time ({str(failure).splitlines()[0]})",
        where=url,
        fix="write times as 2024-05-31 or 2024-05-31T12:00:00Z, or as timestamps",
    )


def _category_codes(array: pa.Array, name: str, categories: pa.Array, invalid: InvalidValues) -> np.ndarray:
    texts, codes = dictionary_encode(array, name, invalid)
    _note_nulls(codes < 0, name, invalid)
    indices = pc.index_in(texts, value_set=categories).fill_null(0).to_numpy(zero_copy_only=False)
    category_codes: np.ndarray = np.append(indices, 0).astype(np.int64)[codes]
    return category_codes


def _to_int64(array: pa.Array, name: str, invalid: InvalidValues) -> np.ndarray:
    """Convert whole numbers or booleans to int64 (n,)."""
    _note_nulls(array.is_null().to_numpy(zero_copy_only=False), name, invalid)
    array = unwrap_storage(array)
    if array.type == pa.uint64():
        beyond = pc.greater(array, pa.scalar(2**63 - 1, pa.uint64())).fill_null(False)
        invalid.add(name, "numbers beyond int64", "use text", beyond.to_numpy(zero_copy_only=False))
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64)
    whole: np.ndarray = array.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    return whole


def _to_nanoseconds(array: pa.Array, name: str, invalid: InvalidValues) -> np.ndarray:
    """Convert times to nanoseconds since 1970, int64 (n,); times without a zone are UTC."""
    _note_nulls(array.is_null().to_numpy(zero_copy_only=False), name, invalid)
    try:
        stamps = unwrap_storage(array).cast(pa.timestamp("ns", tz=getattr(array.type, "tz", None)))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"the column {name!r} has times before 1677 or after 2262",
            where=invalid.where,
            fix="they are outside the range of nanoseconds: remove these rows, or use a column of numbers",
        ) from error
    times: np.ndarray = stamps.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return times


def _note_nulls(nulls: np.ndarray, name: str, invalid: InvalidValues) -> None:
    invalid.add(name, "nulls (or NaN)", "remove these rows, or fill in the values", nulls)
