"""Which rows train, validate and test: a function of the job and the data's content, never of chance."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.data.random import generator, permutation
from pipeline.data.sources.arrays import Source
from pipeline.data.targets import prepare_targets
from pipeline.errors import DataError
from pipeline.job import Job, RandomSplits, RangeSplits

if TYPE_CHECKING:
    import pyarrow as pa

Part = Literal["train", "test"]

NAMES = ("train", "val", "test")
"""Splits in the order in which they are given and stored."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one split.

    part: the part of the source that they lie in.
    ids: their positions in it, int64 (n,), ascending. Order in training is the sampler's affair.
    """

    part: Part
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def make_splits(job: Job, source: Source) -> dict[str, Rows]:
    """The job's splits: "train", and "val" and "test" where they exist. No two share a row.

    A source's own test set is the test split unless the job takes one from the training part.

    Raises
    ------
    DataError: counts or ranges beyond the rows, ranges that overlap, or a split that comes out empty.
    """
    spec = job.data.splits
    ids = _random(job, spec, source) if isinstance(spec, RandomSplits) else _ranges(spec, len(source.train))
    for name, rows in ids.items():
        if len(rows) == 0:
            raise DataError(
                f"no rows are left for it out of {len(source.train):,}",
                where=f"data.splits.{name}",
                fix="ask for a larger share here, or smaller ones elsewhere",
            )
    splits = {name: Rows("train", ids[name]) for name in NAMES if name in ids}
    if "test" not in splits and source.test is not None:
        splits["test"] = Rows("test", np.arange(len(source.test), dtype=np.int64))
    return splits


def split_warnings(job: Job, splits: dict[str, Rows]) -> list[str]:
    """What is allowed, but probably not meant."""
    rows, batch_size = len(splits["train"]), job.train.batch_size
    if batch_size != "all" and rows < batch_size:
        return [
            f"train.batch_size is {batch_size:,}, but only {rows:,} rows train: every step takes all of them "
            "(batch_size: all says so)"
        ]
    return []


def _random(job: Job, spec: RandomSplits, source: Source) -> dict[str, np.ndarray]:
    """Rows drawn without replacement, val first, so that asking for a test split too leaves val as it is."""
    rows = len(source.train)
    asked = {"val": spec.val, "test": spec.test, "train": spec.train}
    counts = {
        name: int(value) if value >= 1 else round(rows * value) for name, value in asked.items() if value is not None
    }
    held_out = counts["val"] + counts["test"]
    counts.setdefault("train", max(rows - held_out, 0))
    if sum(counts.values()) > rows or (spec.train is None and held_out >= rows):
        told = ", ".join(f"{name}: {value:g} ({counts[name]:,} rows)" for name, value in asked.items() if value)
        raise DataError(
            f"{told} leave {'no rows to train' if spec.train is None else 'too few'} of {rows:,}",
            where="data.splits",
            fix="ask for less",
        )
    order = permutation(generator(job.seed.of("split"), f"split of {source.fingerprint}"), rows)
    groups = _by_class(order, source, job) if spec.stratify else [order]
    drawn: dict[str, np.ndarray] = {}
    for name, count in counts.items():
        if name != "train" and not asked[name]:
            continue
        takes = proportional([len(group) for group in groups], count)
        drawn[name] = np.sort(np.concatenate([group[:take] for group, take in zip(groups, takes, strict=True)]))
        groups = [group[take:] for group, take in zip(groups, takes, strict=True)]
    return drawn


def _by_class(order: np.ndarray, source: Source, job: Job) -> list[np.ndarray]:
    """The drawn order, cut into one list for each class."""
    if job.task.kind == "regression":
        raise DataError("needs classes, and regression has none", where="data.splits.stratify", fix="leave it out")
    labels = prepare_targets(source.train.targets, job.task)[order]
    return [order[labels == label] for label in np.unique(labels)]


def proportional(sizes: list[int], count: int) -> list[int]:
    """`count` shared out in proportion to `sizes`: whole numbers, none above its size, each within one of exact.

    What rounding down leaves goes to the largest remainders, the first of equals.
    """
    total = sum(sizes)
    shares = [divmod(count * size, total) if total else (0, 0) for size in sizes]
    takes = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda place: -shares[place][1])
    for place in by_remainder[: count - sum(takes)]:
        takes[place] += 1
    return takes


def _ranges(spec: RangeSplits, rows: int) -> dict[str, np.ndarray]:
    given = {name: bounds for name in NAMES if (bounds := getattr(spec, name)) is not None}
    for name, (first, end) in given.items():
        if end > rows:
            raise DataError(
                f"[{first}, {end}] ends beyond the {rows:,} rows",
                where=f"data.splits.{name}",
                fix=f"end at {rows} or before",
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


def splits_table(splits: dict[str, Rows]) -> pa.Table:
    """The splits as a table of (split: string, part: string, row: int64), to be stored with a run."""
    import pyarrow as pa

    def words(values: list[str]) -> pa.Array:
        numbers = np.repeat(np.arange(len(values), dtype=np.int32), [len(rows) for rows in splits.values()])
        return pa.DictionaryArray.from_arrays(numbers, pa.array(values, pa.string())).cast(pa.string())

    ids = [rows.ids for rows in splits.values()]
    columns = {
        "split": words(list(splits)),
        "part": words([rows.part for rows in splits.values()]),
        "row": pa.array(np.concatenate(ids), pa.int64()),
    }
    return pa.table(columns)


def splits_from_table(table: pa.Table) -> dict[str, Rows]:
    """What `splits_table` stored."""
    names, parts = (table.column(name).combine_chunks().dictionary_encode() for name in ("split", "part"))
    ids = table.column("row").to_numpy()
    found: dict[str, Rows] = {}
    for number, name in enumerate(names.dictionary.to_pylist()):
        mine = names.indices.to_numpy() == number
        part = parts[int(np.argmax(mine))].as_py()
        found[name] = Rows(part, np.ascontiguousarray(ids[mine], dtype=np.int64))
    return found
