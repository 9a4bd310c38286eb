"""`evaluate`: compute the exact metrics of a saved checkpoint."""

from __future__ import annotations

import fnmatch
import glob
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.config import (
    SPLIT_NAMES,
    BaseDataConfig,
    FileDataConfig,
    JobConfig,
    RandomSplitsConfig,
    TableColumnsConfig,
    UserTableDataConfig,
    compute_identity,
    digest_tree,
)
from pipeline.config.files import override_job, parse_job
from pipeline.context import SingleProcessContext
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.data.sources.tables.formats import config_of_url
from pipeline.data.tabular.encoder import list_text_columns
from pipeline.data.transforms import DataReport
from pipeline.device import restore_torch_settings
from pipeline.errors import InputError
from pipeline.events import ProgressFn
from pipeline.format_metrics import baseline_warning, format_metric_table
from pipeline.inference.load import load_trusted_code, read_threshold
from pipeline.redaction import redact
from pipeline.runs.checkpoints.checkpoint import find_checkpoint
from pipeline.runs.locate import absolute_url, find_run
from pipeline.runs.run import Run, log_test_access
from pipeline.setup import build_eval_loader, build_training, check_state_dict, prepare_all_rows, prepare_data
from pipeline.storage.filesystems import PROTOCOL_EXTRAS
from pipeline.training import loop
from pipeline.user_code import UserCode, list_user_references

PLAIN_PROTOCOLS = ("file", "local", "memory", "http", "https", "hf", "sftp", "ssh")
"""Protocols, beside those of object stores, from which a stored job may read data without being trusted."""


@dataclass(frozen=True)
class EvaluateResult:
    """The metrics of a checkpoint on a split."""

    run: str
    url: str
    checkpoint: str
    step: int
    split: str
    metrics: dict[str, float]
    """The job's metrics and the number of samples, by `split/column`; NaN if a metric is undefined."""
    report: DataReport
    """How the split's columns differ from the training data."""

    @property
    def warnings(self) -> list[str]:
        """Warnings of the report."""
        return self.report.format_warnings()

    def to_json(self) -> dict[str, Any]:
        metrics = {name: None if value != value else value for name, value in self.metrics.items()}
        fields = {name: value for name, value in self.__dict__.items() if name != "report"}
        report = {"columns": self.report.to_json(), "warnings": self.warnings}
        return {**fields, "metrics": metrics, **report, "error": None}

    def format_lines(self) -> list[str]:
        samples, correct = (self.metrics.get(f"{self.split}/{name}") for name in ("samples", "correct"))
        count = f"{samples:,.0f} samples" if correct is None else f"{correct:,.0f} of {samples:,.0f} samples correct"
        lines = [f"{self.run} at step {self.step}, {self.split}: {count}"]
        lines += [f"  {line}" for line in format_metric_table(self.metrics, self.split)]
        lines += [f"  {line}" for line in self.report.format_lines()]
        warning = baseline_warning(self.metrics, self.split)
        return [*lines, f"  warning: {warning}"] if warning else lines


@restore_torch_settings()
def evaluate(
    run: str,
    *,
    split: str = "val",
    data: str | None = None,
    checkpoint: str = "best",
    set: Iterable[str] = (),  # noqa: A002 - the public name of the option
    storage: str | None = None,
    trust: bool = False,
    on_progress: ProgressFn = lambda text: None,
) -> EvaluateResult:
    """Evaluate a run's checkpoint on a whole split, or on other data with the same columns or kind of images.

    Preprocessing and classes are those of the checkpoint, and predictions are those at its threshold, which is a metric
    too unless it is 0.5. An evaluation on the test split is recorded in the run before
    the data is used.

    Parameters
    ----------
    run: name of a run in `storage`, or its URL.
    split: train, val or test.
    data: URL of other data. All its samples are evaluated, and the metrics are named `data/...`.
    checkpoint: best, last, or the number of a step.
    set: overrides of where and how to run, such as data.root or scale.device; fields that determine the weights cannot
        change.
    storage: URL of the runs; default: TRAINYARD_STORAGE, else ./runs.
    trust: allow the stored job to import the modules that it names.
    on_progress: receives lines about long phases.

    Raises
    ------
    InputError: no such run, checkpoint or split, or data that is not the run's or does not match it.
    """
    if split not in SPLIT_NAMES:
        raise InputError(f"{split!r} is no split", where="--split", fix="train, val or test")
    opened_run = find_run(run, storage)
    saved = find_checkpoint(opened_run, checkpoint)
    job, code = _load_stored_job(opened_run, list(set), trust)
    threshold = read_threshold(job, saved)
    task = job.task.model_copy(update={"threshold": 0.5})  # nothing is chosen here
    job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"limit": None}), "task": task})
    fitted, state_dict = FittedTransforms.from_json(saved.load_preprocess()), saved.load_weights()
    check_state_dict(job, fitted, state_dict, saved.url)
    if data is not None:
        split, prepared = (
            "data",
            prepare_all_rows(_with_other_data(job, data, fitted), fitted, "data", on_progress, code=code),
        )
    else:
        prepared = prepare_data(
            job,
            fitted=fitted,
            fingerprint=opened_run.read_metadata()["fingerprint"],
            on_progress=on_progress,
            code=code,
        )
        if split not in prepared.splits:
            available = ", ".join(prepared.splits)
            raise InputError(f"this run has no {split} split", where=opened_run.url, fix=f"it has: {available}")
    built = build_training(prepared, for_training=False)
    built.engine.flat.load_state_dict(state_dict)
    if split == "test":
        metadata = {"checkpoint": saved.name, "step": saved.step, "host": socket.gethostname(), "pid": os.getpid()}
        log_test_access(opened_run, metadata)
    loader = build_eval_loader(prepared, built, split)
    result = loop.evaluate(built.engine, loader, SingleProcessContext(), threshold=threshold)
    if threshold != 0.5:
        result["threshold"] = threshold
    metrics = {f"{split}/{name}": value for name, value in result.items()}
    report = DataReport(fitted.input_transform)
    split_indices = prepared.splits[split]
    report.add(prepared.dataset.part(split_indices.part).inputs, split_indices.indices, prepared.dataset.schema)
    return EvaluateResult(opened_run.name, opened_run.url, saved.name, saved.step, split, metrics, report)


def _with_other_data(job: JobConfig, url: str, fitted: FittedTransforms) -> JobConfig:
    """Return the job with all rows of a URL as its data. Its features are those of the training; the new data needs
    neither keys nor a column for splits."""
    if not isinstance(job.data, FileDataConfig | TableColumnsConfig):
        raise InputError(
            f"this run was trained on {job.data.source}, which has no URL", where=f"--data {url}", fix="use --split"
        )
    update: dict[str, Any] = {"url": absolute_url(url), "splits": RandomSplitsConfig()}
    if isinstance(job.data, TableColumnsConfig) and fitted.input_transform.schema is not None:
        names = [column.name for column in fitted.input_transform.schema.columns]
        update |= {"features": [glob.escape(name) for name in names], "keys": []}
        update |= {"categorical": [name for name in job.data.categorical if fnmatch.filter(names, name)]}
        update |= {"hashed": {name: size for name, size in job.data.hashed.items() if fnmatch.filter(names, name)}}
        if isinstance(job.data, UserTableDataConfig):  # whose library marks categories, which no file does
            categories = [column.name for column in fitted.input_transform.schema.columns if column.kind == "category"]
            update["categorical"] = [glob.escape(name) for name in categories]
        dates = [column.name for column in fitted.input_transform.schema.columns if column.is_date]
        update |= {"dates": [glob.escape(name) for name in dates]}
    elif isinstance(job.data, TableColumnsConfig) and job.data.splits_column is not None:
        update |= {"keys": [*job.data.keys, job.data.splits_column]}  # else it would count as a second feature
    data: BaseDataConfig = job.data
    if isinstance(data, TableColumnsConfig):
        schema = fitted.input_transform.schema
        texts = [
            *(list_text_columns(schema) if schema is not None else ()),
            *(data.labels if fitted.target_transform.is_text else ()),
        ]
        data = config_of_url(data, update["url"], texts)
    return job.model_copy(update={"data": data.model_copy(update=update)})


def _check_data_url(job: JobConfig, stored: JobConfig, where: str) -> None:
    """Refuse a stored job's data URL if it needs more than a file system: some of fsspec's protocols start programs,
    speak other network protocols or fill in templates.

    Raises
    ------
    InputError: the URL is such a one, and no override replaces it.
    """
    if not isinstance(job.data, FileDataConfig):
        return
    url = job.data.url
    if not isinstance(stored.data, FileDataConfig) or url != stored.data.url:
        return
    protocol, separator, _ = url.partition("://")
    if "::" in url or (separator and protocol not in (*PROTOCOL_EXTRAS, *PLAIN_PROTOCOLS)):
        raise InputError(
            f"this job would read its data from {redact(url)}",
            where=where,
            fix="--trust (in Python: trust=True) allows it; --set data.url=URL replaces it",
        )


def _load_stored_job(run: Run, overrides: list[str], trust: bool) -> tuple[JobConfig, UserCode]:
    """Return the job that is stored with the run, with overrides of where and how to run, and its user code.

    Raises
    ------
    InputError: the job names modules and is not trusted, or an override changes the run's identity.
    """
    where = f"{run.url}/job.yaml"
    stored = parse_job(run.read_job_yaml(), where)
    code = load_trusted_code(run, stored, list_user_references(stored), trust)
    job = override_job(stored, overrides)
    if not trust:
        # Otherwise any module that a library tries to import could come from the job's folder.
        job = job.model_copy(update={"code": None})
        _check_data_url(job, stored, where)
    if digest_tree(compute_identity(job, fingerprint="")) != digest_tree(compute_identity(stored, fingerprint="")):
        raise InputError(
            "an override may not change what was trained", where=f"--set {' '.join(overrides)}", fix="train a new run"
        )
    return job, code
