"""Rows drawn at random."""

from __future__ import annotations

import numpy as np

from pipeline.data.random import make_generator, random_permutation, random_uint64
from pipeline.data.sources.arrays import Dataset
from pipeline.data.targets.labels import stratification_labels
from pipeline.errors import DataError
from pipeline.job import JobConfig, RandomSplitsConfig


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
