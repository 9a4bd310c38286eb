"""MLflow's tracking server: one of its runs for each of ours, in batches that can be sent again without harm."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, WorkError
from pipeline.followers.log import TRAIN_STEPS, LiveRows, Look, MetricLog, Row
from pipeline.job.following import Follower
from pipeline.job_file import parse_job
from pipeline.record.run import JOB
from pipeline.redaction import scrub
from pipeline.storage.faults import explain

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

TAG = "trainyard.id"
"""Tells which of MLflow's runs is this one: a digest of its birth, so the same wherever it is looked at from."""
POSITION = "trainyard.position"
"""Tag: `cell/metrics`, all cells below and so many metrics of this one are there. It travels with the last of them."""
LIVE = "live/"
"""How metrics of live rows begin: what MLflow was told stays, and a resume may take these back."""
BATCH = 1000
"""Metrics a request, MLflow's limit."""
PARAMS = 100
"""Parameters a request, likewise."""
LONGEST = 500
"""Letters of a parameter that every version of MLflow takes."""

STATUSES = {
    "running": "RUNNING",
    "stalled": "RUNNING",
    "interrupted": "KILLED",
    "failed": "FAILED",
    "finished": "FINISHED",
}
"""Ours, as MLflow's."""

QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # it would try for minutes; whoever follows tries again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow's settings where the user set none."""
_NOT_ALLOWED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")


class ToMlflow:
    """Sends parameters, metrics and the outcome to the server that MLFLOW_TRACKING_URI names, into the experiment of
    MLFLOW_EXPERIMENT_NAME, or else of the job's name.

    Live rows go there as metrics of their own, `live/loss` and `live/val/loss`, and stay when the exact ones have come.
    """

    name: Follower = "mlflow"

    def __init__(self, log: MetricLog) -> None:
        for key, value in QUIET.items():
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
        self.where = scrub(uri)
        self._client = MlflowClient(tracking_uri=uri)
        self._id = hashlib.sha256(log.run.job_yaml().encode()).hexdigest()[:32]  # its first line holds a nonce
        self._run_id = ""
        self._status = ""
        self._cell = self._sent = 0
        self._live_attempt = 0
        self._live_sent: dict[str, int] = {}
        """By split: the last step."""

    def catch_up(self, log: MetricLog, look: Look) -> int:
        """See `Follower`. Timestamps and steps are the log's: what is sent twice, after a lost reply, is the same."""
        with self._explained():
            if not self._run_id:
                self._find(log)
            num_segments = 0
            for segment in look.cells:
                if segment >= self._cell:
                    self._send(segment, log.rows(segment))
                    num_segments += 1
            self._send_live(look.live)
            self._tell(STATUSES[look.status])
            return num_segments

    def _find(self, log: MetricLog) -> None:
        """Take up MLflow's run for this one, or make it."""
        from mlflow.entities import Param, RunTag

        job = parse_job(log.run.job_yaml(), f"{log.run.url}/{JOB}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or job.name
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        existing_runs = self._client.search_runs([experiment_id], f"tags.`{TAG}` = '{self._id}'", order_by=["start_time ASC"])
        run: Run | None = existing_runs[0] if existing_runs else None
        if run is None:
            tags = {TAG: self._id, "trainyard.run": log.run.name, "trainyard.url": scrub(log.run.url)}
            run = self._client.create_run(experiment_id, tags=tags, run_name=log.run.name)
        segment, _, sent = run.data.tags.get(POSITION, "").partition("/")
        if not sent:  # a kill may have come between the birth of MLflow's run and its parameters
            params = [Param(key, value) for key, value in flat(job.resolved())]
            for first in range(0, len(params), PARAMS):
                self._client.log_batch(run.info.run_id, params=params[first : first + PARAMS])
            self._client.log_batch(run.info.run_id, tags=[RunTag(POSITION, "0/0")])
        self._cell, self._sent = int(segment or 0), int(sent or 0)
        self._run_id, self._status = run.info.run_id, run.info.status

    def _send(self, cell: int, rows: list[Row]) -> None:
        from mlflow.entities import RunTag

        metrics = list(_metrics(rows))
        for first in range(self._sent, len(metrics), BATCH):
            batch = metrics[first : first + BATCH]
            position = f"{cell}/{first + len(batch)}"
            self._client.log_batch(self._run_id, metrics=batch, tags=[RunTag(POSITION, position)])
            self._sent = first + len(batch)
        self._cell, self._sent = cell + 1, 0

    def _send_live(self, live: LiveRows) -> None:
        if live.attempt != self._live_attempt:
            self._live_attempt, self._live_sent = live.attempt, {}
        new = [row for row in live.rows if row.step > self._live_sent.get(row.split, -1)]
        metrics = list(_metrics(new, LIVE))
        for first in range(0, len(metrics), BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + BATCH])
        self._live_sent |= {row.split: row.step for row in new}

    def _tell(self, status: str) -> None:
        if status == self._status:
            return
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status=status)
        self._status = status

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            text = _reason(error)
            if error.error_code in _NOT_ALLOWED:
                fix = "see MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and MLFLOW_TRACKING_TOKEN"
                raise InputError(f"not allowed ({text})", where=self.where, fix=fix) from None
            raise WorkError(text, where=self.where) from None


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error, in one line: MLflow wraps those of requests, which wrap those of urllib3."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return explain(error)


def _metrics(rows: list[Row], before: str = "") -> Iterator[Metric]:
    """Each value once: `loss` of a training step, `val/loss` of an evaluation."""
    from mlflow.entities import Metric

    for row in rows:
        prefix = before + ("" if row.split == TRAIN_STEPS else f"{row.split}/")
        for name, value in row.values.items():
            yield Metric(prefix + name, value, int(row.time * 1000), row.step)


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`train.phases.0.lr: 0.5` for each leaf of a job, without secrets."""
    if isinstance(tree, (dict, list)) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, scrub(str(tree))[:LONGEST]
