"""The data of a job, split and with fitted transforms, and the training schedule that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.config import JobConfig
from pipeline.cpus import available_cpus
from pipeline.data import augment
from pipeline.data.auto_features import is_auto, leave_out_columns, left_out_warnings
from pipeline.data.dataset import SplitIndices, indices_by_part
from pipeline.data.fitted_transforms import FittedTransforms, check_layout, find_rounded_columns, fit_transforms
from pipeline.data.leakage import leakage_warnings
from pipeline.data.sources import Dataset, DatasetPart, open_dataset
from pipeline.data.splits import make_splits, sample_stratified, split_warnings
from pipeline.data.targets import label_warnings
from pipeline.data.transforms import TabularTransform
from pipeline.errors import JobError, StorageError
from pipeline.events import ProgressFn
from pipeline.runs.checkpoints.checkpoint import find_checkpoint
from pipeline.runs.run import Run
from pipeline.setup.initial_weights import InitialWeights
from pipeline.training.metric_accumulator import (
    check_best_metric_gathered,
    check_threshold_gathered,
    describe_oversized_splits,
)
from pipeline.training.schedule import TrainingSchedule
from pipeline.user_code import UserCode, collect_user_code


@dataclass(frozen=True)
class PreparedData:
    """The data of a job, split and with fitted transforms, and the training schedule that follows from it."""

    job: JobConfig
    dataset: Dataset
    splits: dict[str, SplitIndices]
    targets: dict[str, np.ndarray]
    """Transformed targets of each part of the dataset."""
    fitted: FittedTransforms
    """The transforms of inputs and targets, fitted on the training split."""
    schedule: TrainingSchedule
    initial_weights: InitialWeights | None = None
    """Weights from which training starts; None for random initialization."""
    is_fitted_earlier: bool = False
    """Whether `fitted` comes from a checkpoint: the warnings about columns were given when it was written."""
    code: UserCode = field(kw_only=True)
    """The user's code that the job imports."""

    @property
    def evaluation_splits(self) -> list[str]:
        """The splits to evaluate during training."""
        return list(self.job.evaluate.splits or (["val"] if "val" in self.splits else ["train"]))

    @property
    def num_evaluation_rows(self) -> dict[str, int]:
        """Number of rows of each split that are evaluated during training."""
        limit, splits = self.job.evaluate.limit, self.splits
        return {
            split: len(splits[split]) if limit is None else min(len(splits[split]), limit)
            for split in self.evaluation_splits
        }

    @property
    def metric_columns(self) -> list[str]:
        """The columns of the metrics of every evaluation."""
        return self.job.metric_columns(len(self.fitted.target_mean), self.fitted.target_transform.classes)

    def evaluation_indices(self, split: str) -> np.ndarray:
        """Return the rows of a split that an evaluation uses: all, or a sample of `evaluate.limit`.

        It is a function of the job and the data: the same for every evaluation, attempt and number of workers.
        """
        limit, rows = self.job.evaluate.limit, self.splits[split]
        if limit is None:
            return rows.indices
        targets = self.targets[rows.part][rows.indices]
        return sample_stratified(
            rows.indices, targets, limit, self.job.seed.for_stream("split"), f"rows of {split} to evaluate"
        )

    def dataset_part(self, split: str) -> DatasetPart:
        """Return the part of the dataset that contains a split, with transformed targets."""
        part = self.splits[split].part
        return DatasetPart(self.dataset.part(part).inputs, self.targets[part])

    @property
    def warnings(self) -> list[str]:
        """Warnings about settings that are valid but probably not intended."""
        messages = [*self.dataset.warnings, *split_warnings(self.job, self.splits)]
        if not self.is_fitted_earlier:
            messages += left_out_warnings(self.dataset)
            messages += leakage_warnings(self.job, self.dataset, self.splits["train"].indices)
            messages += label_warnings(self.fitted.target_transform)
        best, processes, cores = self.job.best, self.job.data.loader.processes, available_cpus()
        if best.patience is not None and best.metric.partition("/")[0] not in self.evaluation_splits:
            messages.append(f"best.patience has no effect: {best.metric} is not evaluated")
        messages += describe_oversized_splits(self.job, self.fitted.num_outputs, self.num_evaluation_rows).values()
        if processes > cores:
            messages.append(f"data.loader.processes is {processes}, but there are {cores} cores: 0 may be faster")
        return messages


def load_stored_transforms(run: Run) -> FittedTransforms | None:
    """Return the fitted transforms of a run from its newest checkpoint; None if there is none.

    All checkpoints of a run have the same: the first attempt fits them, later attempts reuse them.

    Raises
    ------
    DataError: they were written by another version.
    """
    try:
        return FittedTransforms.from_json(find_checkpoint(run, "last").load_preprocess())
    except StorageError:  # none yet, or damaged: fitting the same rows again gives the same
        return None


def prepare_data(
    job: JobConfig,
    max_steps: int | None = None,
    *,
    initial_weights: InitialWeights | None = None,
    dataset: Dataset | None = None,
    fitted: FittedTransforms | None = None,
    fingerprint: str | None = None,
    on_progress: ProgressFn = lambda text: None,
    code: UserCode | None = None,
) -> PreparedData:
    """Load and split the data, fit its transforms, and build the schedule.

    Parameters
    ----------
    initial_weights: weights from which training starts; None for random initialization.
    dataset: the job's data, if already open.
    fitted: what an earlier attempt of the run fitted on the same data. A resume reuses it, because another version of
        NumPy could compute statistics that differ in the last bits.
    fingerprint: of the run's data; data with another one is rejected.
    code: the user's code that the job imports; by default the current code.

    Raises
    ------
    InputError: the data cannot be loaded or does not fit the job.
    """
    code = code if code is not None else collect_user_code(job)
    with code.activated():
        if dataset is None or (fitted is not None and dataset.reopen_in_float64 is not None and _needs_float64(fitted)):
            dataset = open_dataset(_with_fitted_features(job, fitted), on_progress, float64=_needs_float64(fitted))
    if fingerprint is not None and dataset.fingerprint != fingerprint:
        raise JobError(
            "the data is not the data of this run",
            where="data",
            fix="see --set data.root=DIR and data.url=URL; `evaluate --data URL` evaluates on other data",
        )
    if augment.is_enabled(job.data.augment):
        augment.check_images(job.data.augment, tuple(dataset.train.inputs.shape[1:]))
    was_fitted = fitted is not None
    if fitted is None:
        dataset, splits, fitted = _split_and_fit(job, dataset)
    else:
        splits = make_splits(job, dataset)
    prepared = PreparedData(
        job=job,
        dataset=dataset,
        splits=splits,
        targets=_transform_targets(job, dataset, splits, fitted),
        fitted=fitted,
        schedule=TrainingSchedule(job, len(splits["train"]), max_steps),
        initial_weights=initial_weights,
        is_fitted_earlier=was_fitted,
        code=code,
    )
    for split in prepared.evaluation_splits:
        if split not in splits:
            raise JobError(f"there is no {split} split to evaluate", where="evaluate.splits", fix="see data.splits")
    if job.best.metric.partition("/")[2] not in (available_metrics := prepared.metric_columns):
        raise JobError(
            f"{job.best.metric} is not measured",
            where="best.metric",
            fix=f"use one of {', '.join(available_metrics)}",
        )
    check_best_metric_gathered(job, fitted.num_outputs, prepared.num_evaluation_rows)
    best_split = job.best.metric.partition("/")[0]
    if best_split in splits and best_split not in prepared.evaluation_splits:
        raise JobError(
            f"{job.best.metric} is not evaluated", where="best.metric", fix=f"add {best_split} to evaluate.splits"
        )
    _check_threshold(prepared)
    return prepared


def _check_threshold(prepared: PreparedData) -> None:
    """Check that there is a validation split on which the rule of `task.threshold` can choose.

    Raises
    ------
    JobError: it is missing, not evaluated, too large, or of one class.
    """
    job = prepared.job
    if job.task.threshold_rule is None:
        return
    where, fix = "task.threshold", "or give the threshold as a number, such as 0.3"
    what = "the threshold is chosen on the validation split"
    if "val" not in prepared.splits:
        raise JobError(f"{what}, and there is none", where=where, fix=f"set data.splits.val, {fix}")
    if "val" not in prepared.evaluation_splits:
        raise JobError(f"{what}, which is not evaluated", where=where, fix=f"add val to evaluate.splits, {fix}")
    check_threshold_gathered(job, prepared.fitted.num_outputs, prepared.num_evaluation_rows)
    targets = prepared.targets[prepared.splits["val"].part][prepared.evaluation_indices("val")]
    if len(targets) == 0 or (targets == targets[0]).all():
        raise JobError(
            f"{what}, and its {len(targets):,} rows are of one class",
            where=where,
            fix=f"draw with data.splits.stratify: true, {fix}",
        )


def _split_and_fit(job: JobConfig, dataset: Dataset) -> tuple[Dataset, dict[str, SplitIndices], FittedTransforms]:
    """Split the dataset and fit on its training rows: in float32 if that is precise enough, else in float64."""
    splits = make_splits(job, dataset)
    dataset = leave_out_columns(job, dataset, splits["train"].indices)
    fitted = fit_transforms(job, dataset, splits)
    rounded_columns = find_rounded_columns(job, dataset, fitted)
    if rounded_columns and dataset.reopen_in_float64 is not None:
        dataset = replace(dataset.reopen_in_float64(), left_out=dataset.left_out)
        splits = make_splits(job, dataset)
        fitted = fit_transforms(job, dataset, splits)
        rounded_columns = find_rounded_columns(job, dataset, fitted)
    warnings = [
        f"{name if name.startswith('number ') else f'column {name!r}'} has numbers with "
        "more digits than float64 holds, and they matter relative to the spread of its training rows: list it under "
        "data.keys if it is a key, or subtract a constant from it"
        for name in rounded_columns
    ]
    return replace(dataset, reopen_in_float64=None, warnings=(*dataset.warnings, *warnings)), splits, fitted


def prepare_all_rows(
    job: JobConfig,
    fitted: FittedTransforms,
    split: str,
    on_progress: ProgressFn = lambda text: None,
    *,
    code: UserCode | None = None,
) -> PreparedData:
    """Load all rows of the job's dataset as one split called `split`, with transforms that were fitted before.

    Parameters
    ----------
    code: as for `prepare_data`.

    Raises
    ------
    InputError: the data cannot be loaded, or has another layout than the data on which the transforms were fitted.
    """
    code = code if code is not None else collect_user_code(job)
    with code.activated():
        dataset = open_dataset(_with_fitted_features(job, fitted), on_progress, float64=_needs_float64(fitted))
    check_layout(fitted, dataset)
    fitted.input_transform.check_missing_values(dataset.train.inputs, dataset.schema)
    splits = {split: SplitIndices("train", np.arange(len(dataset.train), dtype=np.int64))}
    return PreparedData(
        job=job,
        dataset=dataset,
        splits=splits,
        targets=_transform_targets(job, dataset, splits, fitted),
        fitted=fitted,
        schedule=TrainingSchedule(job, len(dataset.train)),
        code=code,
    )


def _with_fitted_features(job: JobConfig, fitted: FittedTransforms | None) -> JobConfig:
    """Return the job with the features by name that were fitted, if it leaves their choice to `features: auto`."""
    if fitted is None or not is_auto(job) or not isinstance(fitted.input_transform, TabularTransform):
        return job
    names = [column.name for column in fitted.input_transform.schema.columns]
    dates = [column.name for column in fitted.input_transform.schema.columns if column.is_date]
    update = {"features": names, "exclude": [], "dates": dates}
    return job.model_copy(update={"data": job.data.model_copy(update=update)})


def _needs_float64(fitted: FittedTransforms | None) -> bool | None:
    """Return True if the transforms were fitted in float64, so that rows must be too; None leaves it to the job."""
    return True if fitted is not None and fitted.input_transform.dtype == "float64" else None


def _transform_targets(
    job: JobConfig, dataset: Dataset, splits: dict[str, SplitIndices], fitted: FittedTransforms
) -> dict[str, np.ndarray]:
    """Return the transformed targets of each part of the dataset that has a split."""
    dtype = np.float64 if job.train.precision == "fp64" else np.float32
    return {
        part: fitted.target_transform.transform(
            dataset.part(part).targets,
            dataset.label_names,
            dtype,
            indices=np.concatenate(ids),
            column_label_names=dataset.column_label_names,
        )
        for part, ids in indices_by_part(splits).items()
    }
