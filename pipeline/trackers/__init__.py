"""Followers: TensorBoard and MLflow, fed from a run's metric log in storage, never from the training itself.

A follower reads whole cells and knows by itself which of them it has told already, so that it can stop at any moment,
start again anywhere, and catch up after an outage or with a run that is long over. The live rows, which no cell holds
yet, it shows apart from these.
"""

from __future__ import annotations

from typing import Protocol

from pipeline.config.job import TrackerName as TrackerName
from pipeline.trackers.metric_reader import MetricLogReader, MetricLogView

__all__ = ["Tracker", "MetricLogReader", "TrackerName", "create_tracker"]


class Tracker(Protocol):
    """Tells one place of one run."""

    name: TrackerName
    location: str
    """Printable: what to point the other tool at."""

    def catch_up(self, log: MetricLogReader, view: MetricLogView) -> int:
        """Tell what was not told yet of what is there; how many cells that were.

        Raises
        ------
        WorkError: something is away now; the next call goes on where this one stopped.
        InputError: it will not work until a person does something.
        """


def create_tracker(name: TrackerName, log: MetricLogReader) -> Tracker:
    """The follower of this name, for the run of `log`.

    Raises
    ------
    InputError: its library is not installed, or nothing says where to send to.
    """
    if name == "mlflow":
        from pipeline.trackers.mlflow import MlflowTracker

        return MlflowTracker(log)
    from pipeline.trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker(log)
