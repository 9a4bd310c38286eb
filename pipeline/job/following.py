"""`follow:` who else is told of a run."""

from __future__ import annotations

from typing import Literal

TrackerName = Literal["tensorboard", "mlflow"]
"""An experiment tracker that gets the metrics of a run; the field `follow` of the job documents each."""
