"""Log to an MLflow tracking server: one MLflow run per run, in batches that can safely be sent again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.config.files import parse_job
from pipeline.config.job import TrackerName
from pipeline.errors import InputError, WorkError
from pipeline.redaction import redact
from pipeline.runs.run import JOB_FILE
from pipeline.storage.retry import summarize_error
from pipeline.trackers.metric_reader import TRAIN_STEPS_SPLIT, LiveRows, MetricLogReader, MetricLogView, MetricRow

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

RUN_ID_TAG = "trainyard.id"
"""Tag that identifies the MLflow run of a run: a digest of its creation, so the same from every machine."""
POSITION_TAG = "trainyard.position"
"""Tag `segment/metrics`: all earlier segments and this many metrics of this one are logged. It is sent with the last of
them."""
LIVE_PREFIX = "live/"
"""Prefix for metrics of live rows. They are separate because MLflow cannot delete values, and a resume may revoke these
rows."""
METRICS_PER_REQUEST = 1000
"""MLflow's limit on metrics per request."""
PARAMS_PER_REQUEST = 100
"""MLflow's limit on parameters per request."""
MAX_PARAM_LENGTH = 500
"""Characters of a parameter that all versions of MLflow accept."""

STATUSES = {
    "running": "RUNNING",
    "stalled": "RUNNING",
    "interrupted": "KILLED",
    "failed": "FAILED",
    "finished": "FINISHED",
}
"""Statuses of a run, and MLflow's statuses for them."""

DEFAULT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow would retry for minutes; the command `follow` has its own retries
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow's environment variables, if the user did not set them."""
_PERMISSION_ERROR_CODES = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")


class MlflowTracker:
    """Logs parameters, metrics and the outcome to the server that MLFLOW_TRACKING_URI names, in the experiment of
    MLFLOW_EXPERIMENT_NAME, or else one with the job's name.

    Live rows are logged as separate metrics, `live/loss` and `live/val/loss`, which stay when the committed rows are
    logged.
    """

    name: TrackerName = "mlflow"
    location_hint = "at"

    def __init__(self, log: MetricLogReader) -> None:
        for key, value in DEFAULT_SETTINGS.items():
            os.environ.setdefault(key, value)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise InputError(
                "no tracking server is named",
                where="follow: mlflow",
                fix="set MLFLOW_TRACKING_URI, such as http://host:5000, where the run is started",
            )
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise InputError(
                "mlflow is not installed", where="follow: mlflow", fix="pip install 'trainyard[mlflow]'"
            ) from None
        for noisy in ("mlflow", "urllib3", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self.location = redact(uri)
        self._client = MlflowClient(tracking_uri=uri)
        self._id = hashlib.sha256(log.run.read_job_yaml().encode()).hexdigest()[:32]  # its first line holds a nonce
        self._run_id = ""
        self._status = ""
        self._segment = self._num_sent = 0
        self._live_attempt = 0
        self._live_sent: dict[str, int] = {}
        """Last step by split."""

    def catch_up(self, log: MetricLogReader, view: MetricLogView) -> int:
        """See `Tracker`. Timestamps and steps come from the log, so a batch sent twice, after a lost reply, is the
        same."""
        with self._translate_errors():
            if not self._run_id:
                self._find_or_create_run(log)
            num_segments = 0
            for segment in view.segments:
                if segment >= self._segment:
                    self._log_segment(segment, log.read_rows(segment))
                    num_segments += 1
            self._log_live(view.live)
            self._set_status(STATUSES[view.status])
            return num_segments

    def _find_or_create_run(self, log: MetricLogReader) -> None:
        """Find the MLflow run of this run, or create it."""
        from mlflow.entities import Param, RunTag

        job = parse_job(log.run.read_job_yaml(), f"{log.run.url}/{JOB_FILE}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or job.name
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        existing_runs = self._client.search_runs(
            [experiment_id], f"tags.`{RUN_ID_TAG}` = '{self._id}'", order_by=["start_time ASC"]
        )
        run: Run | None = existing_runs[0] if existing_runs else None
        if run is None:
            tags = {RUN_ID_TAG: self._id, "trainyard.run": log.run.name, "trainyard.url": redact(log.run.url)}
            run = self._client.create_run(experiment_id, tags=tags, run_name=log.run.name)
        segment, _, sent = run.data.tags.get(POSITION_TAG, "").partition("/")
        if not sent:  # a kill may have come between the creation of the MLflow run and its parameters
            params = [Param(key, value) for key, value in flatten_params(job.to_dict())]
            for first in range(0, len(params), PARAMS_PER_REQUEST):
                self._client.log_batch(run.info.run_id, params=params[first : first + PARAMS_PER_REQUEST])
            self._client.log_batch(run.info.run_id, tags=[RunTag(POSITION_TAG, "0/0")])
        self._segment, self._num_sent = int(segment or 0), int(sent or 0)
        self._run_id, self._status = run.info.run_id, run.info.status

    def _log_segment(self, segment: int, rows: list[MetricRow]) -> None:
        from mlflow.entities import RunTag

        metrics = list(_iter_metrics(rows))
        for first in range(self._num_sent, len(metrics), METRICS_PER_REQUEST):
            batch = metrics[first : first + METRICS_PER_REQUEST]
            position = f"{segment}/{first + len(batch)}"
            self._client.log_batch(self._run_id, metrics=batch, tags=[RunTag(POSITION_TAG, position)])
            self._num_sent = first + len(batch)
        self._segment, self._num_sent = segment + 1, 0

    def _log_live(self, live: LiveRows) -> None:
        if live.attempt != self._live_attempt:
            self._live_attempt, self._live_sent = live.attempt, {}
        new = [row for row in live.rows if row.step > self._live_sent.get(row.split, -1)]
        metrics = list(_iter_metrics(new, LIVE_PREFIX))
        for first in range(0, len(metrics), METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + METRICS_PER_REQUEST])
        self._live_sent |= {row.split: row.step for row in new}

    def _set_status(self, status: str) -> None:
        if status == self._status:
            return
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status=status)
        self._status = status

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            text = _summarize_root_cause(error)
            if error.error_code in _PERMISSION_ERROR_CODES:
                fix = "see MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and MLFLOW_TRACKING_TOKEN"
                raise InputError(f"not allowed ({text})", where=self.location, fix=fix) from None
            raise WorkError(text, where=self.location) from None


def _summarize_root_cause(error: BaseException) -> str:
    """Return the root cause of an error in one line: MLflow wraps errors of requests, which wrap those of urllib3."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return summarize_error(error)


def _iter_metrics(rows: list[MetricRow], name_prefix: str = "") -> Iterator[Metric]:
    """Yield each value once: `loss` of a training step, `val/loss` of an evaluation."""
    from mlflow.entities import Metric

    for row in rows:
        prefix = name_prefix + ("" if row.split == TRAIN_STEPS_SPLIT else f"{row.split}/")
        for name, value in row.values.items():
            yield Metric(prefix + name, value, int(row.time * 1000), row.step)


def flatten_params(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and text of each leaf of a job, such as `train.phases.0.lr` and `0.5`, without secrets."""
    if isinstance(tree, (dict, list)) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from flatten_params(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, redact(str(tree))[:MAX_PARAM_LENGTH]
