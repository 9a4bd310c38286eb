"""The example data, and the shipped jobs trained on it once for all tests of inference."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import train
from pipeline.runs.status import RunStatus

REPOSITORY = Path(__file__).parents[2]
SHORT_TRAINING = {"train.phases.0.epochs": 2}

JOB_OVERRIDES: dict[str, dict[str, Any]] = {
    "table": {"data.url": "{data}/churn.parquet", **SHORT_TRAINING},
    "regression": {"data.url": "{data}/houses.parquet", "train.phases.0.epochs": 4},
    "pictures": {"data.url": "{data}/shapes", **SHORT_TRAINING},
    "finetune": {"data.url": "{data}/shapes", "model.weights": "{data}/resnet18.pth", "train.phases.0.epochs": 1},
    "examples/own_model/job": SHORT_TRAINING,
}
"""Settings that make each shipped job small and let it run without a network."""


@pytest.fixture(scope="session")
def example_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller data of `jobs/examples/example_data.py`, and weights of a ResNet-18 in torchvision's format."""
    import torch
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("examples")
    make = runpy.run_path(str(REPOSITORY / "jobs" / "examples" / "example_data.py"))
    make["churn"](folder, 1200)
    make["houses"](folder, 800)
    make["shapes"](folder, 30)
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    return folder


def job_overrides(job: str, example_data: Path) -> dict[str, Any]:
    """Return settings for a shipped job: its data, and fewer epochs."""
    return {
        key: value.format(data=example_data) if isinstance(value, str) else value
        for key, value in JOB_OVERRIDES[job].items()
    }


@pytest.fixture(scope="session")
def train_example(example_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunStatus]:
    """Return a function that trains a shipped job in this process, once, and returns its run."""
    made: dict[str, RunStatus] = {}
    storage = tmp_path_factory.mktemp("runs")

    def of(job: str) -> RunStatus:
        if job not in made:
            path = REPOSITORY / "jobs" / f"{job}.yaml"
            made[job] = train(path, set=job_overrides(job, example_data), storage=str(storage))
        return made[job]

    return of
