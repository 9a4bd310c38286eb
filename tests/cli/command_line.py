"""A small job for the tests of the command line, and the result of a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class CompletedCommand:
    """The exit code and the output of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        tree: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return tree


RunCommand = Callable[..., CompletedCommand]

SMALL_JOB: dict[str, Any] = {
    "name": "small",
    "data": {"source": "disc", "normalize": "scalar", "splits": {"val": 0.2}},
    "model": {"kind": "mlp", "hidden": [16]},
    "train": {"batch_size": 100, "phases": [{"epochs": 3, "lr": 0.1}]},
}
"""24 steps in 3 epochs of 800 samples."""


def write_job(folder: Path, **changes: Any) -> str:
    """Write `SMALL_JOB` with changes as `small.yaml`, and return its path."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL_JOB, **changes}))
    return str(path)
