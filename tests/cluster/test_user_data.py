"""The example jobs on users' data give the same results on Ray workers as in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline import load, train
from pipeline.runs.status import RunStatus
from tests.inference.conftest import JOB_OVERRIDES, REPOSITORY, example_data, job_overrides, train_example

__all__ = ["example_data", "train_example"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and of what it imports

TOLERANCES = {"table": 0.05, "regression": 0.05, "pictures": 0.5, "finetune": 0.1, "examples/own_model/job": 0.05}
"""Relative tolerances of the validation loss, for rounding, and for dropout and batch statistics by rank."""


def check_same_results(
    job: str, workers: int, train_example: Callable[[str], RunStatus], example_data: Path, tmp_path: Path
) -> None:
    settings = {**job_overrides(job, example_data), "scale.workers": workers, "scale.device": "cpu"}
    on_workers = train(REPOSITORY / "jobs" / f"{job}.yaml", set=settings, storage=str(tmp_path))
    single_process = train_example(job)
    assert on_workers.status == "finished"
    assert on_workers.step == single_process.step
    assert set(on_workers.metrics) == set(single_process.metrics)
    assert on_workers.metrics["val/loss"] == pytest.approx(single_process.metrics["val/loss"], rel=TOLERANCES[job])
    assert load(on_workers.url, trust=True).step > 0


def test_tabular_job_on_two_workers(
    cluster: Any, train_example: Callable[[str], RunStatus], example_data: Path, tmp_path: Path
) -> None:
    check_same_results("table", 2, train_example, example_data, tmp_path)


def test_a_table_in_memory_on_two_workers(cluster: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.normal(size=200), "plan": rng.choice(["basic", "pro"], 200)})
    settings = {
        "data.cache.folder": str(tmp_path / "cache"),
        "model": {"kind": "mlp", "hidden": [8]},
        "train.phases.0.epochs": 2,
        "scale.device": "cpu",
    }
    here, on_workers = (
        train(
            frame, (frame["age"] > 0).tolist(), set=settings | {"scale.workers": workers}, storage=str(tmp_path / name)
        )
        for workers, name in ((0, "here"), (2, "workers"))
    )
    assert (on_workers.run, on_workers.step) == (here.run, here.step)
    assert on_workers.metrics["val/loss"] == pytest.approx(here.metrics["val/loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("job", list(JOB_OVERRIDES))
def test_each_job_on_workers(
    cluster: Any, train_example: Callable[[str], RunStatus], example_data: Path, tmp_path: Path, job: str, workers: int
) -> None:
    check_same_results(job, workers, train_example, example_data, tmp_path)
