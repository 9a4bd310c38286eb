"""Trained ensembles: predictions match the evaluation, and come with an uncertainty."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, r2_score

from pipeline import load, train
from pipeline.commands.check import check
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.errors import DataError, JobError
from pipeline.inference.predictor import Predictor
from pipeline.models.mlp import EnsembleMlpNet
from pipeline.runs.status import RunStatus

MEMBERS = 3
LABELS = {"binary": "late", "multiclass": "color", "regression": "price"}

TrainOn = Callable[..., RunStatus]


def make_frame(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    x, town = rng.normal(size=(rows, 3)), rng.integers(0, 30, rows)
    return pd.DataFrame(
        {
            **{f"x{index}": x[:, index] for index in range(3)},
            "town": [f"town {number}" for number in town],
            "size": np.array(["s", "m", "l"])[rng.integers(0, 3, rows)],
            "late": np.where(x[:, 0] + 0.3 * rng.normal(size=rows) > 0, 1, 0),
            "color": np.array(["red", "green", "blue"])[np.digitize(x[:, 1], [-0.5, 0.5])],
            "price": 1000 + 50 * x[:, 0] + 5 * town,
            "weight": 3 * x[:, 2],
        }
    )


@pytest.fixture(scope="module")
def train_on(tmp_path_factory: pytest.TempPathFactory) -> TrainOn:
    """Return a function that trains an ensemble for a task, once for each task and setting."""
    folder = tmp_path_factory.mktemp("ensembles")
    make_frame().to_parquet(folder / "frame.parquet")
    made: dict[str, RunStatus] = {}

    def run(kind: str, label: Any = None, **model: Any) -> RunStatus:
        key = f"{kind} {label} {model}"
        if key not in made:
            made[key] = train(make_job(folder, kind, label, **model), storage=str(folder / "runs"))
        return made[key]

    return run


def make_job(folder: Path, kind: str, label: Any = None, **model: Any) -> dict[str, Any]:
    data = {"source": "parquet", "url": str(folder / "frame.parquet"), "label": label or LABELS[kind]}
    data |= {"features": ["x*", "town", "size"], "splits": {"val": 0.3}}
    network = {"hidden": [12], "dropout": 0.1, "ensemble": MEMBERS, "numeric_embedding": "periodic", **model}
    optimizer = {"kind": "adamw", "weight_decay": 0.01, "decay": "weights"}
    training = {"batch_size": 30, "optimizer": optimizer, "phases": [{"epochs": 8, "lr": 0.02}]}
    return {"name": "ensemble", "data": data, "model": network, "task": kind, "train": training}


def validation_frame(run: RunStatus) -> pd.DataFrame:
    splits = pq.read_table(f"{run.url}/splits.parquet").to_pandas()
    frame: pd.DataFrame = make_frame().iloc[splits[splits.split == "val"].row.to_numpy()]
    return frame


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_mean_probabilities_match_the_evaluation(train_on: TrainOn, kind: str) -> None:
    run = train_on(kind)
    frame, model, measured = validation_frame(run), load(run.url), evaluate(run.url).metrics
    labels, probabilities = frame[LABELS[kind]], model.predict_proba(frame)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert accuracy_score(labels, model.predict(frame)) == pytest.approx(measured["val/accuracy"])
    assert log_loss(labels, probabilities[:, np.argsort(model.classes)]) == pytest.approx(
        measured["val/log_loss"], rel=1e-5
    )
    assert measured["val/accuracy"] > 0.7


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_uncertainty_of_classes_is_the_mutual_information(train_on: TrainOn, kind: str) -> None:
    run = train_on(kind)
    frame, model = validation_frame(run), load(run.url)
    predictions, uncertainty = model.predict_with_uncertainty(frame)
    assert np.array_equal(predictions, model.predict(frame))
    members = np.stack([member.predict_proba(frame) for member in split_members(model)])
    np.testing.assert_allclose(members.mean(0), model.predict_proba(frame), atol=1e-6)

    def entropy(probabilities: np.ndarray) -> np.ndarray:
        result: np.ndarray = -(probabilities * np.log(probabilities)).sum(-1)
        return result

    np.testing.assert_allclose(uncertainty, entropy(members.mean(0)) - entropy(members).mean(0), atol=1e-6)
    assert (uncertainty >= 0).all()
    assert uncertainty.max() > 0.001


@pytest.mark.parametrize("label", ["price", ["price", "weight"]])
def test_uncertainty_of_values_is_the_standard_deviation(train_on: TrainOn, label: Any) -> None:
    run = train_on("regression", label)
    frame, model, measured = validation_frame(run), load(run.url), evaluate(run.url).metrics
    predictions, uncertainty = model.predict_with_uncertainty(frame)
    members = np.stack([member.predict(frame) for member in split_members(model)])
    np.testing.assert_allclose(predictions, members.mean(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(uncertainty, members.std(0), rtol=1e-3, atol=1e-4)
    assert r2_score(frame[label], predictions) == pytest.approx(measured["val/r2"], abs=1e-5)


def split_members(model: Predictor) -> list[Predictor]:
    """Return a predictor for each member, in which all members are that one."""
    split = []
    for member in range(MEMBERS):
        copied = pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            for name, parameter in copied.model.named_parameters():
                if parameter.shape[0] == MEMBERS and not name.startswith(("numeric", "embeddings")):
                    parameter.copy_(parameter[[member]].expand_as(parameter).clone())
        split.append(copied)
    return split


def test_identical_members_agree(train_on: TrainOn) -> None:
    member = split_members(load(train_on("multiclass").url))[1]
    assert member.predict_with_uncertainty(make_frame(50, seed=9))[1].max() < 1e-12


def test_module_returns_averaged_outputs(train_on: TrainOn) -> None:
    model = load(train_on("binary").url)
    assert isinstance(model.model, EnsembleMlpNet)
    outputs = model(torch.zeros(7, 5))
    assert outputs.shape == (7, 1)
    assert model(torch.zeros(0, 5)).shape == (0, 1)


def test_uncertainty_is_a_column_of_predict(train_on: TrainOn, tmp_path: Path) -> None:
    new = make_frame(40, seed=1).drop(columns=["late", "color", "price", "weight"])
    pq.write_table(pa.Table.from_pandas(new), tmp_path / "new.parquet")
    for kind, label, columns in (
        ("binary", None, ["prediction", "probability_0", "probability_1", "uncertainty"]),
        ("regression", None, ["prediction", "uncertainty"]),
        (
            *("regression", ["price", "weight"]),
            ["prediction_price", "prediction_weight", "uncertainty_price", "uncertainty_weight"],
        ),
    ):
        run = train_on(kind, label)
        predict(run.url, input=str(tmp_path / "new.parquet"), output=str(tmp_path / "out.parquet"))
        out = pq.read_table(tmp_path / "out.parquet")
        assert out.schema.names == columns
        expected = load(run.url).predict_with_uncertainty(new)[1].reshape(40, -1)
        written = np.stack([out[name].to_numpy() for name in columns if name.startswith("uncertainty")], 1)
        np.testing.assert_allclose(written, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("task", "label", "names"),
    [
        ({"kind": "multilabel"}, ["late", "heavy"], ["late", "heavy"]),
        ({"kind": "regression", "quantiles": [0.1, 0.5, 0.9]}, "price", ["q10", "q50", "q90"]),
    ],
    ids=["multilabel", "quantiles"],
)
def test_several_outputs_have_an_uncertainty_each(
    tmp_path: Path, task: dict[str, Any], label: Any, names: list[str]
) -> None:
    frame = make_frame()
    frame["heavy"] = (frame.weight > 0).astype(int)
    frame.to_parquet(tmp_path / "frame.parquet")
    job = {**make_job(tmp_path, "regression", label), "task": task}
    run = train(job, storage=str(tmp_path / "runs"), max_steps=20)
    predict(run.url, input=str(tmp_path / "frame.parquet"), output=str(tmp_path / "out.parquet"))
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.schema.names[-len(names) :] == [f"uncertainty_{name}" for name in names]
    uncertainty = load(run.url).predict_with_uncertainty(frame)[1]
    assert uncertainty.shape == (400, len(names))
    assert (uncertainty > 0).all()
    for index, name in enumerate(names):
        np.testing.assert_allclose(out[f"uncertainty_{name}"].to_numpy(), uncertainty[:, index], rtol=1e-6)


def test_single_networks_have_no_uncertainty(train_on: TrainOn) -> None:
    model = load(train_on("binary", ensemble=1).url)
    with pytest.raises(DataError, match="a single network has no uncertainty"):
        model.predict_with_uncertainty(make_frame(5))
    assert model.predict(make_frame(5)).shape == (5,)


def test_an_ensemble_starts_from_an_ensemble_of_its_size(train_on: TrainOn, tmp_path: Path) -> None:
    run = train_on("binary")
    make_frame().to_parquet(tmp_path / "frame.parquet")

    def start(**model: Any) -> RunStatus:
        job = make_job(tmp_path, "binary", init_from=f"{run.url}@last", **model)
        return train(job, storage=str(tmp_path / "runs"), max_steps=1)

    assert start().status == "finished"
    with pytest.raises(JobError, match=r"does not fit this model.*0\.r \(3, .*, in this model \(4,"):
        start(ensemble=4)
    with pytest.raises(JobError, match=r"does not fit this model.*not in this model: 0\.[rs]"):
        start(ensemble=1)


def test_check_counts_rows_not_members(tmp_path: Path) -> None:
    make_frame().to_parquet(tmp_path / "frame.parquet")
    batch = check(make_job(tmp_path, "binary"), batch=True).batch
    assert batch is not None
    assert (batch["inputs"][0], batch["targets"], batch["outputs"]) == (30, [30], [30, 1])
    assert batch["loss_after"] < batch["loss_before"]


@pytest.mark.parametrize(
    "settings", [{"train.batch_size": "all"}, {"train.compile": "on"}, {"train.precision": "bf16"}]
)
def test_other_ways_to_train(tmp_path: Path, settings: dict[str, Any]) -> None:
    make_frame().to_parquet(tmp_path / "frame.parquet")
    job = make_job(tmp_path, "multiclass")
    run = train(job, set=settings, storage=str(tmp_path / "runs"), max_steps=3)
    assert run.status == "finished"
    assert load(run.url).predict(make_frame()).shape == (400,)
