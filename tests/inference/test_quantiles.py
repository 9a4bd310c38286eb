"""A quantile regression from the table to the predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.config.files import build_job
from pipeline.runs.status import RunStatus


def train_quantiles(folder: Path, quantiles: list[float], **changes: Any) -> tuple[RunStatus, pd.DataFrame]:
    """Train on 3000 rows whose spread grows with x."""
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 1, 3000)
    frame = pd.DataFrame({"x": x, "y": 100 + 10 * x + (0.1 + x) * generator.normal(size=3000)})
    frame.to_parquet(folder / "t.parquet")
    tree = {
        "name": "t",
        "data": {"source": "parquet", "url": str(folder / "t.parquet"), "label": "y", "splits": {"val": 0.3}},
        "model": {"kind": "mlp", "hidden": [16]},
        "task": {"kind": "regression", "quantiles": quantiles},
        "train": {"batch_size": 60, "optimizer": {"kind": "adam"}, "phases": [{"epochs": 12, "lr": 0.01}]},
    }
    return train(build_job({**tree, **changes}, "test"), storage=str(folder / "runs")), frame


def test_quantiles_cover_as_many_rows_as_they_say(tmp_path: Path) -> None:
    run, frame = train_quantiles(tmp_path, [0.1, 0.5, 0.9], best={"metric": "val/pinball"})
    assert run.best is not None
    assert run.best.mode == "min"
    metrics = evaluate(run.url).metrics
    assert metrics["val/coverage"] == pytest.approx(0.8, abs=0.04)
    assert metrics["val/coverage_q10"] == pytest.approx(0.1, abs=0.04)
    assert metrics["val/coverage_q90"] == pytest.approx(0.9, abs=0.04)
    assert metrics["val/rmse"] < metrics["val/baseline_rmse"]
    model = load(run.url)
    values = model.predict(frame)
    assert values.shape == (3000, 3)
    assert (np.diff(values) >= 0).all()
    width = values[:, 2] - values[:, 0]
    assert width[frame.x > 0.9].mean() > 2 * width[frame.x < 0.3].mean(), "the interval follows the spread"
    predict(run.url, input=str(tmp_path / "t.parquet"), output=str(tmp_path / "out.parquet"))
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.schema.names == ["prediction", "prediction_q10", "prediction_q50", "prediction_q90"]
    np.testing.assert_allclose(np.column_stack(written.columns[1:]), values)
    np.testing.assert_array_equal(written["prediction"], written["prediction_q50"])


def test_crossing_outputs_are_sorted(tmp_path: Path) -> None:
    run, frame = train_quantiles(tmp_path, [0.45, 0.5, 0.55], train={"phases": [{"epochs": 1, "lr": 1e-6}]})
    model = load(run.url)
    values = model.predict(frame)
    assert (np.diff(values) >= 0).all()
    raw = (
        model(torch.tensor(frame[["x"]].to_numpy(), dtype=torch.float32)).detach().numpy()
        * model.fitted.target_transform.std
    )
    assert (np.diff(raw) < 0).any()
    np.testing.assert_allclose(values, np.sort(raw, 1) + model.fitted.target_transform.mean, rtol=1e-5)


def test_single_quantile_and_no_median(tmp_path: Path) -> None:
    run, frame = train_quantiles(tmp_path, [0.975], task={"kind": "regression", "quantiles": [0.975]})
    assert load(run.url).predict(frame).shape == (3000,)
    predict(run.url, input=str(tmp_path / "t.parquet"), output=str(tmp_path / "out.parquet"))
    assert pq.read_table(tmp_path / "out.parquet").schema.names == ["prediction_q97_5"]
    assert set(run.metrics) == {"val/loss", "val/pinball", "val/coverage_q97_5"}


def test_ensemble_of_quantiles(tmp_path: Path) -> None:
    model = {"kind": "mlp", "hidden": [8], "ensemble": 3}
    run, frame = train_quantiles(tmp_path, [0.1, 0.9], model=model)
    values = load(run.url).predict(frame)
    assert (np.diff(values) >= 0).all()
    predict(run.url, input=str(tmp_path / "t.parquet"), output=str(tmp_path / "out.parquet"))
    names = [f"{what}_{name}" for what in ("prediction", "uncertainty") for name in ("q10", "q90")]
    assert pq.read_table(tmp_path / "out.parquet").schema.names == names
