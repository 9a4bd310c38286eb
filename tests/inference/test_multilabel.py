"""A multilabel task from the table to the predictions."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.config.files import build_job
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.errors import DataError, JobError
from pipeline.events import Event, EventHandler, WarningMessage, ignore_event
from pipeline.runs.status import RunStatus
from pipeline.setup import prepare_data

LABELS = ["damp", "old", "owner", "grade"]


def make_frame() -> pd.DataFrame:
    """600 rows with labels of every type: booleans, 0 and 1, text, and two numbers."""
    x = np.random.default_rng(0).normal(size=(600, 2))
    return pd.DataFrame(
        {
            "a": x[:, 0],
            "b": x[:, 1],
            "damp": x[:, 0] > 0.5,
            "old": (x[:, 1] > 0).astype(int),
            "owner": np.where(x.sum(1) > 0, "yes", "no"),
            "grade": np.where(x[:, 0] > x[:, 1], 7, 3),
        }
    )


def make_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    tree = {
        "name": "t",
        "data": {"source": "parquet", "url": str(folder / "t.parquet"), "label": LABELS, "splits": {"val": 0.3}},
        "model": {"kind": "mlp", "hidden": [16]},
        "task": "multilabel",
        "train": {"batch_size": 30, "optimizer": {"kind": "adam"}, "phases": [{"epochs": 8, "lr": 0.02}]},
    }
    return {**tree, **changes}


def train_labels(folder: Path, frame: pd.DataFrame, on_event: EventHandler = ignore_event, **changes: Any) -> RunStatus:
    frame.to_parquet(folder / "t.parquet")
    return train(build_job(make_tree(folder, **changes), "test"), storage=str(folder / "runs"), on_event=on_event)


@pytest.mark.parametrize("ensemble", [1, 3])
def test_labels_of_every_type_are_predicted_as_they_are(tmp_path: Path, ensemble: int) -> None:
    frame, events = make_frame(), list[Event]()
    model_tree = {"kind": "mlp", "hidden": [16], "ensemble": ensemble}
    run = train_labels(tmp_path, frame, events.append, model=model_tree, best={"metric": "val/exact_match"})
    assert run.best is not None
    assert run.best.mode == "max"
    messages = [event.text for event in events if isinstance(event, WarningMessage)]
    assert "of the labels no and yes of 'owner', yes counts as positive" in messages
    assert "of the labels 3 and 7 of 'grade', 7 counts as positive" in messages
    assert not any("'damp'" in text or "'old'" in text for text in messages if "counts as positive" in text)
    model = load(run.url)
    assert model.classes == tuple(LABELS)
    predictions, probabilities = model.predict(frame), model.predict_proba(frame)
    assert predictions.shape == probabilities.shape == (600, 4)
    assert (predictions == frame[LABELS].to_numpy(object)).mean() > 0.95
    assert (probabilities[:, 2] > 0.5).tolist() == [value == "yes" for value in predictions[:, 2]]
    predict(run.url, input=str(tmp_path / "t.parquet"), output=str(tmp_path / "out.parquet"))
    written = pq.read_table(tmp_path / "out.parquet")
    columns = [f"{what}_{name}" for what in ("prediction", "probability") for name in LABELS]
    uncertain = [f"uncertainty_{name}" for name in LABELS] if ensemble > 1 else []
    assert written.schema.names == [*columns, *uncertain]
    types = [str(written.schema.field(f"prediction_{name}").type) for name in LABELS]
    assert types == ["bool", "int64", "string", "int64"]
    for index, name in enumerate(LABELS):
        assert written[f"prediction_{name}"].to_pylist() == predictions[:, index].tolist()
    metrics = evaluate(run.url, data=str(tmp_path / "t.parquet")).metrics
    assert metrics["data/accuracy"] == (predictions == frame[LABELS].to_numpy(object)).mean()
    assert metrics["data/exact_match"] == (predictions == frame[LABELS].to_numpy(object)).all(1).mean()
    assert {f"data/{metric}_{name}" for metric in ("recall", "precision", "auc") for name in LABELS} <= metrics.keys()
    table = [line.split() for line in evaluate(run.url).format_lines()]
    assert ["label", "recall", "precision", "auc"] in table
    assert (pickle.loads(pickle.dumps(model)).predict(frame) == predictions).all()


def test_labels_of_one_type_are_one_array(tmp_path: Path) -> None:
    frame = make_frame()[["a", "b", "old"]].assign(new=lambda table: 1 - table.old)
    data = {"source": "parquet", "url": str(tmp_path / "t.parquet"), "label": ["old", "new"], "splits": {"val": 0.3}}
    run = train_labels(tmp_path, frame, data=data)
    predictions = load(run.url).predict(frame)
    assert predictions.dtype == np.int64
    assert (predictions == frame[["old", "new"]].to_numpy()).mean() > 0.95


def test_stored_transform_is_restored(tmp_path: Path) -> None:
    make_frame().to_parquet(tmp_path / "t.parquet")
    fitted = prepare_data(build_job(make_tree(tmp_path), "test")).fitted
    assert fitted.num_outputs == 4
    assert fitted.target_mean == pytest.approx([0.31, 0.5, 0.5, 0.5], abs=0.1)
    stored = json.loads(json.dumps(fitted.to_json()))
    assert FittedTransforms.from_json(stored) == fitted
    damages: list[list[Any]] = [[], stored["targets"]["labels"][:2], [{}] * 4]
    for damaged in damages:
        with pytest.raises(DataError):
            FittedTransforms.from_json({**stored, "targets": {**stored["targets"], "labels": damaged}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([None, *[0, 1] * 299, 1], "the column 'old' has nulls (or NaN) in 1 of 600 rows"),
        ([0, 1, 2] * 200, "the label 'old' has 3 values in 420 training rows (0, 1, 2)"),
        ([1] * 600, "the label 'old' has 1 values in 420 training rows (1)"),
        (["x", "y", "z"] * 200, "the label 'old' has 3 values in 420 training rows (x, y, z)"),
        ([0.5, 1.0] * 300, "the column 'old' has labels that are not whole"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, values: list[Any], words: str) -> None:
    make_frame().assign(old=values).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError) as refused:
        prepare_data(build_job(make_tree(tmp_path), "test"))
    assert words in refused.value.what
    assert refused.value.fix


def test_a_label_per_row_and_stratified_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="multilabel needs several labels per row"):
        prepare_data(build_job({"name": "t", "task": "multilabel", "data": {"source": "disc"}}, "test"))
    make_frame().to_parquet(tmp_path / "t.parquet")
    tree = make_tree(tmp_path)
    stratified = {**tree["data"], "splits": {"val": 0.3, "stratify": True}}
    with pytest.raises(DataError, match="multilabel has none"):
        prepare_data(build_job({**tree, "data": stratified}, "test"))
    with pytest.raises(DataError, match="task: multilabel for columns of two values"):
        prepare_data(build_job({**tree, "task": "multiclass"}, "test"))
    with pytest.raises(JobError, match="did you mean 'val/exact_match'"):
        build_job({**tree, "best": {"metric": "val/exact_matches", "mode": "max"}}, "test")


def test_labels_of_a_function_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import numpy as np\ndef data():\n    x = np.random.default_rng(0).normal(size=(200, 2))\n"
    (tmp_path / "label_matrix.py").write_text(source + "    return x, (x > 0).astype(np.float32)\n")
    monkeypatch.chdir(tmp_path)
    tree = make_tree(tmp_path, data={"source": {"call": "label_matrix:data"}})
    run = train(build_job(tree, "test"), storage=str(tmp_path / "runs"))
    assert run.metrics["val/accuracy"] > 0.9
    assert "val/recall_1" in run.metrics
    model = load(run.url)
    assert model.classes == ("0", "1")
    assert model.predict(np.array([[3.0, -3.0]])).tolist() == [[1, 0]]
