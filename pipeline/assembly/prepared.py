"""The data of a job: opened, split, looked at and fitted, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pipeline import device as devices
from pipeline.data import augment
from pipeline.data.fitted import Fitted, check_layout, coarse_columns, fit
from pipeline.data.preprocess import fit_warnings
from pipeline.data.sources import Arrays, Source, open_source
from pipeline.data.split import Rows, make_splits, rows_by_part, split_warnings
from pipeline.data.targets.fitting import label_warnings
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.learn.plan import Plan
from pipeline.learn.tally import check_best_is_gathered, too_large_to_gather
from pipeline.own_code import make_importable
from pipeline.redaction import is_looked_up, looked_up
from pipeline.starting import Start, find_start


@dataclass(frozen=True)
class Prepared:
    """The data of a job, split and looked at, and the plan that follows from it."""

    job: Job
    source: Source
    splits: dict[str, Rows]
    targets: dict[str, np.ndarray]
    """Prepared targets of each part of the source."""
    fitted: Fitted
    """How samples and targets become what is learned: fitted on the training split."""
    plan: Plan
    start: Start | None = None
    """Weights from elsewhere to begin with."""

    @property
    def evaluated(self) -> list[str]:
        """The splits to evaluate while training."""
        return list(self.job.evaluate.splits or (["val"] if "val" in self.splits else ["train"]))

    @property
    def evaluated_rows(self) -> dict[str, int]:
        """How many rows of each split are evaluated while training."""
        limit = self.job.evaluate.limit
        return {split: len(self.splits[split].ids[:limit]) for split in self.evaluated}

    def under(self, fitted: Fitted) -> Prepared:
        """The same rows, prepared as a checkpoint's `fitted` says: its classes and scales, whatever this program fits.

        Raises
        ------
        DataError: a label that was no class.
        """
        return replace(self, fitted=fitted, targets=_targets(self.job, self.source, self.splits, fitted))

    def arrays(self, split: str) -> Arrays:
        """The part in which a split lies, with prepared targets."""
        part = self.splits[split].part
        return Arrays(self.source.part(part).inputs, self.targets[part])

    @property
    def warnings(self) -> list[str]:
        """What is allowed, but probably not meant."""
        found = [*self.source.warnings, *split_warnings(self.job, self.splits)]
        found += fit_warnings(self.job, self.source, self.splits["train"].ids)
        found += label_warnings(self.fitted.labels)
        best, processes, cores = self.job.best, self.job.data.loader.processes, devices.available_cpus()
        if best.patience is not None and best.metric.partition("/")[0] not in self.evaluated:
            found.append(f"best.patience has no effect: {best.metric} is not evaluated")
        found += too_large_to_gather(self.job, self.fitted.outputs, self.evaluated_rows).values()
        if processes > cores:
            found.append(f"data.loader.processes is {processes}, but there are {cores} cores: 0 may be faster")
        return found


Say = Callable[[str], None]
"""Takes a few words on what is going on, such as "decoding 1,200 of 50,000 pictures"."""


def prepare(
    job: Job, max_steps: int | None = None, *, storage_url: str | None = None, say: Say = lambda text: None
) -> Prepared:
    """Load and split the data, fit its preprocessing, lay out the plan, and find the weights to start from.

    Parameters
    ----------
    storage_url: folder in which `model.init_from` finds runs; without it the untrained weights stay what they are, for
        those who load others over them.

    Raises
    ------
    InputError: data that cannot be loaded or does not fit the job.
    """
    make_importable(job)
    start = find_start(job, storage_url) if storage_url is not None else None
    source = open_source(_with_url(job), say)
    if augment.is_wanted(job.data.augment):
        augment.check_images(job.data.augment, tuple(source.train.inputs.shape[1:]))
    source, splits, fitted = _fitted(job, source)
    prepared = Prepared(
        job=job,
        source=source,
        splits=splits,
        targets=_targets(job, source, splits, fitted),
        fitted=fitted,
        plan=Plan(job, len(splits["train"]), max_steps),
        start=start,
    )
    for split in prepared.evaluated:
        if split not in splits:
            raise JobError(f"there is no {split} split to evaluate", where="evaluate.splits", fix="see data.splits")
    if job.best.metric.partition("/")[2] not in (known := job.measured(fitted.outputs)):
        raise JobError(f"{job.best.metric} is not measured", where="best.metric", fix=f"there are {', '.join(known)}")
    check_best_is_gathered(job, fitted.outputs, prepared.evaluated_rows)
    wanted = job.best.metric.partition("/")[0]
    if wanted in splits and wanted not in prepared.evaluated:
        raise JobError(
            f"{job.best.metric} is not evaluated", where="best.metric", fix=f"add {wanted} to evaluate.splits"
        )
    return prepared


def _fitted(job: Job, source: Source) -> tuple[Source, dict[str, Rows], Fitted]:
    """Split the source and fit on its training rows: in float32 where that is enough for them, else in float64."""
    splits = make_splits(job, source)
    fitted = fit(job, source, splits)
    coarse = coarse_columns(job, source, fitted)
    if coarse and source.in_float64 is not None:
        source = source.in_float64()
        splits = make_splits(job, source)
        fitted = fit(job, source, splits)
        coarse = coarse_columns(job, source, fitted)
    warnings = [
        f"{name if name.startswith('number ') else f'column {name!r}'} has numbers of more digits than float64 holds, "
        "and they matter beside the spread of its training rows: list it under data.keys if it is one, or subtract "
        "a constant from it"
        for name in coarse
    ]
    return replace(source, in_float64=None, warnings=(*source.warnings, *warnings)), splits, fitted


def prepare_rows(job: Job, fitted: Fitted, name: str, say: Say = lambda text: None) -> Prepared:
    """All rows of the job's source as one split called `name`, under what was fitted before.

    Raises
    ------
    InputError: data that cannot be loaded, or is of another layout than what was fitted.
    """
    make_importable(job)
    source = open_source(_with_url(job), say, float64=fitted.preprocess.dtype == "float64" or None)
    check_layout(fitted, source)
    fitted.preprocess.check(source.train.inputs, source.schema)
    splits = {name: Rows("train", np.arange(len(source.train), dtype=np.int64))}
    return Prepared(
        job=job,
        source=source,
        splits=splits,
        targets=_targets(job, source, splits, fitted),
        fitted=fitted,
        plan=Plan(job, len(source.train)),
    )


def _with_url(job: Job) -> Job:
    """The job with a `data.url` that stands in the environment looked up: to be opened, and never written."""
    if job.data.url is None or not is_looked_up(job.data.url):
        return job
    url = looked_up(job.data.url, "data.url")
    return job.model_copy(update={"data": job.data.model_copy(update={"url": url})})


def _targets(job: Job, source: Source, splits: dict[str, Rows], fitted: Fitted) -> dict[str, np.ndarray]:
    """What is learned, of each part of the source."""
    dtype = np.float64 if job.train.precision == "fp64" else np.float32
    return {
        part: fitted.labels.prepare(source.part(part).targets, source.label_names, dtype, rows=np.concatenate(ids))
        for part, ids in rows_by_part(splits).items()
    }
