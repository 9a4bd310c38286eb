"""Select the columns of a job, and determine their kinds over all files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import CsvDataConfig, JobConfig, TableColumnsConfig, TimeSplitsConfig
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.tabular.arrow_types import NUMERIC_KINDS, ArrowKind, common_kind, value_type
from pipeline.data.tabular.encoder import suggest_columns
from pipeline.data.tabular.schema import ColumnKind
from pipeline.data.tabular.times import feature_width
from pipeline.errors import DataError

PANDAS_INDEX = "__index_level_*__"
"""Columns in which pandas stores the index of a filtered frame. No pattern matches them."""

CAST = "cast it to numbers or text, or list it under data.exclude"


@dataclass(frozen=True)
class FeatureColumn:
    """One feature. width, buckets: as in `Schema`."""

    name: str
    kind: ColumnKind
    width: int
    buckets: int = 0

    @property
    def cache_key(self) -> str:
        buckets = f", buckets={self.buckets!r}" if self.buckets else ""
        return f"Feature(name={self.name!r}, kind={self.kind!r}, width={self.width!r}{buckets})"


@dataclass(frozen=True)
class TableSelection:
    """The columns of the files that a job uses.

    features: the input columns.
    labels: the label columns, each with its kind.
    label_as: whether labels are classes or numbers.
    split: the column that the splits use, with its kind.
    split_is_time: whether the splits are by time.
    shape: shape of a sample, if it is a single column of fixed-size bytes, or of fixed-size lists with `data.shape`;
        else empty, and samples are rows of a matrix.
    raw_bytes: whether such samples are uint8.
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

    @property
    def cache_key(self) -> str:
        """The text in keys of the cache. A change of it makes all entries of earlier versions useless."""
        features = _tuple_text(feature.cache_key for feature in self.features)
        labels = _tuple_text(f"({name!r}, {_kind_text(kind)})" for name, kind in self.labels)
        split = None if self.split is None else f"({self.split[0]!r}, {_kind_text(self.split[1])})"
        return (
            f"Choice(features={features}, labels={labels}, label_as={self.label_as!r}, split={split}, "
            f"split_is_time={self.split_is_time!r}, shape={self.shape!r}, raw_bytes={self.raw_bytes!r})"
        )


def _kind_text(kind: ArrowKind) -> str:
    return f"Content(kind={kind.kind!r}, width={kind.width!r}, type={kind.type!r})"


def _tuple_text(items: Iterable[str]) -> str:
    """Return the `repr` of a tuple of items with these `repr`s."""
    texts = list(items)
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def select_columns(files: TableFiles, job: JobConfig) -> TableSelection:
    """Select the job's columns, and check that every file has them.

    Raises
    ------
    DataError: a column that is absent, has different types in different files or cannot be used; a label among the
        features; a pattern without a match.
    """
    data, columns = job.data, _FileColumns(files)
    assert isinstance(data, TableColumnsConfig), "a job of tables"
    split = data.splits_column
    for name, where in [
        *((label, "data.label") for label in data.labels),
        *((key, "data.keys") for key in data.keys),
        *([(split, "data.splits.column")] if split is not None else []),
    ]:
        columns.require(name, where)
    names = select_feature_names(data, columns.names)
    kinds = {name: columns.merged_kind(name) for name in names}
    categorical = _match_patterns(data.categorical, columns.names, "data.categorical")
    dates = _match_patterns(data.dates, columns.names, "data.dates")
    hashed: dict[str, int] = {}
    for pattern, buckets in data.hashed.items():
        for name in _match_patterns([pattern], columns.names, "data.hashed"):
            hashed.setdefault(name, buckets)
    shape, raw = _sample_shape(data.shape, kinds)
    for name in data.text_columns if isinstance(data, CsvDataConfig) else ():
        columns.require(name, "data.text_columns")
    return TableSelection(
        features=tuple(
            _make_feature(name, kind, files, name in categorical, name in dates, hashed.get(name, 0))
            for name, kind in kinds.items()
        ),
        labels=tuple((name, _check_label(name, columns.merged_kind(name), job, files.url)) for name in data.labels),
        label_as="numbers" if job.task.kind == "regression" else "classes",
        split=None if split is None else (split, columns.merged_kind(split)),
        split_is_time=isinstance(data.splits, TimeSplitsConfig),
        shape=shape,
        raw_bytes=raw,
    )


class _FileColumns:
    """The columns of all files, in the order of the first file that has them."""

    def __init__(self, files: TableFiles) -> None:
        self._files = files
        self._kinds_by_file = [files.column_kinds(number) for number in range(len(files.files))]
        self.names = list(dict.fromkeys(name for kinds in self._kinds_by_file for name in kinds))

    def require(self, name: str, where: str) -> None:
        if name not in self.names:
            raise DataError(
                f"there is no column {name!r} in {self._files.url} ({self._files.num_rows:,} rows)",
                where=where,
                fix=suggest_columns(name, self.names),
            )

    def merged_kind(self, name: str) -> ArrowKind:
        """Return the kind of a column that covers all files."""
        merged: ArrowKind | None = None
        for number, kinds in enumerate(self._kinds_by_file):
            location = f"{self._files.files[number].where} ({self._files.row_counts[number]:,} rows)"
            if name not in kinds:
                raise DataError(
                    f"the column {name!r} is not in this file, but in others",
                    where=location,
                    fix=suggest_columns(name, kinds),
                )
            common = kinds[name] if merged is None else common_kind(merged, kinds[name])
            if common is None:
                raise DataError(
                    f"the column {name!r} has {kinds[name]} here, but {merged} in {self._files.files[0].where}",
                    where=location,
                    fix="write all files with the same column types",
                )
            merged = common
        assert merged is not None, "no files"
        return merged


def merge_column_kinds(files: TableFiles) -> tuple[dict[str, ArrowKind], dict[str, DataError]]:
    """Return the kinds of the columns over all files, in order; and of each column that has none, because it is not in
    every file or has different types, the error that says so."""
    columns, kinds, errors = _FileColumns(files), {}, {}
    for name in columns.names:
        try:
            kinds[name] = columns.merged_kind(name)
        except DataError as error:
            errors[name] = error
    return kinds, errors


def _match_patterns(patterns: Iterable[str], names: list[str], where: str) -> set[str]:
    """Return the names that patterns match. A pattern that equals a name matches only that name."""
    matched: set[str] = set()
    for pattern in patterns:
        matches = {pattern} & set(names) or {
            name for name in names if fnmatchcase(name, pattern) and not fnmatchcase(name, PANDAS_INDEX)
        }
        if not matches:
            raise DataError(f"no column matches {pattern!r}", where=where, fix=suggest_columns(pattern, names))
        matched |= matches
    return matched


def select_feature_names(data: TableColumnsConfig, names: list[str]) -> list[str]:
    """Return the feature columns, in the order of the files. `features: auto` counts as all."""
    is_auto = data.features == "auto"
    patterns = [] if data.features == "auto" else data.features
    for name in patterns:
        if name in data.labels:
            raise DataError(
                f"the label {name!r} is among the features",
                where="data.features",
                fix="remove it: the model would predict the label from itself",
            )
        if name in data.keys or name == data.splits_column:
            role, key = ("a key", "data.keys") if name in data.keys else ("the column of the splits", "data.splits")
            raise DataError(
                f"{name!r} is {role}, and a feature", where="data.features", fix=f"remove it here, or from {key}"
            )
    reserved = {*data.labels, *data.keys, data.splits_column}
    free = [name for name in names if name not in reserved]
    excluded = _match_patterns(data.exclude, free, "data.exclude")
    if named_twice := next((name for name in patterns if name in excluded), None):
        raise DataError(
            f"{named_twice!r} is excluded, and a feature",
            where="data.features",
            fix="remove it here, or from data.exclude",
        )
    all_names = {name for name in free if not fnmatchcase(name, PANDAS_INDEX)}
    chosen = (all_names if is_auto else _match_patterns(patterns, free, "data.features")) - excluded
    if not chosen:
        where, fix = ("data.exclude", "exclude fewer columns") if excluded else ("data", "add columns to predict from")
        raise DataError("no column is left to be a feature", where=where, fix=fix)
    return [name for name in names if name in chosen]


def _make_feature(
    name: str, arrow_kind: ArrowKind, files: TableFiles, is_categorical: bool, is_date: bool, buckets: int
) -> FeatureColumn:
    where = f"{files.files[0].where} ({files.row_counts[0]:,} rows)"
    if arrow_kind.kind == "null":  # a category without values, so that any new data fits; there is a warning of it
        return FeatureColumn(name, "category", 1)
    if arrow_kind.kind == "other":
        raise DataError(f"the column {name!r} has {arrow_kind}", where=where, fix=CAST)
    if is_date and arrow_kind.kind not in ("time", "text"):
        raise DataError(f"{name!r} has {arrow_kind}, not dates", where="data.dates", fix="remove it there")
    if arrow_kind.kind in ("time", "clock") or is_date:
        types = [value_type(files.column_types(number)[name]) for number in range(len(files.files))]
        return FeatureColumn(name, "time", max(feature_width(kind) for kind in types if not pa.types.is_null(kind)))
    if arrow_kind.kind == "text" or (is_categorical and arrow_kind.kind in NUMERIC_KINDS):
        return FeatureColumn(name, "category", 1, buckets)
    if buckets:
        raise DataError(f"{name!r} has {arrow_kind}, not text", where="data.hashed", fix="remove it there")
    if is_categorical:
        raise DataError(f"{name!r} has {arrow_kind}, not categories", where="data.categorical", fix="remove it there")
    return FeatureColumn(name, "number", arrow_kind.width or _find_list_length(name, files))


def _find_list_length(name: str, files: TableFiles) -> int:
    """Return the length of the first list in a column of lists."""
    for number in range(len(files.files)):
        for batch in files.iter_batches(number, [name], 1024):
            lengths = pc.list_value_length(batch.column(name)).drop_null()
            if len(lengths) and lengths[0].as_py() > 0:
                return int(lengths[0].as_py())
            if len(lengths):
                break
    raise DataError(f"the column {name!r} has no list, so that their length is unknown", where=files.url, fix=CAST)


def _sample_shape(shape: list[int] | None, kinds: dict[str, ArrowKind]) -> tuple[tuple[int, ...], bool]:
    """Return the shape of a sample if it is a single column, else (); and whether it is bytes."""
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
            f"the label {name!r} has {arrow_kind}, which {job.task.kind} cannot use",
            where=url,
            fix="use task: multiclass or binary" if arrow_kind.kind == "text" else "use a column of numbers or text",
        )
    if job.task.kind not in ("multilabel", "regression") and len(job.data.labels) > 1:
        raise DataError(
            f"{job.task.kind} takes one label, not {len(job.data.labels)}",
            where="data.label",
            fix="set one column, or use task: regression, or task: multilabel for columns of two values",
        )
    return arrow_kind
