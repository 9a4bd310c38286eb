"""`follow:` who else is told of a run."""

from __future__ import annotations

from typing import Literal

Follower = Literal["tensorboard", "mlflow"]
