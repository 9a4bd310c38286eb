"""Which columns are learned from, and what they hold in all files together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import pyarrow.compute as pc

from pipeline.config import JobConfig, ParquetDataConfig, TimeSplitsConfig
from pipeline.data.sources.parquet.reader import ParquetFiles
from pipeline.data.tabular.encoder import suggest_columns
from pipeline.data.tabular.schema import NUMERIC_KINDS, ArrowKind, ColumnKind, common_kind
from pipeline.errors import DataError

PANDAS_INDEX = "__index_level_*__"
"""How pandas stores the numbers of rows that were left over by a filter; no pattern means them."""

CAST = "cast it to numbers or text, or leave it out: list the others under data.features"


@dataclass(frozen=True)
class FeatureColumn:
    """One column to learn from. width: as in `Schema`."""

    name: str
    kind: ColumnKind
    width: int


@dataclass(frozen=True)
class ParquetSelection:
    """What of the files is used, and as what.

    shape: of a sample, where it is a single fixed-size column with `data.shape`, or bytes; else empty, and samples
        are rows of a matrix.
    raw_bytes: whether such samples are uint8.
    split: the column that the splits go by, and whether as time.
    """

    features: tuple[FeatureColumn, ...]
    labels: tuple[tuple[str, ArrowKind], ...]
    label_as: Literal["classes", "numbers"]
    split: tuple[str, ArrowKind] | None
    split_is_time: bool
    shape: tuple[int, ...] = ()
    raw_bytes: bool = False

    @property
    def width(self) -> int:
        return sum(feature.width for feature in self.features)


def select_columns(files: ParquetFiles, job: JobConfig) -> ParquetSelection:
    """The job's columns, found in every file.

    Raises
    ------
    DataError: a column that is absent, changes its type between files or cannot be learned from; a label among the
        features; a pattern without a match.
    """
    data, columns = job.data, _FileColumns(files)
    assert isinstance(data, ParquetDataConfig), "a job with source: parquet"
    split = data.splits_column
    for name, where in [
        *((label, "data.label") for label in data.labels),
        *((key, "data.keys") for key in data.keys),
        *([(split, "data.splits.column")] if split is not None else []),
    ]:
        columns.require(name, where)
    names = _select_feature_names(data, columns.names, split)
    kinds = {name: columns.merged_kind(name) for name in names}
    levels = _match_patterns(data.categorical, columns.names, "data.categorical")
    shape, raw = _sample_shape(data.shape, kinds)
    return ParquetSelection(
        features=tuple(_make_feature(name, found, name in levels, files) for name, found in kinds.items()),
        labels=tuple((name, _check_label(name, columns.merged_kind(name), job, files.url)) for name in data.labels),
        label_as="numbers" if job.task.kind == "regression" else "classes",
        split=None if split is None else (split, columns.merged_kind(split)),
        split_is_time=isinstance(data.splits, TimeSplitsConfig),
        shape=shape,
        raw_bytes=raw,
    )


class _FileColumns:
    """The columns of all files, in the order of the first file that has them."""

    def __init__(self, files: ParquetFiles) -> None:
        self._files = files
        self._by_file = [files.column_kinds(number) for number in range(len(files.files))]
        self.names = list(dict.fromkeys(name for contents in self._by_file for name in contents))

    def require(self, name: str, where: str) -> None:
        if name not in self.names:
            raise DataError(
                f"there is no column {name!r} in {self._files.url} ({self._files.num_rows:,} rows)",
                where=where,
                fix=suggest_columns(name, self.names),
            )

    def merged_kind(self, name: str) -> ArrowKind:
        """What a column holds in all files together."""
        merged: ArrowKind | None = None
        for number, contents in enumerate(self._by_file):
            location = f"{self._files.files[number].where} ({self._files.row_counts[number]:,} rows)"
            if name not in contents:
                raise DataError(
                    f"the column {name!r} is not in this file, but in others",
                    where=location,
                    fix=suggest_columns(name, contents),
                )
            united = contents[name] if merged is None else common_kind(merged, contents[name])
            if united is None:
                raise DataError(
                    f"the column {name!r} holds {contents[name]} here, but {merged} in {self._files.files[0].where}",
                    where=location,
                    fix="write all files with one type for each column",
                )
            merged = united
        assert merged is not None, "no files"
        return merged


def _match_patterns(patterns: Iterable[str], names: list[str], where: str) -> set[str]:
    """The names that patterns mean; a name means itself, whatever characters it has."""
    matched: set[str] = set()
    for pattern in patterns:
        matches = {pattern} & set(names) or {
            name for name in names if fnmatchcase(name, pattern) and not fnmatchcase(name, PANDAS_INDEX)
        }
        if not matches:
            raise DataError(f"no column is called {pattern!r}", where=where, fix=suggest_columns(pattern, names))
        matched |= matches
    return matched


def _select_feature_names(data: ParquetDataConfig, names: list[str], split: str | None) -> list[str]:
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
        chosen |= _match_patterns([pattern], free, "data.features")
    return [name for name in names if name in chosen]


def _make_feature(name: str, arrow_kind: ArrowKind, is_categorical: bool, files: ParquetFiles) -> FeatureColumn:
    where = f"{files.files[0].where} ({files.row_counts[0]:,} rows)"
    if arrow_kind.kind == "null":  # text of which no file has any: it takes whatever new data holds, and is warned of
        return FeatureColumn(name, "category", 1)
    if arrow_kind.kind in ("time", "other"):
        raise DataError(f"the column {name!r} holds {arrow_kind}", where=where, fix=CAST)
    if arrow_kind.kind == "text" or (is_categorical and arrow_kind.kind in NUMERIC_KINDS):
        return FeatureColumn(name, "category", 1)
    if is_categorical:
        raise DataError(f"{name!r} holds {arrow_kind}, not levels", where="data.categorical", fix="leave it out there")
    return FeatureColumn(name, "number", arrow_kind.width or _find_list_length(name, files))


def _find_list_length(name: str, files: ParquetFiles) -> int:
    """Length of the first list in a column of lists."""
    for number in range(len(files.files)):
        for batch in files.iter_batches(number, [name], 1024):
            lengths = pc.list_value_length(batch.column(name)).drop_null()
            if len(lengths) and lengths[0].as_py() > 0:
                return int(lengths[0].as_py())
            if len(lengths):
                break
    raise DataError(f"the column {name!r} has no list to take a length from", where=files.url, fix=CAST)


def _sample_shape(shape: list[int] | None, kinds: dict[str, ArrowKind]) -> tuple[tuple[int, ...], bool]:
    """Shape of a sample that is one column, else (); and whether it is bytes."""
    only = next(iter(kinds.values())) if len(kinds) == 1 else None
    raw = only is not None and only.kind == "bytes"
    if shape is None:
        return ((only.width,) if raw and only is not None else ()), raw
    if only is None or only.kind not in ("bytes", "vector"):
        raise DataError(
            "a shape needs a single feature, of fixed-size lists or bytes",
            where="data.shape",
            fix=f"features here: {', '.join(kinds)}",
        )
    return tuple(shape), raw


def _check_label(name: str, arrow_kind: ArrowKind, job: JobConfig, url: str) -> ArrowKind:
    is_regression = job.task.kind == "regression"
    if arrow_kind.kind not in ("whole", "real", "truth") and (is_regression or arrow_kind.kind != "text"):
        raise DataError(
            f"the label {name!r} holds {arrow_kind}, which {job.task.kind} cannot learn",
            where=url,
            fix="use task: multiclass or binary" if arrow_kind.kind == "text" else "use a column of numbers or text",
        )
    if not is_regression and len(job.data.labels) > 1:
        raise DataError(
            f"{job.task.kind} learns one label, not {len(job.data.labels)}",
            where="data.label",
            fix="name one column, or use task: regression",
        )
    return arrow_kind
