"""Labels and what splits go by, as arrays: every row must have a value.

The chosen columns as arrays: levels in a first pass, then rows batch by batch into place.
"""

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
from pipeline.data.sources.file_digests import ProgressFn
from pipeline.data.sources.parquet.columns import ParquetSelection
from pipeline.data.sources.parquet.reader import ParquetFiles
from pipeline.data.tabular.encoder import TableEncoder
from pipeline.data.tabular.schema import (
    Column,
    FloatType,
    InvalidValues,
    Schema,
    arrow_kind,
    bytes_to_array,
    dictionary_encode,
    has_inner_null,
    to_float_array,
    unwrap_storage,
)
from pipeline.errors import DataError


def read_label_values(
    array: pa.Array, name: str, categories: pa.Array | None, as_numbers: bool, findings: InvalidValues
) -> np.ndarray:
    """Labels of a batch: int64 (n,), positions in `levels` where they are text; or float64 (n,) where `as_numbers`."""
    found = arrow_kind(array.type)
    if categories is not None:
        return _category_codes(array, name, categories, findings)
    if not as_numbers and found.kind != "real":
        return _to_int64(array, name, findings)
    values = to_float_array(array, np.float64)
    _note_nulls(np.isnan(values), name, findings)
    findings.add(name, "infinite values", "remove these rows", np.isinf(values))
    if as_numbers:
        return values
    broken = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) >= 2.0**63)
    fix = "use whole numbers or text, or task: regression"
    findings.add(name, "labels that are not whole", fix, broken & np.isfinite(values))
    return np.where(broken, 0, values).astype(np.int64)


def read_split_values(
    array: pa.Array, name: str, categories: pa.Array | None, as_numbers: bool, findings: InvalidValues
) -> np.ndarray:
    """What a batch is split by: int64 (n,), positions in `levels` where it is text, nanoseconds where it is time; or
    float64 (n,) where `as_numbers`."""
    if categories is not None:
        return _category_codes(array, name, categories, findings)
    if arrow_kind(array.type).kind == "time":
        return _to_nanoseconds(array, name, findings)
    if not as_numbers:
        return _to_int64(array, name, findings)
    values = to_float_array(array, np.float64)
    _note_nulls(np.isnan(values), name, findings)
    return values


def _category_codes(array: pa.Array, name: str, categories: pa.Array, findings: InvalidValues) -> np.ndarray:
    texts, rows = dictionary_encode(array, name, findings)
    _note_nulls(rows < 0, name, findings)
    known = pc.index_in(texts, value_set=categories).fill_null(0).to_numpy(zero_copy_only=False)
    positions: np.ndarray = np.append(known, 0).astype(np.int64)[rows]
    return positions


def _to_int64(array: pa.Array, name: str, findings: InvalidValues) -> np.ndarray:
    """Whole numbers or booleans as int64 (n,)."""
    _note_nulls(array.is_null().to_numpy(zero_copy_only=False), name, findings)
    array = unwrap_storage(array)
    if array.type == pa.uint64():
        beyond = pc.greater(array, pa.scalar(2**63 - 1, pa.uint64())).fill_null(False)
        findings.add(name, "numbers beyond int64", "use text", beyond.to_numpy(zero_copy_only=False))
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64)
    whole: np.ndarray = array.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    return whole


def _to_nanoseconds(array: pa.Array, name: str, findings: InvalidValues) -> np.ndarray:
    """Nanoseconds since 1970, int64 (n,); times without a zone are taken as UTC."""
    _note_nulls(array.is_null().to_numpy(zero_copy_only=False), name, findings)
    try:
        stamps = unwrap_storage(array).cast(pa.timestamp("ns", tz=getattr(array.type, "tz", None)))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"the column {name!r} has times before 1677 or after 2262",
            where=findings.where,
            fix="nanoseconds do not reach so far: remove these rows, or use a number",
        ) from error
    times: np.ndarray = stamps.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return times


def parse_times(texts: tuple[str, ...], name: str, url: str) -> np.ndarray:
    """ISO 8601 dates and times as nanoseconds since 1970, int64 (n,)."""
    array = pa.array(texts, pa.string())
    for zone in (None, "UTC"):
        try:
            times: np.ndarray = array.cast(pa.timestamp("ns", tz=zone)).cast(pa.int64()).to_numpy()
            return times
        except pa.ArrowInvalid as error:
            failure = error
    raise DataError(
        f"the column {name!r} is text that is no time ({str(failure).splitlines()[0]})",
        where=url,
        fix="write times as 2024-05-31 or 2024-05-31T12:00:00Z, or as timestamps",
    )


def _note_nulls(nulls: np.ndarray, name: str, findings: InvalidValues) -> None:
    findings.add(name, "nulls (or NaN)", "remove these rows, or fill them in", nulls)


BATCH_BYTES = 1 << 21
MAX_BATCH_ROWS = 1 << 16
MAX_CATEGORIES = 1_000_000
MAX_COLUMNS_PER_PASS = 128
"""Arrow holds 2 to 3 MB for each column that it reads; wide tables are read some columns at a time."""
PROGRESS_INTERVAL_S = 1.0

REMOVE_ROWS_HINT = "remove these rows: a sample of one column has no substitute"

Categories = dict[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class DecodedTable:
    """inputs, targets: as in `Arrays`. split: values of the splits' column. levels: of all columns of text, sorted.
    rounding: the largest error of the inputs in each place of a row, float64 (width,)."""

    inputs: np.ndarray
    targets: np.ndarray
    split: np.ndarray | None
    categories: Categories
    rounding: np.ndarray

    def save(self, folder: Path) -> None:
        """What stands beside the inputs."""
        np.save(folder / "targets.npy", self.targets)
        np.save(folder / "rounding.npy", self.rounding)
        if self.split is not None:
            np.save(folder / "split.npy", self.split)
        (folder / "levels.json").write_text(json.dumps(self.categories))

    @classmethod
    def load(cls, entry: CacheEntry) -> DecodedTable:
        """What an entry of the cache holds, its inputs mapped into memory."""
        folder = entry.folder
        levels = json.loads((folder / "levels.json").read_text())
        return cls(
            entry.map_array(INPUTS_FILE),
            np.load(folder / "targets.npy"),
            np.load(folder / "split.npy") if (folder / "split.npy").exists() else None,
            {name: tuple(texts) for name, texts in levels.items()},
            np.load(folder / "rounding.npy"),
        )


INPUTS_FILE = "inputs.npy"


def input_array_layout(
    selection: ParquetSelection, rows: int, dtype: FloatType
) -> tuple[tuple[int, ...], type[np.generic]]:
    """Shape and type of the inputs."""
    return (rows, *(selection.shape or (selection.width,))), np.uint8 if selection.raw_bytes else dtype


def decode_to_cache(
    folder: Path, files: ParquetFiles, selection: ParquetSelection, dtype: FloatType, on_progress: ProgressFn
) -> None:
    """Fill an entry of the cache."""
    shape, kind = input_array_layout(selection, files.num_rows, dtype)
    inputs = np.lib.format.open_memmap(folder / INPUTS_FILE, mode="w+", dtype=kind, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a SIGBUS at the write that finds it
        with (folder / INPUTS_FILE).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, (folder / INPUTS_FILE).stat().st_size)
    decode_files(files, selection, inputs, _throttle_progress(on_progress, inputs.nbytes)).save(
        folder
    )  # the cache has the disk hold it


def decode_files(
    files: ParquetFiles, selection: ParquetSelection, inputs: np.ndarray, on_bytes: Callable[[int], None]
) -> DecodedTable:
    """Fill `inputs`, and find the rest.

    done: told how many bytes of the inputs are filled.

    Raises
    ------
    DataError: values that cannot be used, with file, column, row and count.
    """
    levels = _collect_categories(files, selection)
    filler = _ArrayFiller(files, selection, levels, inputs, on_bytes)
    for number in range(len(files.files)):
        filler.fill_file(number)
    pa.default_memory_pool().release_unused()  # it keeps what was freed, and training has a use for it
    return DecodedTable(inputs, filler.targets, filler.split, levels, filler.rounding)


def build_schema(selection: ParquetSelection, categories: Categories) -> Schema | None:
    """The layout of the inputs; None where a sample is one column."""
    if selection.shape:
        return None
    return Schema(
        tuple(
            Column(
                feature.name,
                feature.kind,
                feature.width,
                categories[feature.name] if feature.kind == "category" else (),
            )
            for feature in selection.features
        )
    )


def build_split_column(selection: ParquetSelection, decoded: DecodedTable, url: str) -> dict[str, SplitColumn]:
    """What the splits go by, by name."""
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


def _collect_categories(files: ParquetFiles, selection: ParquetSelection) -> Categories:
    """Texts of the categories, of the labels and of the splits' column, in a pass over these columns alone."""
    categories = {feature.name for feature in selection.features if feature.kind == "category"}
    others = [*selection.labels, *([selection.split] if selection.split else [])]
    names = sorted(categories | {name for name, distinct in others if distinct.kind == "text"})
    texts: dict[str, set[str]] = {name: set() for name in names}
    for number, file in enumerate(files.files if names else []):
        findings = InvalidValues(file.where)
        for batch in files.iter_batches(number, names, MAX_BATCH_ROWS):
            for name in names:
                distinct, rows = dictionary_encode(batch.column(name), name, findings)
                present = np.unique(rows)
                texts[name].update(distinct.take(pa.array(present[present >= 0])).to_pylist())
                if name in categories and len(texts[name]) > MAX_CATEGORIES:
                    raise DataError(
                        f"the column {name!r} has more than {MAX_CATEGORIES:,} levels in {files.num_rows:,} rows: "
                        "it looks "
                        "like a key",
                        where=file.where,
                        fix="list it under data.keys",
                    )
            findings.num_rows += batch.num_rows
        findings.raise_if_any()
    return {name: tuple(sorted(distinct)) for name, distinct in texts.items()}


class _ArrayFiller:
    """Puts the rows of files where they belong."""

    def __init__(
        self,
        files: ParquetFiles,
        choice: ParquetSelection,
        levels: Categories,
        inputs: np.ndarray,
        done: Callable[[int], None],
    ) -> None:
        self._files, self._selection, self._categories, self._on_bytes = files, choice, levels, done
        self._inputs = inputs
        schema = build_schema(choice, levels) or _flat_schema(choice)
        self._groups = [
            _ColumnGroup.from_schema(schema, first) for first in range(0, len(schema.columns), MAX_COLUMNS_PER_PASS)
        ]
        self._texts = {name: pa.array(texts, pa.string()) for name, texts in levels.items()}
        self._is_regression = choice.label_as == "numbers"
        self._is_split_numeric = choice.split is not None and choice.split[1].kind == "real"
        labels, rows = len(choice.labels), files.num_rows
        self.targets = np.empty((rows, labels) if labels > 1 else rows, np.float64 if self._is_regression else np.int64)
        self.split = np.empty(rows, np.float64 if self._is_split_numeric else np.int64) if choice.split else None
        self.rounding = np.zeros(choice.width)
        self._num_rows = self._num_bytes = 0

    def fill_file(self, number: int) -> None:
        choice, where = self._selection, self._files.files[number].where
        others = [name for name, _ in (*choice.labels, *([choice.split] if choice.split else []))]
        end = self._num_rows
        for group in self._groups:
            first, findings = self._num_rows, InvalidValues(where)
            is_first = group is self._groups[0]
            names = dict.fromkeys([*group.names, *(others if is_first else [])])
            row_bytes = max(self._inputs.itemsize * group.width, 1)
            for batch in self._files.iter_batches(number, list(names), _rows_per_batch(row_bytes)):
                end = first + batch.num_rows
                rows = self._inputs[first:end]
                self._fill_inputs(batch, rows.reshape(len(rows), -1)[:, group.columns], group, findings)
                if is_first:
                    self._fill_others(batch, slice(first, end), findings)
                first = end
                findings.num_rows += batch.num_rows
                self._num_bytes += batch.num_rows * row_bytes
                self._on_bytes(self._num_bytes)
            findings.raise_if_any()
        self._num_rows = end

    def _fill_others(self, batch: pa.RecordBatch, rows: slice, findings: InvalidValues) -> None:
        choice = self._selection
        for place, (name, _) in enumerate(choice.labels):
            out = self.targets if self.targets.ndim == 1 else self.targets[:, place]
            out[rows] = read_label_values(
                batch.column(name), name, self._texts.get(name), self._is_regression, findings
            )
        if self.split is not None and choice.split is not None:
            name = choice.split[0]
            array, levels = batch.column(name), self._texts.get(name)
            self.split[rows] = read_split_values(array, name, levels, self._is_split_numeric, findings)

    def _fill_inputs(
        self, batch: pa.RecordBatch, out: np.ndarray, group: _ColumnGroup, findings: InvalidValues
    ) -> None:
        """out: (rows of the batch, width of the group)."""
        choice = self._selection
        if not choice.shape:
            group.encoder.write(batch, out, findings, self.rounding[group.columns])
            return
        name = choice.features[0].name
        array = batch.column(name)
        nulls = array.is_null().to_numpy(zero_copy_only=False)
        findings.add(name, "nulls", REMOVE_ROWS_HINT, nulls)
        if choice.raw_bytes:
            findings.add(name, "nulls inside its lists", REMOVE_ROWS_HINT, has_inner_null(array, choice.width))
            out[:] = bytes_to_array(array, choice.width)
        else:
            group.encoder.write(batch, out, findings, self.rounding[group.columns])
            findings.add(name, "nulls (or NaN) inside its lists", REMOVE_ROWS_HINT, np.isnan(out).any(1) & ~nulls)


@dataclass(frozen=True)
class _ColumnGroup:
    """Columns that are read together, and where they lie in a row of the inputs."""

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


def _flat_schema(choice: ParquetSelection) -> Schema:
    return Schema(tuple(Column(feature.name, "number", feature.width) for feature in choice.features))


def _rows_per_batch(row_bytes: int) -> int:
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // row_bytes))


def _throttle_progress(on_progress: ProgressFn, total: int) -> Callable[[int], None]:
    last_report_s = [time.monotonic()]

    def done(filled: int) -> None:
        if time.monotonic() - last_report_s[0] >= PROGRESS_INTERVAL_S:
            last_report_s[0] = time.monotonic()
            on_progress(f"caching {filled / 1e9:.1f} of {total / 1e9:.1f} GB")

    return done
