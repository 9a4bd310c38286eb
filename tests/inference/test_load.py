"""Predictions of loaded models match their evaluation, for every input type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, mean_absolute_error, r2_score, roc_auc_score

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.config.files import build_job
from pipeline.errors import DataError, InputError
from pipeline.runs.status import RunStatus

TrainExample = Callable[[str], RunStatus]


def split_rows(run: RunStatus, split: str) -> np.ndarray:
    table = pq.read_table(f"{run.url}/splits.parquet").to_pandas()
    rows: np.ndarray = table[table.split == split].row.to_numpy()
    return rows


@pytest.mark.parametrize("job", ["table", "regression", "pictures", "finetune", "examples/own_model/job"])
def test_each_example_job_trains_and_is_evaluated(train_example: TrainExample, job: str) -> None:
    run = train_example(job)
    assert run.status == "finished"
    assert run.best is not None
    assert run.best.metric in run.metrics


def test_tabular_predictions_match_the_evaluation(train_example: TrainExample, example_data: Path) -> None:
    run = train_example("table")
    frame = pd.read_parquet(example_data / "churn.parquet").iloc[split_rows(run, "val")]
    model = load(run.url)
    measured = evaluate(run.url).metrics
    assert accuracy_score(frame.churned, model.predict(frame)) == pytest.approx(measured["val/accuracy"], abs=1e-9)
    positive = model.predict_proba(frame)[:, model.classes.index("yes")]
    assert roc_auc_score(frame.churned == "yes", positive) == pytest.approx(measured["val/auc"], abs=1e-6)


def test_regression_predictions_use_label_units(train_example: TrainExample, example_data: Path) -> None:
    run = train_example("regression")
    frame = pd.read_parquet(example_data / "houses.parquet").iloc[split_rows(run, "val")]
    predictions, measured = load(run.url).predict(frame), evaluate(run.url).metrics
    assert r2_score(frame.price, predictions) == pytest.approx(measured["val/r2"], abs=1e-6)
    assert mean_absolute_error(frame.price, predictions) == pytest.approx(measured["val/mae"], rel=1e-6)
    with pytest.raises(DataError, match="no classes"):
        load(run.url).predict_proba(frame)


def test_pandas_polars_arrow_and_dicts_agree(train_example: TrainExample, example_data: Path) -> None:
    model = load(train_example("table").url)
    table = pq.read_table(example_data / "churn.parquet").slice(0, 200)
    expected = model.predict_proba(table)
    frame = table.to_pandas()
    columns: dict[str, Any] = {name: table.column(name).to_pylist() for name in reversed(table.schema.names)}
    for same in (
        frame,
        pl.from_arrow(table),
        table.to_batches()[0],
        columns,
        table.to_pylist(),
        frame.sample(frac=1).loc[frame.index],
    ):
        np.testing.assert_allclose(model.predict_proba(same), expected, rtol=1e-6)
    assert len(model.predict(table.slice(0, 0))) == 0
    strange = table.set_column(table.schema.get_field_index("plan"), "plan", pa.array(["unheard of"] * 200))
    with pytest.warns(UserWarning, match="column 'plan': all of 200 values were never seen in training"):
        assert np.isfinite(model.predict_proba(strange)).all()


def test_mismatched_inputs_are_rejected(train_example: TrainExample, example_data: Path) -> None:
    model, frame = load(train_example("table").url), pd.read_parquet(example_data / "churn.parquet")
    with pytest.raises(DataError, match="no column 'plan'"):
        model.predict(frame.drop(columns="plan"))
    with pytest.raises(DataError, match="num_calls"):
        model.predict(frame.assign(num_calls="three"))
    with pytest.raises(DataError, match="num_spend"):
        model.predict(frame.assign(num_spend=np.inf))
    with pytest.raises(DataError, match="int is not a table"):
        model.predict(3)


def test_images_by_path_image_and_array(train_example: TrainExample, example_data: Path) -> None:
    from PIL import Image

    run = train_example("pictures")
    model = load(run.url)
    paths = sorted((example_data / "shapes").glob("*/*"))
    by_path = model.predict_proba([str(path) for path in paths])
    images = [Image.open(path) for path in paths[:5]]
    np.testing.assert_allclose(model.predict_proba(images), by_path[:5])
    truth = np.array([path.parent.name for path in paths])
    held = split_rows(run, "val")
    measured = evaluate(run.url).metrics["val/accuracy"]
    assert accuracy_score(truth[held], model.predict([paths[row] for row in held])) == pytest.approx(measured)
    with pytest.raises(DataError, match=r"bytes, 0 to 255"):
        model.predict(np.zeros((2, 3, 32, 32), np.float32))
    assert model.predict(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2,)
    with pytest.raises(DataError, match="cannot be used as an image"):
        model.predict([__file__])
    with pytest.raises(DataError, match="no such file"):
        model.predict([example_data / "shapes" / "none.png"])


def test_predictor_is_an_nn_module(train_example: TrainExample, example_data: Path) -> None:
    model = load(train_example("table").url)
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    frame = pd.read_parquet(example_data / "churn.parquet").head(50)
    before = model.predict_proba(frame)
    model.train()  # predictions must not use dropout
    np.testing.assert_array_equal(model.predict_proba(frame), before)
    assert model.training
    np.testing.assert_allclose(model.double().predict_proba(frame), before, atol=1e-5)
    last = load(f"{train_example('table').url}@last")
    assert last.step == train_example("table").step


def test_user_code_runs_only_with_trust(train_example: TrainExample, tmp_path: Path) -> None:
    run = train_example("examples/own_model/job")
    with pytest.raises(InputError, match="trust"):
        load(run.url)
    script = (
        "import json, sys, numpy as np; from pipeline import load\n"
        "model = load(sys.argv[1], trust=True)\n"
        "print(json.dumps([model.predict_proba(np.zeros((3, 2))).tolist(), list(model.classes), "
        "sys.modules[type(model.model).__module__].__file__, 'nets' in sys.modules]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, run.url], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    predictions, classes, code_path, is_plain = json.loads(ran.stdout)
    assert classes == ["first", "second"]
    assert np.allclose(np.sum(predictions, axis=1), 1)
    assert "trainyard-code-" in code_path  # the code stored with the run, not other code on the path
    assert not is_plain, "the module name does not clash"


def test_numeric_arrays_and_integer_labels(tmp_path: Path) -> None:
    tree = {
        "name": "disc",
        "data": {"source": "disc"},
        "task": {"kind": "multiclass"},
        "train": {"phases": [{"epochs": 2, "lr": 0.5}]},
    }
    run = train(build_job(tree, "test"), storage=str(tmp_path))
    model = load(run.url)
    points = np.random.default_rng(0).uniform(size=(7, 2))
    assert set(model.predict(points)) <= {"inside", "outside"}
    assert model.predict(torch.tensor(points)).shape == (7,)
    with pytest.raises(DataError, match=r"not \(N, 2\)"):
        model.predict(points[:, :1])


def test_tables_and_runs_in_a_store(example_data: Path, s3_url: str) -> None:
    import fsspec

    fs, path = fsspec.core.url_to_fs(s3_url)
    fs.put(str(example_data / "churn.parquet"), f"{path}/data/churn.parquet")
    from tests.inference.conftest import REPOSITORY, SHORT_TRAINING

    run = train(
        REPOSITORY / "jobs" / "table.yaml",
        set={**SHORT_TRAINING, "data.url": f"{s3_url}/data/churn.parquet"},
        storage=f"{s3_url}/runs",
    )
    assert run.status == "finished"
    frame = pd.read_parquet(example_data / "churn.parquet")
    assert len(load(run.url).predict(frame)) == len(frame)
