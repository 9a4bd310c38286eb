"""The data of a job: opened, split, looked at and fitted, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.cpus import available_cpus
from pipeline.data import augment
from pipeline.data.fitted import Fitted, check_layout, coarse_columns, fit
from pipeline.data.preprocess import fit_warnings
from pipeline.data.sources import Arrays, Source, open_source
from pipeline.data.split import Rows, make_splits, rows_by_part, split_warnings, stratified_sample
from pipeline.data.targets.fitting import label_warnings
from pipeline.errors import JobError, StorageError
from pipeline.job import Job
from pipeline.learn.plan import Plan
from pipeline.learn.tally import check_best_is_gathered, too_large_to_gather
from pipeline.own_code import UserCode, collect
from pipeline.record.checkpoint import find_checkpoint
from pipeline.record.run import Run
from pipeline.starting import Start


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
    was_fitted: bool = False
    """`fitted` comes from a checkpoint; what is to be said of the columns was said when it was made."""
    code: UserCode = field(kw_only=True)
    """The user's own code that the job imports."""

    @property
    def evaluated(self) -> list[str]:
        """The splits to evaluate while training."""
        return list(self.job.evaluate.splits or (["val"] if "val" in self.splits else ["train"]))

    @property
    def evaluated_rows(self) -> dict[str, int]:
        """How many rows of each split are evaluated while training."""
        limit, splits = self.job.evaluate.limit, self.splits
        return {
            split: len(splits[split]) if limit is None else min(len(splits[split]), limit) for split in self.evaluated
        }

    def evaluated_ids(self, split: str) -> np.ndarray:
        """The rows of a split that an evaluation takes: all, or a sample of `evaluate.limit`. It is a function of the
        job and the data, so that every evaluation, attempt and number of workers takes the same."""
        limit, rows = self.job.evaluate.limit, self.splits[split]
        if limit is None:
            return rows.ids
        targets = self.targets[rows.part][rows.ids]
        return stratified_sample(rows.ids, targets, limit, self.job.seed.of("split"), f"rows of {split} to evaluate")

    def arrays(self, split: str) -> Arrays:
        """The part in which a split lies, with prepared targets."""
        part = self.splits[split].part
        return Arrays(self.source.part(part).inputs, self.targets[part])

    @property
    def warnings(self) -> list[str]:
        """What is allowed, but probably not meant."""
        messages = [*self.source.warnings, *split_warnings(self.job, self.splits)]
        if not self.was_fitted:
            messages += fit_warnings(self.job, self.source, self.splits["train"].ids)
            messages += label_warnings(self.fitted.labels)
        best, processes, cores = self.job.best, self.job.data.loader.processes, available_cpus()
        if best.patience is not None and best.metric.partition("/")[0] not in self.evaluated:
            messages.append(f"best.patience has no effect: {best.metric} is not evaluated")
        messages += too_large_to_gather(self.job, self.fitted.outputs, self.evaluated_rows).values()
        if processes > cores:
            messages.append(f"data.loader.processes is {processes}, but there are {cores} cores: 0 may be faster")
        return messages


def stored_transforms(run: Run) -> Fitted | None:
    """What the attempts of a run fitted, from its newest checkpoint; None before the first.

    All checkpoints of a run hold the same: the first attempt fitted it, every later one took it over.

    Raises
    ------
    DataError: written by another version.
    """
    try:
        return Fitted.from_json(find_checkpoint(run, "last").preprocess())
    except StorageError:  # none yet, or damaged: fitting the same rows again gives the same
        return None


Say = Callable[[str], None]
"""Takes a few words on what is going on, such as "decoding 1,200 of 50,000 pictures"."""


def prepare(
    job: Job,
    max_steps: int | None = None,
    *,
    start: Start | None = None,
    source: Source | None = None,
    fitted: Fitted | None = None,
    fingerprint: str | None = None,
    say: Say = lambda text: None,
    code: UserCode | None = None,
) -> Prepared:
    """Load and split the data, fit its preprocessing, and lay out the plan.

    Parameters
    ----------
    start: weights to begin with; without them the untrained weights stay what they are, for those who load others over
        them.
    source: the job's data, where it is open.
    fitted: what an earlier attempt of the run fitted on the same data. A resume takes it, for another version of NumPy
        could give other statistics in their last bits.
    fingerprint: of the run's data; any other is refused.
    code: the user's own code that the job imports; else what is there now.

    Raises
    ------
    InputError: data that cannot be loaded or does not fit the job.
    """
    code = code if code is not None else collect(job)
    with code.in_use():
        if source is None or (fitted is not None and source.in_float64 is not None and _holds_float64(fitted)):
            source = open_source(job, say, float64=_holds_float64(fitted))
    if fingerprint is not None and source.fingerprint != fingerprint:
        raise JobError(
            "the data here is not the data of this run",
            where="data",
            fix="see --set data.root=DIR and data.url=URL; `evaluate --data URL` evaluates on other data",
        )
    if augment.is_wanted(job.data.augment):
        augment.check_images(job.data.augment, tuple(source.train.inputs.shape[1:]))
    was_fitted = fitted is not None
    if fitted is None:
        source, splits, fitted = _fitted(job, source)
    else:
        splits = make_splits(job, source)
    prepared = Prepared(
        job=job,
        source=source,
        splits=splits,
        targets=_targets(job, source, splits, fitted),
        fitted=fitted,
        plan=Plan(job, len(splits["train"]), max_steps),
        start=start,
        was_fitted=was_fitted,
        code=code,
    )
    for split in prepared.evaluated:
        if split not in splits:
            raise JobError(f"there is no {split} split to evaluate", where="evaluate.splits", fix="see data.splits")
    if job.best.metric.partition("/")[2] not in (available_metrics := job.measured(fitted.outputs)):
        raise JobError(f"{job.best.metric} is not measured", where="best.metric", fix=f"there are {', '.join(available_metrics)}")
    check_best_is_gathered(job, fitted.outputs, prepared.evaluated_rows)
    best_split = job.best.metric.partition("/")[0]
    if best_split in splits and best_split not in prepared.evaluated:
        raise JobError(
            f"{job.best.metric} is not evaluated", where="best.metric", fix=f"add {best_split} to evaluate.splits"
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


def prepare_rows(
    job: Job, fitted: Fitted, name: str, say: Say = lambda text: None, *, code: UserCode | None = None
) -> Prepared:
    """All rows of the job's source as one split called `name`, under what was fitted before. Code as for `prepare`.

    Raises
    ------
    InputError: data that cannot be loaded, or is of another layout than what was fitted.
    """
    code = code if code is not None else collect(job)
    with code.in_use():
        source = open_source(job, say, float64=_holds_float64(fitted))
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
        code=code,
    )


def _holds_float64(fitted: Fitted | None) -> bool | None:
    """Whether rows have to be held in float64 because what was fitted was; None leaves it to the job."""
    return True if fitted is not None and fitted.preprocess.dtype == "float64" else None


def _targets(job: Job, source: Source, splits: dict[str, Rows], fitted: Fitted) -> dict[str, np.ndarray]:
    """What is learned, of each part of the source."""
    dtype = np.float64 if job.train.precision == "fp64" else np.float32
    return {
        part: fitted.labels.prepare(source.part(part).targets, source.label_names, dtype, rows=np.concatenate(ids))
        for part, ids in rows_by_part(splits).items()
    }
