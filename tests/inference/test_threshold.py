"""A decision threshold that is chosen on validation: stored with each checkpoint, used by `load`, `predict` and
`evaluate`."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.config import JobConfig, ThresholdConfig
from pipeline.config.files import build_job
from pipeline.errors import JobError
from pipeline.runs.status import RunStatus
from pipeline.training.threshold import choose_threshold


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    """600 rows, of which about 8 % are of the class `yes`; the last 200 are for validation."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(600, 2))
    label = generator.random(600) < 1 / (1 + np.exp(4 - 2 * x[:, 0]))
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "y": np.where(label, "yes", "no")})
    frame.to_parquet(tmp_path / "t.parquet")
    return frame


def make_job(folder: Path, threshold: Any, **changes: Any) -> JobConfig:
    data = {"source": "parquet", "url": str(folder / "t.parquet"), "label": "y"}
    splits = {"by": "range", "train": [0, 400], "val": [400, 600]}
    tree = {
        "name": "t",
        "data": {**data, "splits": splits},
        "model": {"hidden": [8]},
        "task": {"kind": "binary", "threshold": threshold},
        "train": {"batch_size": 40, "optimizer": {"kind": "adam"}, "phases": [{"epochs": 6, "lr": 0.03}]},
    }
    return build_job({**tree, **changes}, "test")


def train_job(folder: Path, threshold: Any, **changes: Any) -> RunStatus:
    return train(make_job(folder, threshold, **changes), storage=str(folder / "runs"))


RULES: list[Any] = ["f1", {"recall": 0.9}, {"cost": {"false_positive": 1, "false_negative": 9}}]


@pytest.mark.parametrize("rule", RULES, ids=["f1", "recall", "cost"])
def test_chosen_threshold_is_stored_and_used(tmp_path: Path, frame: pd.DataFrame, rule: Any) -> None:
    run = train_job(tmp_path, rule)
    model, validation = load(run.url), frame.iloc[400:]
    probabilities, positive = model.predict_proba(validation)[:, 1], (validation.y == "yes").to_numpy()
    parsed = rule if rule == "f1" else ThresholdConfig.model_validate(rule)
    assert model.threshold == pytest.approx(choose_threshold(probabilities, positive, parsed), abs=1e-6)
    assert run.best is not None
    assert run.best.metrics["val/threshold"] == model.threshold
    predicted = model.predict(validation) == "yes"
    assert (predicted == (probabilities > model.threshold)).all()
    assert 0 < predicted.sum() != (probabilities > 0.5).sum()
    assert pickle.loads(pickle.dumps(model)).threshold == model.threshold
    measured = evaluate(run.url).metrics
    assert measured["val/threshold"] == model.threshold
    assert measured["val/f1"] == pytest.approx(sk.f1_score(positive, predicted))
    assert measured["val/recall"] == pytest.approx(sk.recall_score(positive, predicted))
    assert measured["val/accuracy"] == pytest.approx(sk.accuracy_score(positive, predicted))
    at_half = run.best.metrics["val/accuracy"]
    assert at_half == pytest.approx(sk.accuracy_score(positive, probabilities > 0.5)), "training measures at 0.5"
    if rule == {"recall": 0.9}:
        assert measured["val/recall"] >= 0.9
    if rule == "f1":
        assert measured["val/f1"] > run.best.metrics["val/f1"]
    written = predict(run.url, input=str(tmp_path / "t.parquet"), output=str(tmp_path / "out.parquet"))
    assert written.to_json()["threshold"] == model.threshold
    assert any(f"threshold {model.threshold:.4f}" in line for line in written.format_lines())
    table = pq.read_table(tmp_path / "out.parquet").to_pandas()
    assert ((table["prediction"] == "yes") == (table["probability_yes"] > model.threshold)).all()
    on_all_rows = evaluate(run.url, data=str(tmp_path / "t.parquet")).metrics
    assert on_all_rows["data/threshold"] == model.threshold
    assert on_all_rows["data/f1"] == pytest.approx(sk.f1_score(frame.y == "yes", table["prediction"] == "yes"))


def test_each_checkpoint_has_the_threshold_of_the_latest_evaluation(tmp_path: Path, frame: pd.DataFrame) -> None:
    run = train_job(tmp_path, "f1", checkpoint={"every_steps": 10, "every_minutes": 1e-9, "keep": 9})
    rows = pd.read_parquet(Path(run.url) / "metrics/evals").set_index("step").sort_index()
    manifests = [json.loads(path.read_text()) for path in Path(run.url).glob("checkpoints/*/manifest.json")]
    assert len(manifests) > 1
    for manifest in manifests:
        loaded = load(f"{run.url}@{manifest['step']}")
        assert loaded.threshold == rows.loc[: manifest["step"], "threshold"].iloc[-1]
    assert rows["threshold"].nunique() > 2


def test_training_is_the_same_for_every_threshold(tmp_path: Path, frame: pd.DataFrame) -> None:
    runs = [train_job(tmp_path, threshold) for threshold in (0.5, 0.2, "f1")]
    assert len({run.url for run in runs}) == 3, "another threshold is another run"
    losses = [run.metrics["val/loss"] for run in runs]
    assert losses[0] == losses[1] == losses[2]
    accuracies = [run.metrics["val/accuracy"] for run in runs]
    assert accuracies[0] == accuracies[1] == accuracies[2]
    plain, low, _ = (load(run.url) for run in runs)
    assert (plain.threshold, low.threshold) == (0.5, 0.2)
    assert (low.predict(frame) == "yes").sum() > (plain.predict(frame) == "yes").sum()
    assert evaluate(runs[1].url).metrics["val/threshold"] == 0.2
    assert "val/threshold" not in evaluate(runs[0].url).metrics
    assert "val/threshold" not in runs[1].metrics


def test_threshold_is_chosen_on_validation_alone(tmp_path: Path, frame: pd.DataFrame) -> None:
    run = train_job(tmp_path, "f1", evaluate={"splits": ["train", "val"]})
    rows = pd.read_parquet(Path(run.url) / "metrics/evals")
    assert rows[rows["split"] == "train"]["threshold"].isna().all()
    assert rows[rows["split"] == "val"]["threshold"].notna().all()


@pytest.mark.parametrize(
    ("splits", "changes", "words"),
    [
        ({"by": "range", "train": [0, 600]}, {"best": {"metric": "train/loss"}}, "and there is none"),
        (
            {"by": "range", "train": [0, 400], "val": [400, 600]},
            {"evaluate": {"splits": ["train"]}, "best": {"metric": "train/loss"}},
            "not evaluated",
        ),
        ({"by": "range", "train": [0, 590], "val": [590, 591]}, {}, "its 1 rows are of one class"),
    ],
)
def test_without_rows_to_choose_on_it_is_refused(
    tmp_path: Path, frame: pd.DataFrame, splits: Any, changes: Any, words: str
) -> None:
    data = {"source": "parquet", "url": str(tmp_path / "t.parquet"), "label": "y", "splits": splits}
    with pytest.raises(JobError, match=words) as refused:
        train_job(tmp_path, "f1", data=data, **changes)
    assert refused.value.where == "task.threshold"
    assert "or give the threshold as a number" in (refused.value.fix or "")
    assert train_job(tmp_path, 0.3, data=data, **changes).status == "finished"
