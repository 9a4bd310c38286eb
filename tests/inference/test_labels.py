"""Predictions of a trained model have the labels of the data, of every type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.config.files import build_job
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.errors import DataError, JobError
from pipeline.events import Event, EventHandler, WarningMessage, ignore_event
from pipeline.runs.status import RunStatus
from pipeline.setup import prepare_data


def train_frame(folder: Path, frame: pd.DataFrame, task: Any, on_event: EventHandler = ignore_event) -> RunStatus:
    frame.to_parquet(folder / "t.parquet")
    tree = {"source": "parquet", "url": str(folder / "t.parquet"), "label": "y"}
    training = {"batch_size": 20, "phases": [{"epochs": 20, "lr": 0.5}]}
    job = build_job({"name": "t", "data": tree, "task": task, "model": {"hidden": [8]}, "train": training}, "test")
    return train(job, storage=str(folder / "runs"), on_event=on_event)


@pytest.mark.parametrize(
    ("labels", "task", "names"),
    [
        ([2019, 2020, 2021], "multiclass", ("2019", "2020", "2021")),
        ([1, 2, 3], "multiclass", ("1", "2", "3")),
        ([3.0, 7.0], "multiclass", ("3", "7")),
        ([-1, 1], "binary", ("-1", "1")),
        ([0, 1], "binary", ("0", "1")),
        ([False, True], "binary", ("false", "true")),
        ([False, True], "multiclass", ("false", "true")),
        ([False, True], {"kind": "binary", "positive": [False]}, ("true", "false")),
        ([1, 2], "binary", ("1", "2")),
        ([1.0, 2.0], "binary", ("1", "2")),
        ([1, 2], {"kind": "binary", "positive": [2]}, ("1", "2")),
        ([1, 5], {"kind": "binary", "positive": [1]}, ("5", "1")),
        (["no", "yes"], "binary", ("no", "yes")),
        (["1", "2"], "binary", ("1", "2")),
        (["no", "yes"], {"kind": "binary", "positive": ["no"]}, ("yes", "no")),
    ],
    ids=str,
)
def test_predictions_are_the_labels(tmp_path: Path, labels: list[Any], task: Any, names: tuple[str, ...]) -> None:
    x = np.random.default_rng(0).uniform(0, len(labels), 200)
    frame = pd.DataFrame({"x": x, "y": np.array(labels)[x.astype(int)]})
    run = train_frame(tmp_path, frame, task)
    model = load(run.url)
    assert model.classes == names
    predictions = model.predict(frame)
    assert predictions.dtype.kind == {bool: "b", str: "U"}.get(type(labels[0]), "i")
    assert (predictions == frame.y).mean() > 0.9
    assert model.predict_proba(frame).shape == (200, len(names))
    chosen = np.array(names)[model.predict_proba(frame).argmax(1)]
    assert (chosen == np.char.lower(predictions.astype(str))).all()
    predict(run.url, input=str(tmp_path / "t.parquet"), output=str(tmp_path / "out.parquet"))
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.schema.names == ["prediction", *(f"probability_{name}" for name in names)]
    assert written.column("prediction").to_pylist() == predictions.tolist()
    others = evaluate(run.url, data=str(tmp_path / "t.parquet")).metrics
    assert others["data/accuracy"] == (predictions == frame.y).mean()


def test_class_that_merges_labels_is_named_negative_or_positive(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(90.0), "y": np.arange(90) // 30})
    run = train_frame(tmp_path, frame, {"kind": "binary", "positive": [2]})
    assert load(run.url).classes == ("negative", "positive")


@pytest.mark.parametrize("task", ["binary", {"kind": "binary", "class_weights": {True: 5.0, "false": 1.0}}])
def test_booleans_that_a_function_returns_are_predicted_as_booleans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    source = "import numpy as np\ndef data():\n    x = np.arange(60.0)[:, None]\n    return x, x[:, 0] > 30\n"
    (tmp_path / "boolean_labels.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    tree = {"name": "t", "data": {"source": {"call": "boolean_labels:data"}}, "task": task}
    run = train(build_job(tree, "test"), storage=str(tmp_path / "runs"))
    model = load(run.url)
    assert model.classes == ("false", "true")
    assert model.predict(np.array([[1.0], [59.0]])).tolist() == [False, True]


def test_unseen_label_is_rejected(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(100.0), "y": 2019 + np.arange(100) % 3})
    run = train_frame(tmp_path, frame, "multiclass")
    frame.assign(y=2018).to_parquet(tmp_path / "old.parquet")
    message = r"2018 at row 0 is not a class of the training data \(100 of 100 rows\)"
    with pytest.raises(DataError, match=message) as refused:
        evaluate(run.url, data=str(tmp_path / "old.parquet"))
    assert "the classes are 2019, 2020, 2021" in refused.value.fix


def test_classes_of_an_earlier_version_are_unchanged(tmp_path: Path) -> None:
    """In that version, labels of 1 to 3 made four classes, and a checkpoint has an output for each."""
    pd.DataFrame({"x": np.arange(60.0), "y": 1 + np.arange(60) % 3}).to_parquet(tmp_path / "t.parquet")
    tree = {"source": "parquet", "url": str(tmp_path / "t.parquet"), "label": "y"}
    job = build_job({"name": "t", "data": tree}, "test")
    prepared = prepare_data(job)
    stored = prepared.fitted.to_json()
    targets = {**stored["targets"], "version": 2, "classes": ["0", "1", "2", "3"]}
    del targets["values"]
    fitted = FittedTransforms.from_json({**stored, "version": 2, "targets": targets, "class_counts": [0, 1, 1, 1]})
    before = prepare_data(job, fitted=fitted)
    assert before.fitted.num_outputs == 4
    assert before.targets["train"].tolist() == before.dataset.train.targets.tolist()
    assert (prepared.targets["train"] + 1).tolist() == before.targets["train"].tolist()


def test_positive_class_of_two_numbers_is_reported(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(100.0), "y": np.sign(np.arange(100) - 49.5).astype(int)})
    events: list[Event] = []
    train_frame(tmp_path, frame, "binary", events.append)
    warnings = [event.text for event in events if isinstance(event, WarningMessage)]
    assert any("of the labels -1 and 1, 1 counts as positive" in text for text in warnings)


def test_class_weights_are_given_by_label(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(90.0), "y": 2019 + np.arange(90) % 3})
    with pytest.raises(JobError, match="2 is not one of the 3 classes"):
        train_frame(tmp_path, frame, {"kind": "multiclass", "class_weights": {2: 5.0}})
    train_frame(tmp_path, frame, {"kind": "multiclass", "class_weights": {2020: 5.0}})
    names = frame.assign(y=frame.y.map({2019: "a", 2020: "b", 2021: "c"}))
    with pytest.raises(JobError, match="2 is not one of the 3 classes"):
        train_frame(tmp_path, names, {"kind": "multiclass", "class_weights": {2: 5.0}})


# ------------------------------------------------------------------------------------- invalid inputs


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("kind", [np.asarray, lambda rows: torch.tensor(rows)])
def test_values_invalid_in_training_give_no_prediction(tmp_path: Path, bad: float, kind: Any) -> None:
    tree = {"name": "disc", "data": {"source": "disc"}, "train": {"phases": [{"epochs": 1, "lr": 0.5}]}}
    model = load(train(build_job(tree, "test"), storage=str(tmp_path)).url)
    rows = np.full((4, 2), 0.5)
    rows[2, 1] = bad
    with pytest.raises(DataError, match=r"at row 2, position 1 \(1 of 4 rows"):
        model.predict(kind(rows))
    with torch.no_grad():
        next(model.model.parameters()).fill_(torch.nan)  # as for a value too large for the model
    with pytest.raises(DataError, match="outputs are not finite for 4 of 4 rows, the first is row 0"):
        model.predict(kind(np.full((4, 2), 0.5)))


def test_table_of_numbers_is_filled_or_rejected_as_in_training(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(100.0), "z": np.ones(100), "y": np.arange(100) % 2})
    model = load(train_frame(tmp_path, frame, "multiclass").url)
    rows = frame[["x", "z"]].to_numpy()
    holed = rows.copy()
    holed[3, 0] = np.nan
    filled = model.predict_proba(frame.assign(x=holed[:, 0]))
    np.testing.assert_array_equal(model.predict_proba(holed), filled)
    assert np.isfinite(filled).all()
    holed[3, 0] = -np.inf
    with pytest.raises(DataError, match=r"-inf at row 3, position 0 \(1 of 100 rows"):
        model.predict(holed)


def test_single_column_samples_may_not_be_null(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4), dtype=np.uint8)
    for kind in (pa.uint8(), pa.float32()):
        lists = pa.array(pixels.tolist(), pa.list_(kind, 4))
        pq.write_table(pa.table({"x": lists, "y": np.arange(60) % 2}), tmp_path / "t.parquet")
        tree = {"source": "parquet", "url": str(tmp_path / "t.parquet"), "label": "y", "shape": [1, 2, 2]}
        training = {"phases": [{"epochs": 1, "lr": 0.1}]}
        run = train(build_job({"name": str(kind), "data": tree, "train": training}, "t"), storage=str(tmp_path))
        model = load(run.url)
        assert model.predict(pa.table({"x": lists})).shape == (60,)
        with pytest.raises(DataError, match=r"1 rows of 'x' hold nulls|nan at row 1"):
            model.predict(pa.table({"x": pa.array([[1, 2, 3, 4], [1, None, 3, 4]], lists.type)}))
