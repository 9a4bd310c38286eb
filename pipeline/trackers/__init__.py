"""Experiment trackers: TensorBoard and MLflow, fed from a run's metric log in storage, never by the training process.

A tracker reads complete segments and finds out by itself which of them it has logged, so it can stop at any time, start
again anywhere, and catch up after an outage or with a run that has long finished. It logs the live rows, which no
segment holds yet, separately.

To add a tracker: write its module here, with a class as `Tracker` describes it; add its factory to `_TRACKERS`, and its
name to `TrackerName` in pipeline/config/job.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pipeline.config.job import TrackerName as TrackerName
from pipeline.trackers.metric_reader import MetricLogReader, MetricLogView

__all__ = ["Tracker", "MetricLogReader", "TrackerName", "create_tracker"]


class Tracker(Protocol):
    """Logs one run to one destination."""

    name: TrackerName
    location: str
    """The destination, without secrets: where the other tool finds the run."""
    location_hint: str
    """What precedes `location` in the result line, such as the command that opens it."""

    def catch_up(self, log: MetricLogReader, view: MetricLogView) -> int:
        """Log what is in `view` and not logged yet. Returns the number of new segments.

        Raises
        ------
        WorkError: the destination cannot be used now; the next call continues where this one stopped.
        InputError: it cannot be used until the user does something.
        """


def create_tracker(name: TrackerName, log: MetricLogReader) -> Tracker:
    """Create the tracker of this name for the run of `log`.

    Raises
    ------
    InputError: its library is not installed, or its destination is not configured.
    """
    return _TRACKERS[name](log)


def _create_tensorboard(log: MetricLogReader) -> Tracker:
    from pipeline.trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker(log)


def _create_mlflow(log: MetricLogReader) -> Tracker:
    from pipeline.trackers.mlflow import MlflowTracker

    return MlflowTracker(log)


_TRACKERS: dict[TrackerName, Callable[[MetricLogReader], Tracker]] = {
    "tensorboard": _create_tensorboard,
    "mlflow": _create_mlflow,
}
"""Factories by name. They import a tracker's module only when it is used."""
