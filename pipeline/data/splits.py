"""Splits: which samples train, validate and test.

`make_splits` calls the function that the job's `data.splits` asks for. The result depends only on the job and on the
content of the data.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.config import (
    SPLIT_NAMES,
    ColumnSplitsConfig,
    GroupSplitsConfig,
    JobConfig,
    RandomSplitsConfig,
    RangeSplitsConfig,
    TimeSplitsConfig,
)
from pipeline.data.dataset import Dataset, SplitColumn, SplitIndices
from pipeline.data.labels import sample_repr, stratification_labels
from pipeline.data.rng import make_generator, random_permutation, random_uint64
from pipeline.errors import DataError

WHERE = "data.splits.column"

NANOSECONDS = {"s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9, "w": 7 * 86_400 * 10**9}


def make_splits(job: JobConfig, dataset: Dataset) -> dict[str, SplitIndices]:
    """Return the job's splits: "train", and "val" and "test" if they exist. No two share a row.

    The source's test set is the test split, unless the job takes one from the training part.

    Raises
    ------
    DataError: counts, ranges or windows exceed the rows; ranges overlap; a column is missing or has a value that
        belongs to no split; or a split is empty.
    """
    indices_by_split = _make_split_indices(job, dataset)
    for name, indices in indices_by_split.items():
        if len(indices) == 0:
            raise DataError(
                f"no rows are left for it out of {len(dataset.train):,}",
                where=f"data.splits.{name}",
                fix="ask for a larger share here, or smaller ones elsewhere",
            )
    check_disjoint(indices_by_split, len(dataset.train))
    splits = {name: SplitIndices("train", indices_by_split[name]) for name in SPLIT_NAMES if name in indices_by_split}
    if "test" not in splits and dataset.test is not None:
        splits["test"] = SplitIndices("test", np.arange(len(dataset.test), dtype=np.int64))
    return splits


def _make_split_indices(job: JobConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the indices of each requested split, int64, ascending; a split may be empty."""
    config = job.data.splits
    if isinstance(config, RandomSplitsConfig):
        return random_split(job, config, dataset)
    if isinstance(config, RangeSplitsConfig):
        return split_by_range(config, len(dataset.train))
    if isinstance(config, GroupSplitsConfig):
        return split_by_group(job, config, dataset)
    if isinstance(config, TimeSplitsConfig):
        return split_by_time(config, dataset)
    return split_by_column(config, dataset)


def check_disjoint(indices_by_split: dict[str, np.ndarray], num_rows: int) -> None:
    """Raise DataError if a row is in two splits."""
    taken = np.zeros(num_rows, bool)
    for name, indices in indices_by_split.items():
        twice = indices[taken[indices]]
        if len(twice):
            raise DataError(
                f"row {twice[0]} and {len(twice) - 1:,} more are in another split too", where=f"data.splits.{name}"
            )
        taken[indices] = True


def split_warnings(job: JobConfig, splits: dict[str, SplitIndices]) -> list[str]:
    """Return warnings about splits that are allowed, but probably not intended."""
    rows, batch_size = len(splits["train"]), job.train.batch_size
    if isinstance(batch_size, int) and rows < batch_size:
        return [
            f"train.batch_size is {batch_size:,}, but the training split has only {rows:,} rows: every step takes all "
            "of them (batch_size: all has the same effect)"
        ]
    return []


def random_split(job: JobConfig, config: RandomSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Draw rows without replacement, val first, so that a test split added later does not change val."""
    num_rows = len(dataset.train)
    sizes = {"val": config.val, "test": config.test, "train": config.train}
    counts = {
        name: int(value) if value >= 1 else round(num_rows * value)
        for name, value in sizes.items()
        if value is not None
    }
    held_out = counts["val"] + counts["test"]
    counts.setdefault("train", max(num_rows - held_out, 0))
    if sum(counts.values()) > num_rows or (config.train is None and held_out >= num_rows):
        requested = ", ".join(f"{name}: {value:g} ({counts[name]:,} rows)" for name, value in sizes.items() if value)
        raise DataError(
            f"{requested} leave {'no rows to train' if config.train is None else 'too few'} of {num_rows:,}",
            where="data.splits",
            fix="ask for less",
        )
    rng = make_generator(job.seed.for_stream("split"), f"split of {dataset.fingerprint}")
    order = random_permutation(rng, num_rows)
    groups = _group_by_class(order, dataset, job) if config.stratify else [order]
    indices_by_split: dict[str, np.ndarray] = {}
    for name, count in counts.items():
        if name != "train" and not sizes[name]:
            continue
        group_sizes = [len(group) for group in groups]
        takes = allocate_proportionally(group_sizes, count)
        if name != "train" and config.stratify and not dataset.classes:
            takes = leave_one_each(takes, group_sizes)
        taken = [group[:take] for group, take in zip(groups, takes, strict=True)]
        indices_by_split[name] = np.sort(np.concatenate(taken))
        groups = [group[take:] for group, take in zip(groups, takes, strict=True)]
    return indices_by_split


def _group_by_class(order: np.ndarray, dataset: Dataset, job: JobConfig) -> list[np.ndarray]:
    """Return the permutation `order`, separated into one array per class."""
    if job.task.kind in ("multilabel", "regression"):
        what = f"needs a class per row, but {job.task.kind} has none"
        raise DataError(what, where="data.splits.stratify", fix="leave it out")
    labels = stratification_labels(dataset, job.task)[order]
    return [order[labels == label] for label in np.unique(labels)]


def allocate_proportionally(sizes: list[int], count: int) -> list[int]:
    """Divide `count` in proportion to `sizes`: integers, none above its size, each within one of the exact quotient.

    What rounding down leaves over goes to the largest remainders; of equal ones, to the first.
    """
    total = sum(sizes)
    quotients = [divmod(count * size, total) if total else (0, 0) for size in sizes]
    takes = [quotient for quotient, _ in quotients]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -quotients[index][1])
    for index in by_remainder[: count - sum(takes)]:
        takes[index] += 1
    return takes


def leave_one_each(takes: list[int], sizes: list[int]) -> list[int]:
    """Return the same total, taken so that one of each group is left: what is too much of a group is taken of those
    that have most left, one by one. If there are too few for that, return `takes`.

    A class that only occurs outside the training rows could not be evaluated. (Classes that a source declares are
    known without a row.)
    """
    left = [size - take for take, size in zip(takes, sizes, strict=True)]
    missing = [index for index, count in enumerate(left) if count == 0 and sizes[index] > 0]
    if not missing or sum(count - 1 for count in left if count > 1) < len(missing):
        return takes
    for index in missing:
        giver = max(range(len(left)), key=lambda other: left[other])
        left[index] += 1
        left[giver] -= 1
    return [size - count for count, size in zip(left, sizes, strict=True)]


def split_by_range(config: RangeSplitsConfig, num_rows: int) -> dict[str, np.ndarray]:
    """Return the ranges of the job. Raise DataError if they end beyond the rows or overlap."""
    given = {name: bounds for name in SPLIT_NAMES if (bounds := getattr(config, name)) is not None}
    for name, (first, end) in given.items():
        if end > num_rows:
            raise DataError(
                f"[{first}, {end}] ends beyond the {num_rows:,} rows",
                where=f"data.splits.{name}",
                fix=f"end at {num_rows} or before",
            )
    ordered = sorted(given, key=lambda name: given[name])
    for name, other in pairwise(ordered):
        if given[name][1] > given[other][0]:
            raise DataError(
                f"{name} {list(given[name])} and {other} {list(given[other])} share rows",
                where="data.splits",
                fix="a range excludes its end: begin one where the other ends",
            )
    return {name: np.arange(first, end, dtype=np.int64) for name, (first, end) in given.items()}


def split_by_group(job: JobConfig, config: GroupSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Draw whole groups in a random order, for val first, so that a test split added later does not change val.

    A number of 1 or more is a count of groups. A fraction goes through the groups that are left, in order, and takes
    each one that brings the number of rows closer to it; the result is within half of the smallest group skipped.

    Raises
    ------
    DataError: more groups are requested than exist, or none is left to train.
    """
    column = get_split_column(dataset, config.column)
    _, group, sizes = np.unique(column.values, return_inverse=True, return_counts=True)
    order = random_permutation(
        make_generator(job.seed.for_stream("split"), f"groups of {dataset.fingerprint}"), len(sizes)
    )
    split_of_group = np.full(len(sizes), -1)
    for number, size in enumerate((config.val, config.test)):
        left = order[split_of_group[order] < 0]
        taken = left[: int(size)] if size >= 1 else left[_select_nearest_groups(sizes[left], round(len(group) * size))]
        if size and len(taken) in (0, len(left)):
            name = ("val", "test")[number]
            raise DataError(
                f"{name}: {size:g} takes {len(taken):,} of {len(left):,} groups of {config.column!r}, "
                f"the largest has {sizes[left].max() if len(left) else 0:,} of {len(group):,} rows",
                where=f"data.splits.{name}",
                fix="use a fraction that whole groups can make up, and leave some to train",
            )
        split_of_group[taken] = number
    split_of_row = split_of_group[group.reshape(-1)]
    requested = [("train", -1)] + [(name, n) for n, name in enumerate(("val", "test")) if getattr(config, name)]
    return {name: np.flatnonzero(split_of_row == number).astype(np.int64) for name, number in requested}


def _select_nearest_groups(sizes: np.ndarray, target_size: int) -> np.ndarray:
    """Return which groups to take, bool (G,): each one that brings the sum of sizes closer to `target_size`."""
    takes = np.zeros(len(sizes), bool)
    for index, size in enumerate(sizes.tolist()):
        if size < 2 * target_size:
            takes[index] = True
            target_size -= size
    return takes


def split_by_time(config: TimeSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Hold out the newest rows. Test's window ends at the newest instant, val's where test's window begins.

    A window with a length contains the instants from its end back to, but excluding, its end minus the length: 14d of
    daily data are 14 days. A window given as a fraction begins at the instant that brings its rows closest to the
    fraction; of two, at the later one. Rows of one instant stay together.

    Raises
    ------
    DataError: a length does not fit the column, or the windows leave nothing to train.
    """
    column = get_split_column(dataset, config.column)
    values = column.values
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    # Where a window may begin in that order: at the first row of an instant, or after the last row.
    begins = np.append(np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])), len(ordered))
    indices_by_split: dict[str, np.ndarray] = {}
    end, limit = len(ordered), ordered[-1]
    for name, window in (("test", config.test), ("val", config.val)):
        if window == 0:
            continue
        length = _window_length(name, window, column)
        if length is not None:
            limit = limit - length
            first = int(np.searchsorted(ordered, limit, side="right"))
        else:
            target_row = end - round(len(ordered) * float(window))
            possible_starts = begins[begins <= end]
            first = int(
                possible_starts[len(possible_starts) - 1 - np.argmin(np.abs(possible_starts[::-1] - target_row))]
            )
            limit = ordered[first - 1]
        if first == 0 or first >= end:
            raise DataError(
                f"{name}: {window} takes {'nothing' if first >= end else 'all'} of the {end:,} rows"
                f"{' before the test split' if end < len(ordered) else ''}",
                where=f"data.splits.{name}",
                fix=f"ask for {'more' if first >= end else 'less'}; {_format_span(config.column, column)}",
            )
        indices_by_split[name] = np.sort(order[first:end])
        end = first
    return {"train": np.sort(order[:end]), **indices_by_split}


def _window_length(name: str, window: float | str, column: SplitColumn) -> float | int | None:
    """Return a window's length in the column's unit; None for a fraction."""
    if not isinstance(window, str) and window < 1:
        return None
    if isinstance(window, str) == column.is_time and not column.value_names:
        return window if not isinstance(window, str) else round(float(window[:-1]) * NANOSECONDS[window[-1]])
    kind = "text" if column.value_names else "a timestamp" if column.is_time else "a number"
    fix = {
        "text": "convert it to a timestamp or a number",
        "a timestamp": "use a fraction below 1, or a length with its unit, such as 14d",
        "a number": "use a fraction below 1, or a plain number in the column's unit",
    }
    raise DataError(f"{name}: {window} is not a length of {kind}", where=f"data.splits.{name}", fix=fix[kind])


def _format_span(name: str, column: SplitColumn) -> str:
    oldest, newest = column.values.min(), column.values.max()
    if column.is_time:
        oldest, newest = (np.datetime64(int(value), "ns").astype("datetime64[s]") for value in (oldest, newest))
    return f"{name} goes from {oldest} to {newest}"


def split_by_column(config: ColumnSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Assign each row to the split that its value in the column belongs to; val and test only if they have rows.

    Raises
    ------
    DataError: a value belongs to no split.
    """
    column = get_split_column(dataset, config.column)
    values, value_of_row, counts = np.unique(column.values, return_inverse=True, return_counts=True)
    split_of_value = {value: number for number, name in enumerate(SPLIT_NAMES) for value in getattr(config, name)}
    texts = [_value_text(column, value) for value in values]
    unknown = [index for index, text in enumerate(texts) if text not in split_of_value]
    if unknown:
        raise DataError(
            f"{sample_repr([texts[index] for index in unknown])} in column {config.column!r} belong to no split "
            f"({int(counts[unknown].sum()):,} of {len(value_of_row):,} rows)",
            where="data.splits.column",
            fix=f"list them under train, val or test; listed are {', '.join(split_of_value)}",
        )
    split_of_row = np.array([split_of_value[text] for text in texts], dtype=np.int64)[value_of_row.reshape(-1)]
    indices_by_split = {
        name: np.flatnonzero(split_of_row == number).astype(np.int64) for number, name in enumerate(SPLIT_NAMES)
    }
    return {name: indices for name, indices in indices_by_split.items() if name == "train" or len(indices)}


def _value_text(column: SplitColumn, value: np.generic) -> str:
    if column.value_names:
        return column.value_names[int(value)]
    number = value.item()
    return str(int(number)) if number == int(number) else str(number)


def get_split_column(dataset: Dataset, name: str) -> SplitColumn:
    """Return the column of that name, which has a value in every row.

    Raises
    ------
    DataError: the dataset has no such column, or rows have no value in it.
    """
    if name not in dataset.split_columns:
        raise DataError(
            f"the data has no column {name!r} to split by",
            where=WHERE,
            fix="splits by group, time or column need a table: use data.source: parquet, or split by random or range",
        )
    column = dataset.split_columns[name]
    values = column.values
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    if column.value_names:
        missing = missing | (values < 0)
    if missing.any():
        raise DataError(
            f"{int(missing.sum()):,} of {len(values):,} rows have no value in {name!r}, the first is row "
            f"{int(np.argmax(missing))}",
            where=WHERE,
            fix="fill them in the data, or drop these rows",
        )
    return column


def sample_stratified(indices: np.ndarray, targets: np.ndarray, count: int, seed: int, stream: str) -> np.ndarray:
    """Return a representative sample of a split's rows: int64 (count,), ascending. All rows if there are no more.

    A systematic sample: rows are sorted by target, equal ones in random order, and every n/count-th is taken from a
    random first one on. Each row is equally likely, and each class (each range of a regression's target) has its share
    of the sample to within one row; which of the classes too rare for a row are left out is random.

    Parameters
    ----------
    indices: of the split's rows, int64 (n,).
    targets: of these rows, labels (n,) or values (n,) or (n, T); rows are sorted by the first column.
    seed, stream: as in `make_generator`.
    """
    num_rows = len(indices)
    if num_rows <= count:
        return indices
    rng = make_generator(seed, stream)
    order = random_permutation(rng, num_rows)
    column = targets if targets.ndim == 1 else targets[:, 0]
    order = order[np.argsort(column[order], kind="stable")]
    first = int(random_uint64(rng, 1)[0] % np.uint64(num_rows))
    taken = (np.arange(count, dtype=np.int64) * num_rows + first) // count
    return np.sort(indices[order[taken]])
