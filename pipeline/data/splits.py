"""The column that splits go by.

Rows drawn at random.

Whole groups drawn at random.

Rows by position.

The newest rows held out.

Splits that a column of the data tells.

Which rows train, validate and test: a function of the job and the data's content, never of chance.

One module for each way to split; `rows` is what comes out, and how it is stored with a run.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.config import (
    ColumnSplitsConfig,
    GroupSplitsConfig,
    JobConfig,
    RandomSplitsConfig,
    RangeSplitsConfig,
    TimeSplitsConfig,
)
from pipeline.data.dataset import SPLIT_NAMES, Dataset, SplitColumn, SplitIndices
from pipeline.data.labels import sample_repr, stratification_labels
from pipeline.data.rng import make_generator, random_permutation, random_uint64
from pipeline.errors import DataError

WHERE = "data.splits.column"


def get_split_column(dataset: Dataset, name: str) -> SplitColumn:
    """The column of that name, with a value in every row.

    Raises
    ------
    DataError: the source has no such column, or rows have no value in it.
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


def random_split(job: JobConfig, config: RandomSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Rows drawn without replacement, val first, so that asking for a test split too leaves val as it is."""
    rows = len(dataset.train)
    asked = {"val": config.val, "test": config.test, "train": config.train}
    counts = {
        name: int(value) if value >= 1 else round(rows * value) for name, value in asked.items() if value is not None
    }
    held_out = counts["val"] + counts["test"]
    counts.setdefault("train", max(rows - held_out, 0))
    if sum(counts.values()) > rows or (config.train is None and held_out >= rows):
        requested = ", ".join(f"{name}: {value:g} ({counts[name]:,} rows)" for name, value in asked.items() if value)
        raise DataError(
            f"{requested} leave {'no rows to train' if config.train is None else 'too few'} of {rows:,}",
            where="data.splits",
            fix="ask for less",
        )
    order = random_permutation(make_generator(job.seed.for_stream("split"), f"split of {dataset.fingerprint}"), rows)
    groups = _group_by_class(order, dataset, job) if config.stratify else [order]
    drawn: dict[str, np.ndarray] = {}
    for name, count in counts.items():
        if name != "train" and not asked[name]:
            continue
        takes = allocate_proportionally([len(group) for group in groups], count)
        drawn[name] = np.sort(np.concatenate([group[:take] for group, take in zip(groups, takes, strict=True)]))
        groups = [group[take:] for group, take in zip(groups, takes, strict=True)]
    return drawn


def _group_by_class(order: np.ndarray, dataset: Dataset, job: JobConfig) -> list[np.ndarray]:
    """The drawn order, cut into one list for each class."""
    if job.task.kind == "regression":
        raise DataError("needs classes, and regression has none", where="data.splits.stratify", fix="leave it out")
    labels = stratification_labels(dataset, job.task)[order]
    return [order[labels == label] for label in np.unique(labels)]


def allocate_proportionally(sizes: list[int], count: int) -> list[int]:
    """`count` shared out in proportion to `sizes`: whole numbers, none above its size, each within one of exact.

    What rounding down leaves goes to the largest remainders, the first of equals.
    """
    total = sum(sizes)
    shares = [divmod(count * size, total) if total else (0, 0) for size in sizes]
    takes = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda place: -shares[place][1])
    for index in by_remainder[: count - sum(takes)]:
        takes[index] += 1
    return takes


def sample_stratified(indices: np.ndarray, targets: np.ndarray, count: int, seed: int, stream: str) -> np.ndarray:
    """`count` of a split's rows, which stand for all of them: int64 (count,), ascending. All where there are no more.

    A systematic sample: the rows are ordered by target, equal ones at random, and from a random first one on every
    n/count-th is taken. Each row is as likely as any other, each class (each range of a regression's target) has its
    share of the sample to within one row, and which of the classes that are rarer than that are left out is random.

    Parameters
    ----------
    ids: int64 (n,).
    targets: of these rows, labels (n,) or values (n,) or (n, T), of which the first column orders.
    seed, stream: as `generator` takes them.
    """
    rows = len(indices)
    if rows <= count:
        return indices
    rng = make_generator(seed, stream)
    order = random_permutation(rng, rows)
    column = targets if targets.ndim == 1 else targets[:, 0]
    order = order[np.argsort(column[order], kind="stable")]
    first = int(random_uint64(rng, 1)[0] % np.uint64(rows))
    taken = (np.arange(count, dtype=np.int64) * rows + first) // count
    return np.sort(indices[order[taken]])


def split_by_group(job: JobConfig, config: GroupSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Groups in a drawn order, val's first, so that asking for a test split too leaves val as it is.

    A number takes so many groups. A share goes through the groups that are left, in order, and takes each that brings
    the rows taken nearer to it; so it ends within half of the smallest group that it passed over.

    Raises
    ------
    DataError: more groups than there are, or none left to train.
    """
    column = get_split_column(dataset, config.column)
    _, group, sizes = np.unique(column.values, return_inverse=True, return_counts=True)
    order = random_permutation(
        make_generator(job.seed.for_stream("split"), f"groups of {dataset.fingerprint}"), len(sizes)
    )
    side = np.full(len(sizes), -1)
    for number, asked in enumerate((config.val, config.test)):
        left = order[side[order] < 0]
        taken = (
            left[: int(asked)] if asked >= 1 else left[_select_nearest_groups(sizes[left], round(len(group) * asked))]
        )
        if asked and len(taken) in (0, len(left)):
            name = ("val", "test")[number]
            raise DataError(
                f"{name}: {asked:g} takes {len(taken):,} of {len(left):,} groups of {config.column!r}, "
                f"the largest has {sizes[left].max() if len(left) else 0:,} of {len(group):,} rows",
                where=f"data.splits.{name}",
                fix="ask for a share that whole groups can make up, and leave some to train",
            )
        side[taken] = number
    of_row = side[group.reshape(-1)]
    asked_for = [("train", -1)] + [(name, n) for n, name in enumerate(("val", "test")) if getattr(config, name)]
    return {name: np.flatnonzero(of_row == number).astype(np.int64) for name, number in asked_for}


def _select_nearest_groups(sizes: np.ndarray, target_size: int) -> np.ndarray:
    """Which groups to take, bool (G,): each that brings the sum of sizes nearer to what is wanted."""
    takes = np.zeros(len(sizes), bool)
    for index, size in enumerate(sizes.tolist()):
        if size < 2 * target_size:
            takes[index] = True
            target_size -= size
    return takes


def split_by_range(config: RangeSplitsConfig, num_rows: int) -> dict[str, np.ndarray]:
    """The ranges of the job; DataError where they end beyond the rows or overlap."""
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
                fix="a range excludes its end: let one begin where the other ends",
            )
    return {name: np.arange(first, end, dtype=np.int64) for name, (first, end) in given.items()}


NANOSECONDS = {"s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9, "w": 7 * 86_400 * 10**9}


def split_by_time(config: TimeSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """The test split's window ends with the newest instant, the validation split's where that of the test split begins.

    A window of a length holds the instants from its end back to, but not including, its end less the length: 14d of
    days are 14 days. A share begins at the instant that brings its rows nearest to it, the later of two. Rows of one
    instant stay together.

    Raises
    ------
    DataError: a length that does not fit the column, or windows that leave nothing to train.
    """
    column = get_split_column(dataset, config.column)
    values = column.values
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    # Where windows may begin in that order: at the first row of an instant, or behind the last.
    begins = np.append(np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])), len(ordered))
    ids: dict[str, np.ndarray] = {}
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
        ids[name] = np.sort(order[first:end])
        end = first
    return {"train": np.sort(order[:end]), **ids}


def _window_length(name: str, window: float | str, column: SplitColumn) -> float | int | None:
    """A window's length in the column's unit; None for a share."""
    if not isinstance(window, str) and window < 1:
        return None
    if isinstance(window, str) == column.is_time and not column.value_names:
        return window if not isinstance(window, str) else round(float(window[:-1]) * NANOSECONDS[window[-1]])
    kind = "text" if column.value_names else "a timestamp" if column.is_time else "a number"
    fix = {
        "text": "convert it to a timestamp or a number",
        "a timestamp": "give a share below 1, or a length with its unit, such as 14d",
        "a number": "give a share below 1, or a plain number in the column's unit",
    }
    raise DataError(f"{name}: {window} is no length of {kind}", where=f"data.splits.{name}", fix=fix[kind])


def _format_span(name: str, column: SplitColumn) -> str:
    oldest, newest = column.values.min(), column.values.max()
    if column.is_time:
        oldest, newest = (np.datetime64(int(value), "ns").astype("datetime64[s]") for value in (oldest, newest))
    return f"{name} goes from {oldest} to {newest}"


def split_by_column(config: ColumnSplitsConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """The rows whose value means each split; val and test only where there are any.

    Raises
    ------
    DataError: a value that means no split.
    """
    column = get_split_column(dataset, config.column)
    numbers, of_row, counts = np.unique(column.values, return_inverse=True, return_counts=True)
    split_of_value = {value: place for place, name in enumerate(SPLIT_NAMES) for value in getattr(config, name)}
    texts = [_value_text(column, number) for number in numbers]
    unknown = [place for place, text in enumerate(texts) if text not in split_of_value]
    if unknown:
        raise DataError(
            f"{sample_repr([texts[place] for place in unknown])} in column {config.column!r} mean no split "
            f"({int(counts[unknown].sum()):,} of {len(of_row):,} rows)",
            where="data.splits.column",
            fix=f"list them under train, val or test; listed are {', '.join(split_of_value)}",
        )
    split = np.array([split_of_value[text] for text in texts], dtype=np.int64)[of_row.reshape(-1)]
    ids = {name: np.flatnonzero(split == place).astype(np.int64) for place, name in enumerate(SPLIT_NAMES)}
    return {name: rows for name, rows in ids.items() if name == "train" or len(rows)}


def _value_text(column: SplitColumn, number: np.generic) -> str:
    if column.value_names:
        return column.value_names[int(number)]
    value = number.item()
    return str(int(value)) if value == int(value) else str(value)


def make_splits(job: JobConfig, dataset: Dataset) -> dict[str, SplitIndices]:
    """The job's splits: "train", and "val" and "test" where they exist. No two share a row.

    A source's own test set is the test split unless the job takes one from the training part.

    Raises
    ------
    DataError: counts, ranges or windows beyond the rows, ranges that overlap, a column that is not there or has a value
        that means nothing, or a split that comes out empty.
    """
    ids = _make_split_indices(job, dataset)
    for name, rows in ids.items():
        if len(rows) == 0:
            raise DataError(
                f"no rows are left for it out of {len(dataset.train):,}",
                where=f"data.splits.{name}",
                fix="ask for a larger share here, or smaller ones elsewhere",
            )
    check_disjoint(ids, len(dataset.train))
    splits = {name: SplitIndices("train", ids[name]) for name in SPLIT_NAMES if name in ids}
    if "test" not in splits and dataset.test is not None:
        splits["test"] = SplitIndices("test", np.arange(len(dataset.test), dtype=np.int64))
    return splits


def _make_split_indices(job: JobConfig, dataset: Dataset) -> dict[str, np.ndarray]:
    """Positions of each split that is asked for, ascending, int64; it may be empty."""
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


def check_disjoint(ids: dict[str, np.ndarray], num_rows: int) -> None:
    """Raise DataError for a row on two sides."""
    taken = np.zeros(num_rows, bool)
    for name, indices in ids.items():
        twice = indices[taken[indices]]
        if len(twice):
            raise DataError(
                f"row {twice[0]} and {len(twice) - 1:,} more stand in another split too", where=f"data.splits.{name}"
            )
        taken[indices] = True


def split_warnings(job: JobConfig, splits: dict[str, SplitIndices]) -> list[str]:
    """What is allowed, but probably not meant."""
    rows, batch_size = len(splits["train"]), job.train.batch_size
    if batch_size != "all" and rows < batch_size:
        return [
            f"train.batch_size is {batch_size:,}, but only {rows:,} rows train: every step takes all of them "
            "(batch_size: all says so)"
        ]
    return []
