"""How a job reads each column of its table: type, missing values, distinct values, range, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from pipeline.config import JobConfig, MlpConfig, TableDataConfig
from pipeline.data.auto_features import leave_out_columns
from pipeline.data.dataset import Dataset
from pipeline.data.leakage import leakage_warnings
from pipeline.data.multilabel import fit_multilabel_transform
from pipeline.data.sources import open_dataset
from pipeline.data.sources.tables.profile import profile_table
from pipeline.data.splits import make_splits
from pipeline.data.statistics import iter_blocks
from pipeline.data.tabular.hashing import bucket_of
from pipeline.data.tabular.profile import ColumnProfile
from pipeline.data.tabular.schema import Column
from pipeline.data.tabular.times import CLOCK_WIDTH, DATE_WIDTH, TIMESTAMP_WIDTH
from pipeline.data.targets import fit_target_transform, label_warnings
from pipeline.events import ProgressFn
from pipeline.redaction import resolve_env

MAX_LISTED_COLUMNS = 30
MAX_LISTED_VALUES = 5
MAX_LISTED_CLASSES = 10
MAX_CELL = 40
"""Characters of a column's name, and of its range."""

TIME_PARTS = {
    DATE_WIDTH: "days and positions in year and week",
    TIMESTAMP_WIDTH: "days and positions in year, week and day",
    CLOCK_WIDTH: "position in the day",
}

NOT_LISTED = "not in data.features"


@dataclass(frozen=True)
class ColumnUse:
    """One column of a table.

    role: feature, label, key, split (the column of the splits) or unused.
    use: what becomes of it, or why it is not used.
    profile: what it holds; None if not all files have it, with the same type.
    """

    name: str
    role: str
    use: str
    profile: ColumnProfile | None

    def to_json(self) -> dict[str, Any]:
        profile = self.profile
        facts: dict[str, Any] = {}
        if profile is not None:
            facts = {
                "type": profile.kind.type,
                "rows": profile.num_rows,
                "nulls": profile.num_nulls,
                "distinct": None if _has_no_levels(profile) else profile.num_distinct,
                "more_distinct": profile.has_more_distinct,
                "low": profile.low,
                "high": profile.high,
            }
            if self.role == "label":
                facts["counts"] = [[value, count] for value, count in profile.counts]
        return {"name": self.name, **facts, "role": self.role, "use": self.use}

    def to_cells(self) -> tuple[str, ...]:
        """Return the cells of a row of the table."""
        profile = self.profile
        if profile is None:
            return (_shorten(self.name), "", "", "", "", self.use)
        more = "+" if profile.has_more_distinct else ""
        return (
            _shorten(self.name),
            _shorten(profile.kind.type),
            f"{profile.num_nulls:,}",
            "" if _has_no_levels(profile) else f"{profile.num_distinct:,}{more}",
            _shorten(_format_range(profile)),
            self.use,
        )


HEADINGS = ("column", "type", "nulls", "distinct", "range", "use")


def format_column_table(columns: Sequence[ColumnUse]) -> list[str]:
    """Return the lines of a table of the first columns."""
    rows = [HEADINGS, *(column.to_cells() for column in columns[:MAX_LISTED_COLUMNS])]
    widths = [max(len(row[index]) for row in rows) for index in range(len(HEADINGS) - 1)]
    numeric = {HEADINGS.index("nulls"), HEADINGS.index("distinct")}
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in numeric else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    left = len(columns) - MAX_LISTED_COLUMNS
    return [*lines, f"and {left:,} more columns: see --json"] if left > 0 else lines


def describe_columns(job: JobConfig, on_progress: ProgressFn = lambda text: None) -> tuple[list[ColumnUse], list[str]]:
    """Return how a job on a table reads each column, in the order of the table, and the warnings that training would
    give. torch is not imported.

    The table is read as for training: twice, or once and from the cache.

    Raises
    ------
    DataError: what training would raise.
    """
    data = job.data
    assert isinstance(data, TableDataConfig), "a job on a table"
    resolved = data.model_copy(update={"url": resolve_env(data.url, "data.url")})
    profiles = profile_table(resolved, on_progress=on_progress)
    dataset = open_dataset(job, on_progress)
    splits = make_splits(job, dataset)
    fit_targets = fit_multilabel_transform if job.task.kind == "multilabel" else fit_target_transform
    targets = fit_targets(job, dataset, splits)
    train_indices = splits["train"].indices
    dataset = leave_out_columns(job, dataset, train_indices)
    warnings = [*dataset.warnings, *leakage_warnings(job, dataset, train_indices), *label_warnings(targets)]
    features = dict(_describe_features(job, dataset, train_indices))
    uses = []
    for name in [*profiles, *(name for name in dataset.left_out if name not in profiles)]:
        profile = profiles.get(name)
        if name in data.labels:
            role, use = "label", _describe_label(job, profile)
        elif name in data.keys:
            role, use = "key", "key: copied to predictions"
        elif name == data.splits_column:
            role, use = "split", f"splits by {data.splits.by}"
        elif name in features:
            role, use = "feature", features[name]
        elif name in dataset.left_out:
            role, use = "unused", f"left out: {dataset.left_out[name]}"
        elif any(fnmatchcase(name, pattern) for pattern in data.exclude):
            role, use = "unused", "excluded by data.exclude"
        elif dataset.schema is None and _is_listed(data, name):
            role, use = "feature", f"the sample, of shape {list(dataset.train.inputs.shape[1:])}"
        else:
            role, use = "unused", NOT_LISTED
        uses.append(ColumnUse(name, role, use, profile))
    return uses, warnings


def _describe_features(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield the name of each column of the inputs, and what it becomes."""
    if dataset.schema is None:
        return
    assert isinstance(job.data, TableDataConfig), "a job on a table"
    num_codes = _count_codes(job, dataset, indices)
    for column in dataset.schema.columns:
        if column.kind == "category":
            use = _describe_categories(job, num_codes[column.name])
            yield column.name, f"hashed to {column.buckets:,} buckets, {use}" if column.buckets else use
            continue
        use = _describe_number(job)
        parts = f", {TIME_PARTS[column.width]}" if column.kind == "time" else ""
        yield column.name, f"{column.width:,} numbers{parts}, each {use}" if column.width > 1 else use


def _describe_number(job: JobConfig) -> str:
    data = job.data
    assert isinstance(data, TableDataConfig), "a job on a table"
    normalize = data.normalize if isinstance(data.normalize, str) else "fixed"
    scale = {"auto": "standard scale", "none": "unscaled"}.get(normalize, f"{normalize} scale")
    missing = data.missing.numeric
    fill = f"missing: {missing}" if isinstance(missing, str) else f"missing: {missing:g}"
    embedding = getattr(job.model, "numeric_embedding", "none")
    if embedding == "piecewise":
        return f"piecewise-linear bins, {fill}"
    return ", ".join([scale, fill, *([f"{embedding} embedding"] if embedding != "none" else [])])


def _describe_categories(job: JobConfig, num_codes: int) -> str:
    assert isinstance(job.data, TableDataConfig), "a job on a table"
    if num_codes <= job.data.one_hot_up_to:
        return f"one-hot: {num_codes:,}"
    if isinstance(job.model, MlpConfig):  # code 0 stands for categories that no training row has
        return f"embedded: {num_codes:,} -> {job.model.embedding_dim(num_codes + 1)}"
    return f"code: 1 to {num_codes:,}"


def _count_codes(job: JobConfig, dataset: Dataset, indices: np.ndarray) -> dict[str, int]:
    """Return the number of codes of each categorical column: the categories of the training rows, and one for missing
    values if they are a category."""
    assert isinstance(job.data, TableDataConfig), "a job on a table"
    assert dataset.schema is not None, "a table"
    pairs = zip(dataset.schema.columns, dataset.schema.offsets, strict=True)
    columns: list[tuple[Column, int]] = [(column, offset) for column, offset in pairs if column.kind == "category"]
    present = {column.name: np.zeros(len(column.categories) + 1, bool) for column, _ in columns}
    for block in iter_blocks(dataset.train.inputs, indices) if columns else ():
        for column, offset in columns:
            codes = block[:, offset]
            present[column.name][np.where(np.isnan(codes), len(column.categories), codes).astype(np.int64)] = True
    replacement = job.data.missing.categorical
    counts = {}
    for column, _ in columns:
        *known, has_missing = present[column.name].tolist()
        category = str(bucket_of(replacement, column.buckets)) if column.buckets else replacement
        is_known = category in column.categories and known[column.categories.index(category)]
        counts[column.name] = sum(known) + (has_missing and replacement != "fail" and not is_known)
    return counts


def _describe_label(job: JobConfig, profile: ColumnProfile | None) -> str:
    if job.task.kind == "regression" or profile is None or not profile.counts:
        return "label"
    counts = [f"{_format_value(value)} {count:,}" for value, count in profile.counts[:MAX_LISTED_CLASSES]]
    left = len(profile.counts) - MAX_LISTED_CLASSES
    return f"label: {', '.join(counts)}{f' and {left:,} more' if left > 0 else ''}"


def _is_listed(data: TableDataConfig, name: str) -> bool:
    return data.features == "auto" or any(fnmatchcase(name, pattern) for pattern in data.features)


def _has_no_levels(profile: ColumnProfile) -> bool:
    return profile.kind.kind not in ("text", "whole", "real", "truth")


def _format_range(profile: ColumnProfile) -> str:
    if profile.length is not None:
        low, high = profile.length
        return f"{low:,} elements" if low == high else f"{low:,} to {high:,} elements"
    if profile.kind.kind == "text":
        return ", ".join(_format_value(value) for value, _ in profile.counts[:MAX_LISTED_VALUES])
    if profile.low is None or profile.high is None:
        return ""
    return f"{_format_value(profile.low, is_text=True)} to {_format_value(profile.high, is_text=True)}"


def _format_value(value: Any, *, is_text: bool = False) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if is_text else repr(value)
    return f"{value:g}"


def _shorten(text: str) -> str:
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."
