"""`follow:` who else is told of a run."""

from __future__ import annotations

from typing import Literal

Follower = Literal["tensorboard", "mlflow"]
"""tensorboard: event files in the run's folder. mlflow: the server that MLFLOW_TRACKING_URI names, and the experiment
of MLFLOW_EXPERIMENT_NAME or else of the job's name."""
