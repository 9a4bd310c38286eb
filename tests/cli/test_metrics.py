"""Metrics and losses, of the task and custom ones, from a job file to the metric log and the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline import load
from pipeline.config import METRICS
from tests.cli.command_line import RunCommand, write_job

USER_MODULE = """
import numpy as np
import torch

def cost(probabilities, labels):
    return np.mean((probabilities > 0.5) != labels)

def fails(probabilities, labels):
    raise ValueError("no cost today")

def focal(outputs, targets):
    margin = outputs[:, 0] * (2 * targets - 1)
    return torch.sigmoid(-margin) ** 2 * torch.nn.functional.softplus(-margin)

def total(outputs, targets):
    return outputs.sum()
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a user module in the working directory."""
    (tmp_path / "user_cost_metric.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "user_cost_metric"


def test_custom_loss_and_metric_with_another_selection_metric(
    trainyard: RunCommand, tmp_path: Path, user_module: str
) -> None:
    job = write_job(
        tmp_path,
        task={"kind": "binary", "loss": f"{user_module}:focal"},
        metrics=[f"{user_module}:cost"],
        best={"metric": "val/auc"},
    )
    ended = trainyard("train", job, "--json")
    assert ended.exit_code == 0, ended.stderr
    result = ended.json
    assert set(result["metrics"]) == {f"val/{name}" for name in (*METRICS["binary"], "cost")}
    rows = pd.read_parquet(Path(result["url"]) / "metrics/evals").sort_values("step")
    assert [row for row in rows if row in METRICS["binary"]] == [*METRICS["binary"]]
    assert (rows["cost"] - (1 - rows["accuracy"])).abs().max() < 1e-12
    best = rows[rows["step"] > 0].sort_values(["auc", "step"], ascending=[False, True]).iloc[0]
    assert (result["best"]["step"], result["best"]["value"]) == (best["step"], best["auc"])
    assert result["best"]["metrics"]["val/cost"] == best["cost"]
    evaluation_lines = [line for line in ended.stderr.splitlines() if line.startswith("epoch")]
    assert all("val loss " in line and "  auc " in line and "cost" not in line for line in evaluation_lines)
    shown = trainyard("show", result["run"]).stdout
    assert f"best      val/auc {best['auc']:.4f} at step {best['step']}" in shown
    assert f"(majority class: {best['baseline_accuracy']:.4f})" in shown
    evaluated = trainyard("evaluate", result["run"], "--trust", "--json").json["metrics"]
    assert evaluated["val/cost"] == best["cost"]
    text = trainyard("evaluate", result["run"], "--trust").stdout
    assert f"cost               {best['cost']:.4f}" in text
    assert "of 200 samples correct" in text


def test_custom_metric_with_the_name_of_a_later_metric_takes_its_place(
    trainyard: RunCommand, tmp_path: Path, user_module: str
) -> None:
    module = tmp_path / f"{user_module}.py"
    module.write_text(module.read_text() + "\ndef recall(probabilities, labels):\n    return 7.0\n")
    job = write_job(
        tmp_path, task="binary", metrics=[f"{user_module}:recall"], best={"metric": "val/recall", "mode": "max"}
    )
    ended = trainyard("train", job, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert ended.json["metrics"]["val/recall"] == 7.0
    assert (pd.read_parquet(Path(ended.json["url"]) / "metrics/evals")["recall"] == 7.0).all()


def test_best_checkpoint_by_the_recall_of_one_class(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(tmp_path, best={"metric": "val/recall_inside", "mode": "max"})
    ended = trainyard("train", job, "--json")
    assert ended.exit_code == 0, ended.stderr
    rows = pd.read_parquet(Path(ended.json["url"]) / "metrics/evals")
    assert ended.json["best"]["value"] == rows[rows["step"] > 0]["recall_inside"].max()
    lines = [line.split() for line in trainyard("evaluate", ended.json["run"]).stdout.splitlines()]
    best = rows[rows["step"] == ended.json["best"]["step"]].iloc[0]
    table = [
        [name, f"{best[f'recall_{name}']:.4f}", f"{best[f'precision_{name}']:.4f}"] for name in ("outside", "inside")
    ]
    header = lines.index(["class", "recall", "precision"])
    assert lines[header + 1 : header + 3] == table
    unknown = trainyard("train", write_job(tmp_path, best={"metric": "val/recall_upside", "mode": "max"}))
    assert unknown.exit_code == 2
    assert "val/recall_upside is not measured" in unknown.stderr
    assert "recall_inside" in unknown.stderr


def test_regression_reports_errors_and_no_accuracy(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(tmp_path, task={"kind": "regression", "loss": "huber"}, best={"metric": "val/r2"})
    result = trainyard("train", job, "--json").json
    rows = pd.read_parquet(Path(result["url"]) / "metrics/evals")
    assert rows["accuracy"].isna().all()
    assert rows["rmse"].notna().all()
    assert result["best"]["value"] == rows[rows["step"] > 0]["r2"].max()
    text = trainyard("evaluate", result["run"]).stdout
    assert "val: 200 samples\n" in text
    assert "(always the mean: " in text


def test_metrics_of_each_target_are_in_its_unit(trainyard: RunCommand, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    frame = pd.DataFrame({"x": x, "temp (°C)": 15 + 8 * x, "hPa": 1013 + 4000 * rng.normal(size=200)})
    frame.to_parquet(tmp_path / "t.parquet")
    data = {"source": "parquet", "url": str(tmp_path / "t.parquet"), "label": ["temp (°C)", "hPa"]}
    best = {"metric": "val/rmse_temp_C", "mode": "min"}
    job = write_job(tmp_path, data=data, task="regression", model={"hidden": []}, best=best)
    result = trainyard("train", job, "--json").json
    rows = pd.read_parquet(Path(result["url"]) / "metrics/evals")
    assert result["best"]["value"] == rows[rows["step"] > 0]["rmse_temp_C"].min()
    model, held = load(result["url"]), pd.read_parquet(Path(result["url"]) / "splits.parquet")
    val, train = (frame.iloc[held[held["split"] == split]["row"]] for split in ("val", "train"))
    errors = model.predict(val) - val[["temp (°C)", "hPa"]].to_numpy()
    rmse = np.sqrt((errors**2).mean(0))
    measured = trainyard("evaluate", result["run"], "--json").json["metrics"]
    assert [measured["val/rmse_temp_C"], measured["val/rmse_hPa"]] == pytest.approx(rmse.tolist(), rel=1e-5)
    stds = train[["temp (°C)", "hPa"]].to_numpy().std(0)
    assert measured["val/rmse"] == pytest.approx(float((rmse / stds).mean()), rel=1e-5)
    assert "in standard deviations; always the mean" in trainyard("evaluate", result["run"]).stdout
    for metric, options in (("val/rmse_0", {"data": data}), ("val/rmse_1", {})):
        best["metric"] = metric
        refused = trainyard("train", write_job(tmp_path, task="regression", best=best, **options))
        assert refused.exit_code == 2
        assert f"{metric} is not measured" in refused.stderr


def test_collapsed_model_is_reported(trainyard: RunCommand, tmp_path: Path) -> None:
    phases = [{"steps": 1, "lr": 1e-9}]
    ended = trainyard("train", write_job(tmp_path, task="regression", train={"phases": phases}))
    assert ended.exit_code == 0, ended.stderr
    assert "  warning   on val no better than always answering the mean of the training targets" in ended.stdout


def test_failing_custom_metric_stops_before_training(trainyard: RunCommand, tmp_path: Path, user_module: str) -> None:
    ended = trainyard("train", write_job(tmp_path, task="binary", metrics=[f"{user_module}:fails"]))
    assert ended.exit_code == 2
    assert f"metrics: {user_module}:fails: ValueError: no cost today" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_unusable_custom_loss_leaves_no_run(trainyard: RunCommand, tmp_path: Path, user_module: str) -> None:
    ended = trainyard("train", write_job(tmp_path, task={"kind": "binary", "loss": f"{user_module}:total"}))
    assert ended.exit_code == 2
    assert f"task.loss: {user_module}:total: returns ()" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_class_weights_are_given_by_name(trainyard: RunCommand, tmp_path: Path) -> None:
    stray = trainyard("train", write_job(tmp_path, task={"class_weights": {"9": 2.0}}))
    assert stray.exit_code == 2
    assert "task.class_weights" in stray.stderr


def test_large_split_is_reported_before_training(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.metric_accumulator.MAX_GATHERED_VALUES", 399)
    ended = trainyard("train", write_job(tmp_path, task="binary"), "--json")
    assert "warning: val has 200 samples, too many for auc" in ended.stderr
    assert pd.read_parquet(Path(ended.json["url"]) / "metrics/evals")["auc"].isna().all()
    refused = trainyard("train", write_job(tmp_path, task="binary", best={"metric": "val/auc"}))
    assert refused.exit_code == 2
    assert "set evaluate.limit to 199" in refused.stderr
    bounded = write_job(tmp_path, task="binary", best={"metric": "val/auc"}, evaluate={"limit": 199})
    assert trainyard("train", bounded).exit_code == 0


SORTED_DATA_MODULE = """
import numpy as np

def rows():
    labels = np.repeat([0, 1, 2], [300, 90, 10])
    return np.random.default_rng(0).normal(size=(400, 2)).astype("float32"), labels
"""


@pytest.mark.parametrize("split", ["train", "val"])
def test_limited_evaluation_uses_a_representative_sample(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    (tmp_path / "samples_sorted_by_class.py").write_text(SORTED_DATA_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    job = write_job(
        tmp_path,
        data={"source": {"call": "samples_sorted_by_class:rows"}, "splits": {"val": 0.5, "stratify": True}},
        evaluate={"limit": 40, "splits": [split]},
        best={"metric": f"{split}/loss"},
    )
    result = trainyard("train", job, "--json").json
    metrics, whole = result["metrics"], trainyard("evaluate", result["run"], "--split", split, "--trust", "--json").json
    assert metrics[f"{split}/baseline_accuracy"] == whole["metrics"][f"{split}/baseline_accuracy"] == 0.75
    rows = pd.read_parquet(Path(result["url"]) / "metrics/evals")
    assert (rows["samples"] == 40).all()
    assert set(rows["baseline_accuracy"]) == {0.75}, "every evaluation uses the same samples"
