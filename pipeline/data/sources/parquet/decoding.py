"""The chosen columns as arrays: levels in a first pass, then rows batch by batch into place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.data.cache import Entry
from pipeline.data.sources.arrays import SplitColumn
from pipeline.data.sources.digests import Say
from pipeline.data.sources.parquet.choosing import Choice
from pipeline.data.sources.parquet.files import Files
from pipeline.data.sources.parquet.values import as_times, label_values, split_values
from pipeline.data.tables.contents import FloatType, as_texts, null_inside, raw_bytes
from pipeline.data.tables.encode import Encoder
from pipeline.data.tables.findings import Findings
from pipeline.data.tables.schema import Column, Schema
from pipeline.errors import DataError

BATCH_BYTES = 1 << 21
MOST_BATCH_ROWS = 1 << 16
MOST_LEVELS = 1_000_000
COLUMNS_AT_ONCE = 128
"""Arrow holds 2 to 3 MB for each column that it reads; wide tables are read some columns at a time."""
SAY_EVERY_S = 1.0

NO_SUBSTITUTE = "remove these rows: a sample of one column has no substitute"

Levels = dict[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Decoded:
    """inputs, targets: as in `Arrays`. split: values of the splits' column. levels: of all columns of text, sorted.
    rounding: the largest error of the inputs in each place of a row, float64 (width,)."""

    inputs: np.ndarray
    targets: np.ndarray
    split: np.ndarray | None
    levels: Levels
    rounding: np.ndarray

    def save(self, folder: Path) -> None:
        """What stands beside the inputs."""
        np.save(folder / "targets.npy", self.targets)
        np.save(folder / "rounding.npy", self.rounding)
        if self.split is not None:
            np.save(folder / "split.npy", self.split)
        (folder / "levels.json").write_text(json.dumps(self.levels))

    @classmethod
    def load(cls, entry: Entry) -> Decoded:
        """What an entry of the cache holds, its inputs mapped into memory."""
        folder = entry.folder
        levels = json.loads((folder / "levels.json").read_text())
        return cls(
            entry.map(INPUTS),
            np.load(folder / "targets.npy"),
            np.load(folder / "split.npy") if (folder / "split.npy").exists() else None,
            {name: tuple(texts) for name, texts in levels.items()},
            np.load(folder / "rounding.npy"),
        )


INPUTS = "inputs.npy"


def inputs_layout(choice: Choice, rows: int, dtype: FloatType) -> tuple[tuple[int, ...], type[np.generic]]:
    """Shape and type of the inputs."""
    return (rows, *(choice.shape or (choice.width,))), np.uint8 if choice.raw_bytes else dtype


def decode_to(folder: Path, files: Files, choice: Choice, dtype: FloatType, say: Say) -> None:
    """Fill an entry of the cache."""
    shape, kind = inputs_layout(choice, files.rows, dtype)
    inputs = np.lib.format.open_memmap(folder / INPUTS, mode="w+", dtype=kind, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a SIGBUS at the write that finds it
        with (folder / INPUTS).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, (folder / INPUTS).stat().st_size)
    decode(files, choice, inputs, _progress(say, inputs.nbytes)).save(folder)  # the cache has the disk hold it


def decode(files: Files, choice: Choice, inputs: np.ndarray, done: Callable[[int], None]) -> Decoded:
    """Fill `inputs`, and find the rest.

    done: told how many bytes of the inputs are filled.

    Raises
    ------
    DataError: values that cannot be used, with file, column, row and count.
    """
    levels = _levels(files, choice)
    filler = _Filler(files, choice, levels, inputs, done)
    for number in range(len(files.files)):
        filler.fill(number)
    pa.default_memory_pool().release_unused()  # it keeps what was freed, and training has a use for it
    return Decoded(inputs, filler.targets, filler.split, levels, filler.rounding)


def schema_of(choice: Choice, levels: Levels) -> Schema | None:
    """The layout of the inputs; None where a sample is one column."""
    if choice.shape:
        return None
    return Schema(
        tuple(
            Column(
                feature.name, feature.kind, feature.width, levels[feature.name] if feature.kind == "category" else ()
            )
            for feature in choice.features
        )
    )


def split_column(choice: Choice, decoded: Decoded, url: str) -> dict[str, SplitColumn]:
    """What the splits go by, by name."""
    if choice.split is None or decoded.split is None:
        return {}
    name, arrow_kind = choice.split
    texts = decoded.levels.get(name, ())
    if arrow_kind.kind == "text" and choice.split_is_time:
        return {name: SplitColumn(as_times(texts, name, url)[decoded.split], is_time=True)}
    names = ("false", "true") if arrow_kind.kind == "truth" else texts
    return {name: SplitColumn(decoded.split, names if decoded.split.dtype.kind == "i" else (), arrow_kind.kind == "time")}


def _levels(files: Files, choice: Choice) -> Levels:
    """Texts of the categories, of the labels and of the splits' column, in a pass over these columns alone."""
    categories = {feature.name for feature in choice.features if feature.kind == "category"}
    others = [*choice.labels, *([choice.split] if choice.split else [])]
    names = sorted(categories | {name for name, distinct in others if distinct.kind == "text"})
    texts: dict[str, set[str]] = {name: set() for name in names}
    for number, file in enumerate(files.files if names else []):
        findings = Findings(file.where)
        for batch in files.batches(number, names, MOST_BATCH_ROWS):
            for name in names:
                distinct, rows = as_texts(batch.column(name), name, findings)
                present = np.unique(rows)
                texts[name].update(distinct.take(pa.array(present[present >= 0])).to_pylist())
                if name in categories and len(texts[name]) > MOST_LEVELS:
                    raise DataError(
                        f"the column {name!r} has more than {MOST_LEVELS:,} levels in {files.rows:,} rows: it looks "
                        "like a key",
                        where=file.where,
                        fix="list it under data.keys",
                    )
            findings.rows += batch.num_rows
        findings.refuse()
    return {name: tuple(sorted(distinct)) for name, distinct in texts.items()}


class _Filler:
    """Puts the rows of files where they belong."""

    def __init__(
        self, files: Files, choice: Choice, levels: Levels, inputs: np.ndarray, done: Callable[[int], None]
    ) -> None:
        self._files, self._choice, self._levels, self._done = files, choice, levels, done
        self._inputs = inputs
        schema = schema_of(choice, levels) or _flat(choice)
        self._groups = [_Group.of(schema, first) for first in range(0, len(schema.columns), COLUMNS_AT_ONCE)]
        self._texts = {name: pa.array(texts, pa.string()) for name, texts in levels.items()}
        self._numbers = choice.label_as == "numbers"
        self._split_numbers = choice.split is not None and choice.split[1].kind == "real"
        labels, rows = len(choice.labels), files.rows
        self.targets = np.empty((rows, labels) if labels > 1 else rows, np.float64 if self._numbers else np.int64)
        self.split = np.empty(rows, np.float64 if self._split_numbers else np.int64) if choice.split else None
        self.rounding = np.zeros(choice.width)
        self._rows = self._bytes = 0

    def fill(self, number: int) -> None:
        choice, where = self._choice, self._files.files[number].where
        others = [name for name, _ in (*choice.labels, *([choice.split] if choice.split else []))]
        end = self._rows
        for group in self._groups:
            first, findings = self._rows, Findings(where)
            is_first = group is self._groups[0]
            names = dict.fromkeys([*group.names, *(others if is_first else [])])
            row_bytes = max(self._inputs.itemsize * group.width, 1)
            for batch in self._files.batches(number, list(names), _batch_rows(row_bytes)):
                end = first + batch.num_rows
                rows = self._inputs[first:end]
                self._fill_inputs(batch, rows.reshape(len(rows), -1)[:, group.places], group, findings)
                if is_first:
                    self._fill_others(batch, slice(first, end), findings)
                first = end
                findings.rows += batch.num_rows
                self._bytes += batch.num_rows * row_bytes
                self._done(self._bytes)
            findings.refuse()
        self._rows = end

    def _fill_others(self, batch: pa.RecordBatch, rows: slice, findings: Findings) -> None:
        choice = self._choice
        for place, (name, _) in enumerate(choice.labels):
            out = self.targets if self.targets.ndim == 1 else self.targets[:, place]
            out[rows] = label_values(batch.column(name), name, self._texts.get(name), self._numbers, findings)
        if self.split is not None and choice.split is not None:
            name = choice.split[0]
            array, levels = batch.column(name), self._texts.get(name)
            self.split[rows] = split_values(array, name, levels, self._split_numbers, findings)

    def _fill_inputs(self, batch: pa.RecordBatch, out: np.ndarray, group: _Group, findings: Findings) -> None:
        """out: (rows of the batch, width of the group)."""
        choice = self._choice
        if not choice.shape:
            group.encoder.write(batch, out, findings, self.rounding[group.places])
            return
        name = choice.features[0].name
        array = batch.column(name)
        nulls = array.is_null().to_numpy(zero_copy_only=False)
        findings.note(name, "nulls", NO_SUBSTITUTE, nulls)
        if choice.raw_bytes:
            findings.note(name, "nulls inside its lists", NO_SUBSTITUTE, null_inside(array, choice.width))
            out[:] = raw_bytes(array, choice.width)
        else:
            group.encoder.write(batch, out, findings, self.rounding[group.places])
            findings.note(name, "nulls (or NaN) inside its lists", NO_SUBSTITUTE, np.isnan(out).any(1) & ~nulls)


@dataclass(frozen=True)
class _Group:
    """Columns that are read together, and where they lie in a row of the inputs."""

    names: tuple[str, ...]
    places: slice
    encoder: Encoder

    @classmethod
    def of(cls, schema: Schema, first: int) -> _Group:
        columns = schema.columns[first : first + COLUMNS_AT_ONCE]
        begin, part = schema.offsets[first], Schema(columns)
        return cls(tuple(column.name for column in columns), slice(begin, begin + part.width), Encoder(part))

    @property
    def width(self) -> int:
        return int(self.places.stop - self.places.start)


def _flat(choice: Choice) -> Schema:
    return Schema(tuple(Column(feature.name, "number", feature.width) for feature in choice.features))


def _batch_rows(row_bytes: int) -> int:
    return max(1, min(MOST_BATCH_ROWS, BATCH_BYTES // row_bytes))


def _progress(say: Say, total: int) -> Callable[[int], None]:
    last_report_s = [time.monotonic()]

    def done(filled: int) -> None:
        if time.monotonic() - last_report_s[0] >= SAY_EVERY_S:
            last_report_s[0] = time.monotonic()
            say(f"caching {filled / 1e9:.1f} of {total / 1e9:.1f} GB")

    return done
