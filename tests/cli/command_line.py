"""A small job for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

RunCommand = Callable[..., Any]

SMALL_JOB: dict[str, Any] = {
    "name": "small",
    "data": {"source": "disc", "normalize": "scalar", "splits": {"val": 0.2}},
    "model": {"kind": "mlp", "hidden": [16]},
    "train": {"batch_size": 100, "phases": [{"epochs": 3, "lr": 0.1}]},
}
"""24 steps in 3 epochs of 800 rows."""


def write_job(folder: Path, **changes: Any) -> str:
    """Write SMALL with changes as `small.yaml`; its path."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL_JOB, **changes}))
    return str(path)
