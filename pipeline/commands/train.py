"""`train`: run a job, or resume its interrupted run."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.run_creation import RunCreation
from pipeline.commands.table_job import is_job, open_table_job
from pipeline.config import IN_PLACE_WORKERS, JobConfig
from pipeline.config.files import resolve_job
from pipeline.context import SingleProcessContext, StopSignals
from pipeline.data.sources import Dataset, fingerprint_dataset
from pipeline.errors import BusyError, InputError, TrainyardError
from pipeline.events import EventHandler, Message, PhaseStarted, RunOpened, WarningMessage, ignore_event
from pipeline.runs.journal.journal import Journal
from pipeline.runs.lease.attempt import probe_lease, refuse_pickled_state
from pipeline.runs.lease.liveness import raise_if_alive
from pipeline.runs.locate import resolve_storage_url
from pipeline.runs.run import Run
from pipeline.runs.status import RunStatus, read_run_status
from pipeline.storage import credentials
from pipeline.user_code import collect_user_code

if TYPE_CHECKING:  # they import torch, which takes longer than finding that there is nothing to do
    from pipeline.setup import PreparedData
    from pipeline.setup.initial_weights import InitialWeights
    from pipeline.trackers.sidecar import TrackerSidecar
    from pipeline.worker import WorkerSpec

TABLE_BASE: dict[str, Any] = {"data": {"features": "auto"}}
"""What the job of a table in memory has in any case."""

NOTHING_TO_DO = "already finished: nothing to do"


def train(
    job: JobConfig | Mapping[str, Any] | str | Path | Any,
    target: Any = None,
    *,
    label: str | Sequence[str] | None = None,
    task: str | Mapping[str, Any] | None = None,
    set: Mapping[str, Any] | Iterable[str] = (),  # noqa: A002 - the public name of the option
    name: str | None = None,
    storage: str | None = None,
    address: str | None = None,
    max_steps: int | None = None,
    allow_code_change: bool = False,
    on_event: EventHandler = ignore_event,
    verbose: bool = False,
) -> RunStatus:
    """Run a job to its end, or resume its run if it exists; or train on a table or arrays in memory.

    A table is written to the cache of the job (`data.cache`) once, named by its content, and trained on as a Parquet
    file: the same table with the same options is the same run.

    It restores the state of the calling process: torch's threads, flags, default dtype and random generators, the
    import path, signal handlers and environment.

    Parameters
    ----------
    job: a job file, its content as a dict (`code` and other paths relative to the working directory), or a `JobConfig`.
        Or data: a data frame of pandas or polars, an Arrow table; a dict of columns or a list of dicts, with `label`;
        an array (N, F) with `target`; or a pair `(data, target)`. Or, with `label`, the URL of a table.
    target: with data, its labels (N,), or (N, T) for a regression: an array, a list or a column of a data frame.
    label: with data, the name of its label column, or for a regression a list of them; with `target`, the name that the
        labels get.
    task: with data, what to predict, as in a job file: "binary", "regression", ... By default it follows from the
        labels, and an event says what was chosen and why.
    set: overrides, as a mapping or as strings `KEY=VALUE`. With data, all that a job file could say is given so; the
        default is the recipe for tables.
    name: name of the run; default: the job's name and the digest of its identity.
    storage: URL of the runs; default: TRAINYARD_STORAGE, else the job's.
    address: the Ray cluster to use instead of a local one; only with workers.
    max_steps: stop after this many steps.
    allow_code_change: resume the run of this `name` although the user code was edited since; the run records the
        changed files.
    on_event: receives events as they happen, see `pipeline.events`.
    verbose: show Ray's log lines too.

    Returns
    -------
    The status of the run: url, status, step, best, metrics, ...

    Raises
    ------
    InputError, WorkError, BusyError, Interrupted: see `pipeline.errors`.
    """
    if allow_code_change and name is None:
        raise InputError(
            "needs --name RUN: without a name, the same command after an edit of the code is a new run",
            where="--allow-code-change",
            fix="add --name RUN, or remove this option",
        )
    overrides = to_override_strings(set) if isinstance(set, Mapping) else list(set)
    opened = (
        nullcontext(resolve_job(job, overrides))
        if is_job(job, target, label=label, task=task)
        else open_table_job(
            job, target, label=label, task=task, base=TABLE_BASE, overrides=overrides, on_event=on_event
        )
    )
    with opened as job, (code := collect_user_code(job)).activated(), _default_torch_settings():
        # The identity of job, code and data determines the run before any data is decoded or torch is imported:
        # the run may be finished, or another process may be writing it.
        root = resolve_storage_url(storage, job.storage)
        initial_weights = _find_initial_weights(job, root)
        fingerprint, dataset = fingerprint_dataset(job, lambda text: on_event(PhaseStarted(text)))
        creation = RunCreation.from_job(
            job,
            code,
            fingerprint=fingerprint,
            initial_weights_digest=initial_weights.digest if initial_weights is not None else None,
            name=name,
            storage_url=root,
            max_steps=max_steps,
            allow_code_change=allow_code_change,
        )
        exists = creation.exists()
        if exists and _is_complete(creation, on_event):
            return read_run_status(creation.run)
        from pipeline.device import restore_torch_settings

        with restore_torch_settings():
            run = _train_run(creation, initial_weights, dataset, exists, on_event, address=address, verbose=verbose)
        return read_run_status(run)


def _is_complete(creation: RunCreation, on_event: EventHandler) -> bool:
    """Return whether the run, which must exist, has finished and no file is missing; emits a message if so.

    Raises
    ------
    BusyError: another process is writing the run.
    InputError: the run was interrupted, and its checkpoints are of an earlier version that this one cannot resume.
    """
    run = creation.run
    if creation.is_complete():
        on_event(RunOpened(run.name, run.url, is_new=False))
        on_event(Message(NOTHING_TO_DO))
        return True
    if probe_lease(run) == "busy":
        raise BusyError("another process is writing this run", where=run.url, fix="`trainyard show` shows its status")
    refuse_pickled_state(run)
    return False


def _train_run(
    creation: RunCreation,
    initial_weights: InitialWeights | None,
    dataset: Dataset | None,
    exists: bool,
    on_event: EventHandler,
    *,
    address: str | None,
    verbose: bool,
) -> Run:
    """Load the data, build the model, and train in this process or on workers.

    Parameters
    ----------
    dataset: the opened dataset, if it was opened for its fingerprint.
    exists: whether the run exists, so that its fitted transforms are reused.
    """
    from pipeline.runs.integrity import is_finalized
    from pipeline.setup import build_training, load_stored_transforms, prepare_data
    from pipeline.trackers.sidecar import TrackerSidecar
    from pipeline.worker import WorkerSpec, run_worker

    job, driver = creation.job, uuid.uuid4().hex
    prepared = prepare_data(
        job,
        creation.max_steps,
        initial_weights=initial_weights,
        dataset=dataset,
        fitted=load_stored_transforms(creation.run) if exists else None,
        on_progress=lambda text: on_event(PhaseStarted(text)),
        code=creation.code,
    )
    if prepared.dataset.fingerprint != creation.fingerprint:  # a user function's arrays had to be kept as float64
        creation = creation.with_fingerprint(prepared.dataset.fingerprint)
        if creation.exists() and _is_complete(creation, on_event):
            return creation.run
    run = creation.run
    in_process = job.scale.workers == IN_PLACE_WORKERS
    # Before the run is created, so that a job that cannot be built leaves no run. Workers build their own model.
    built = build_training(prepared, device_kind="" if in_process else "cpu")
    mismatches = (
        [f"not loaded from {initial_weights.name}: {text}" for text in built.weight_mismatches]
        if initial_weights is not None
        else []
    )
    for text in (*prepared.warnings, *mismatches):
        on_event(WarningMessage(text))
    spec = WorkerSpec(
        job=job,
        storage_url=run.open_url,
        run_name=run.name,
        driver=driver,
        max_steps=creation.max_steps,
        code=creation.code,
        environment=credentials.forwarded_credentials(),
    )
    is_over = probe_lease(run, driver) == "finished"
    with StopSignals() as signals, TrackerSidecar(run, job.follow, on_event) as trackers:
        if not in_process and not is_over:
            _train_on_cluster(spec, creation, prepared, trackers, on_event, signals, address, verbose)
            return run
        creation.find_or_create(prepared, on_event)
        if is_over and is_finalized(run):  # only its splits or code were missing, or an earlier version made it
            on_event(Message(NOTHING_TO_DO))
            return run
        trackers.start()
        spec = replace(spec, code_changes=creation.code_changes)
        context = SingleProcessContext(on_event, signals)
        run_worker(spec, context, prepared=prepared, built=built if in_process else None)
    return run


def _train_on_cluster(
    spec: WorkerSpec,
    creation: RunCreation,
    prepared: PreparedData,
    trackers: TrackerSidecar,
    on_event: EventHandler,
    signals: StopSignals,
    address: str | None,
    verbose: bool,
) -> None:
    """Train on Ray Train workers, and record the reason of a failure that the workers could not record themselves."""
    from pipeline.cluster.driver import train_on_workers
    from pipeline.worker import record_driver_exit

    run = creation.run

    def create_run() -> tuple[WorkerSpec, Journal]:
        creation.find_or_create(prepared, on_event)
        raise_if_alive(run, spec.driver)  # before starting workers, or waiting for them
        trackers.start()
        return replace(spec, code_changes=creation.code_changes), run.journal

    scale = spec.job.scale
    try:
        train_on_workers(
            create_run, scale, on_event, signals, storage_url=run.open_url, address=address, verbose=verbose
        )
    except TrainyardError as error:
        record_driver_exit(run, spec, error)
        raise


def _default_torch_settings() -> AbstractContextManager[None]:
    """Return a context manager with torch's default settings, which restores them at exit; it does nothing if torch is
    not imported."""
    if "torch" not in sys.modules:
        return nullcontext()
    from pipeline.device import restore_torch_settings

    return restore_torch_settings()


def _find_initial_weights(job: JobConfig, storage_url: str) -> InitialWeights | None:
    if job.model.init_from is None and getattr(job.model, "weights", None) is None:
        return None
    from pipeline.setup.initial_weights import find_initial_weights  # it imports torch

    return find_initial_weights(job, storage_url)


def to_override_strings(overrides: Mapping[str, Any]) -> list[str]:
    """Convert overrides to `KEY=VALUE` strings, with values in JSON: it is YAML, and distinguishes text, numbers and
    null."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
