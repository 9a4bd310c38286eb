"""Which columns are learned from, and what they hold in all files together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import pyarrow.compute as pc

from pipeline.data.sources.parquet.files import Files
from pipeline.data.tables.contents import NUMBERS, Content, both
from pipeline.data.tables.encode import near
from pipeline.data.tables.schema import Kind
from pipeline.errors import DataError
from pipeline.job import Job, ParquetDataConfig, TimeSplits

PANDAS_INDEX = "__index_level_*__"
"""How pandas stores the numbers of rows that were left over by a filter; no pattern means them."""

CAST = "cast it to numbers or text, or leave it out: list the others under data.features"


@dataclass(frozen=True)
class Feature:
    """One column to learn from. width: as in `Schema`."""

    name: str
    kind: Kind
    width: int


@dataclass(frozen=True)
class Choice:
    """What of the files is used, and as what.

    shape: of a sample, where it is a single fixed-size column with `data.shape`, or bytes; else empty, and samples
        are rows of a matrix.
    raw_bytes: whether such samples are uint8.
    split: the column that the splits go by, and whether as time.
    """

    features: tuple[Feature, ...]
    labels: tuple[tuple[str, Content], ...]
    label_as: Literal["classes", "numbers"]
    split: tuple[str, Content] | None
    split_is_time: bool
    shape: tuple[int, ...] = ()
    raw_bytes: bool = False

    @property
    def width(self) -> int:
        return sum(feature.width for feature in self.features)


def choose(files: Files, job: Job) -> Choice:
    """The job's columns, found in every file.

    Raises
    ------
    DataError: a column that is absent, changes its type between files or cannot be learned from; a label among the
        features; a pattern without a match.
    """
    data, columns = job.data, _Columns(files)
    assert isinstance(data, ParquetDataConfig), "a job with source: parquet"
    split = data.splits_column
    for name, where in [
        *((label, "data.label") for label in data.labels),
        *((key, "data.keys") for key in data.keys),
        *([(split, "data.splits.column")] if split is not None else []),
    ]:
        columns.must_have(name, where)
    names = _feature_names(data, columns.names, split)
    kinds = {name: columns.content(name) for name in names}
    levels = _matched(data.categorical, columns.names, "data.categorical")
    shape, raw = _shape(data.shape, kinds)
    return Choice(
        features=tuple(_feature(name, found, name in levels, files) for name, found in kinds.items()),
        labels=tuple((name, _label(name, columns.content(name), job, files.url)) for name in data.labels),
        label_as="numbers" if job.task.kind == "regression" else "classes",
        split=None if split is None else (split, columns.content(split)),
        split_is_time=isinstance(data.splits, TimeSplits),
        shape=shape,
        raw_bytes=raw,
    )


class _Columns:
    """The columns of all files, in the order of the first file that has them."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._by_file = [files.contents(number) for number in range(len(files.files))]
        self.names = list(dict.fromkeys(name for contents in self._by_file for name in contents))

    def must_have(self, name: str, where: str) -> None:
        if name not in self.names:
            raise DataError(
                f"there is no column {name!r} in {self._files.url} ({self._files.rows:,} rows)",
                where=where,
                fix=near(name, self.names),
            )

    def content(self, name: str) -> Content:
        """What a column holds in all files together."""
        merged: Content | None = None
        for number, contents in enumerate(self._by_file):
            location = f"{self._files.files[number].where} ({self._files.row_counts[number]:,} rows)"
            if name not in contents:
                raise DataError(
                    f"the column {name!r} is not in this file, but in others", where=location, fix=near(name, contents)
                )
            united = contents[name] if merged is None else both(merged, contents[name])
            if united is None:
                raise DataError(
                    f"the column {name!r} holds {contents[name]} here, but {merged} in {self._files.files[0].where}",
                    where=location,
                    fix="write all files with one type for each column",
                )
            merged = united
        assert merged is not None, "no files"
        return merged


def _matched(patterns: Iterable[str], names: list[str], where: str) -> set[str]:
    """The names that patterns mean; a name means itself, whatever characters it has."""
    matched: set[str] = set()
    for pattern in patterns:
        matches = {pattern} & set(names) or {
            name for name in names if fnmatchcase(name, pattern) and not fnmatchcase(name, PANDAS_INDEX)
        }
        if not matches:
            raise DataError(f"no column is called {pattern!r}", where=where, fix=near(pattern, names))
        matched |= matches
    return matched


def _feature_names(data: ParquetDataConfig, names: list[str], split: str | None) -> list[str]:
    """Columns to learn from, in the files' order."""
    for name in data.features:
        if name in data.labels:
            raise DataError(
                f"the label {name!r} is among the features: it would be learned from itself",
                where="data.features",
                fix="leave it out",
            )
        if name in data.keys or name == split:
            role = "a key" if name in data.keys else "what the splits go by"
            raise DataError(
                f"{name!r} is {role}, and a feature", where="data.features", fix="leave it out here, or there"
            )
    reserved = {*data.labels, *data.keys, split}
    chosen: set[str] = set()
    for pattern in data.features:
        free = [name for name in names if name not in reserved]
        chosen |= _matched([pattern], free, "data.features")
    return [name for name in names if name in chosen]


def _feature(name: str, found: Content, is_levels: bool, files: Files) -> Feature:
    where = f"{files.files[0].where} ({files.row_counts[0]:,} rows)"
    if found.kind == "null":  # text of which no file has any: it takes whatever new data holds, and is warned of
        return Feature(name, "category", 1)
    if found.kind in ("time", "other"):
        raise DataError(f"the column {name!r} holds {found}", where=where, fix=CAST)
    if found.kind == "text" or (is_levels and found.kind in NUMBERS):
        return Feature(name, "category", 1)
    if is_levels:
        raise DataError(f"{name!r} holds {found}, not levels", where="data.categorical", fix="leave it out there")
    return Feature(name, "number", found.width or _length(name, files))


def _length(name: str, files: Files) -> int:
    """Length of the first list in a column of lists."""
    for number in range(len(files.files)):
        for batch in files.batches(number, [name], 1024):
            lengths = pc.list_value_length(batch.column(name)).drop_null()
            if len(lengths) and lengths[0].as_py() > 0:
                return int(lengths[0].as_py())
            if len(lengths):
                break
    raise DataError(f"the column {name!r} has no list to take a length from", where=files.url, fix=CAST)


def _shape(shape: list[int] | None, holds: dict[str, Content]) -> tuple[tuple[int, ...], bool]:
    """Shape of a sample that is one column, else (); and whether it is bytes."""
    only = next(iter(holds.values())) if len(holds) == 1 else None
    raw = only is not None and only.kind == "bytes"
    if shape is None:
        return ((only.width,) if raw and only is not None else ()), raw
    if only is None or only.kind not in ("bytes", "vector"):
        raise DataError(
            "a shape needs a single feature, of fixed-size lists or bytes",
            where="data.shape",
            fix=f"features here: {', '.join(holds)}",
        )
    return tuple(shape), raw


def _label(name: str, found: Content, job: Job, url: str) -> Content:
    is_regression = job.task.kind == "regression"
    if found.kind not in ("whole", "real", "truth") and (is_regression or found.kind != "text"):
        raise DataError(
            f"the label {name!r} holds {found}, which {job.task.kind} cannot learn",
            where=url,
            fix="use task: multiclass or binary" if found.kind == "text" else "use a column of numbers or text",
        )
    if not is_regression and len(job.data.labels) > 1:
        raise DataError(
            f"{job.task.kind} learns one label, not {len(job.data.labels)}",
            where="data.label",
            fix="name one column, or use task: regression",
        )
    return found
