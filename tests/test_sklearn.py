"""The estimators with scikit-learn's interface."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from pipeline import load
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.config import MlpConfig
from pipeline.sklearn import TrainyardClassifier, TrainyardRegressor

LIGHT: dict[str, Any] = {
    "hidden": [32],
    "ensemble": 1,
    "dropout": 0.0,
    "epochs": 25,
    "lr": 0.02,
    "set": {"model.numeric_embedding": "none"},
}
"""A small network, for which a fit takes a quarter of a second."""

ROWS = 200


@parametrize_with_checks([TrainyardClassifier(**LIGHT), TrainyardRegressor(**LIGHT)])  # type: ignore[untyped-decorator]
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("estimator", [TrainyardClassifier(), TrainyardRegressor()])
def test_checks_of_scikit_learn_with_the_recipe(estimator: Any) -> None:
    check_estimator(estimator, on_skip=None)


@pytest.fixture(scope="module")
def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Inputs (200, 3), of which the sum of the first two decides, and a number."""
    inputs = np.random.default_rng(0).normal(size=(ROWS, 3))
    return inputs, inputs[:, 0] + inputs[:, 1]


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Text, categories, integers with nulls, and missing numbers."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=ROWS)
    return pd.DataFrame(
        {
            "age": np.where(rng.random(ROWS) < 0.1, np.nan, values),
            "plan": rng.choice(np.array(["basic", "pro", None]), ROWS),
            "zip": pd.Categorical(rng.integers(0, 4, ROWS)),
            "visits": pd.array([None if value > 4 else value for value in rng.integers(0, 6, ROWS)], "Int64"),
        }
    )


@pytest.fixture(scope="module")
def labels(frame: pd.DataFrame) -> np.ndarray:
    return np.where((frame["age"].fillna(0) > 0) ^ (frame["plan"] == "pro"), "yes", "no")


@pytest.mark.parametrize("to", [lambda frame: frame, pa.Table.from_pandas], ids=["pandas", "arrow"])
def test_a_frame_with_text_and_missing_values(to: Any, frame: pd.DataFrame, labels: np.ndarray) -> None:
    inputs = to(frame)
    model = TrainyardClassifier(**LIGHT).fit(inputs, labels)
    assert model.score(inputs, labels) > 0.85
    assert list(model.feature_names_in_) == list(frame)
    schema = model.model_.fitted.input_transform.schema
    assert schema is not None
    kinds = {column.name: column.kind for column in schema.columns}
    assert kinds == {"age": "number", "plan": "category", "zip": "category", "visits": "number"}
    with pytest.raises(ValueError, match="order"):
        model.predict(frame[["plan", "age", "zip", "visits"]])
    with pytest.warns(UserWarning, match="feature names"), pytest.raises(ValueError, match="3 features"):
        model.predict(np.zeros((2, 3)))


def test_a_frame_of_polars(frame: pd.DataFrame, labels: np.ndarray) -> None:
    inputs = pl.from_pandas(frame[["age", "plan"]]).with_columns(pl.col("plan").cast(pl.Categorical))
    model = TrainyardClassifier(**LIGHT).fit(inputs, pl.Series(labels))
    assert model.score(inputs, labels) > 0.85


@pytest.mark.parametrize(
    "values",
    [
        [False, True],
        [1.0, 2.0],
        [1, 2],
        [-1, 1],
        ["1", "2"],
        ["no", "yes"],
        [3, 5, 9],
        ["a", "b", "c"],
        [0.0, 1.0, 2.0],
    ],
)
def test_labels_of_every_type_are_predicted_as_they_are(values: list[Any], arrays: Any) -> None:
    inputs, numbers = arrays
    positions = np.digitize(numbers, [0.0] if len(values) == 2 else [-0.7, 0.7])
    labels = np.array(values)[positions]
    model = TrainyardClassifier(**LIGHT).fit(inputs, labels)
    predicted, probabilities = model.predict(inputs), model.predict_proba(inputs)
    assert predicted.dtype == labels.dtype
    np.testing.assert_array_equal(model.classes_, values)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], predicted)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert model.score(inputs, labels) > 0.9


def test_cross_validation_search_and_pipeline(arrays: Any) -> None:
    inputs, numbers = arrays
    scores = cross_val_score(TrainyardRegressor(**LIGHT), inputs, numbers, cv=3)
    assert scores.min() > 0.8
    pipeline = make_pipeline(StandardScaler(), TrainyardClassifier(**LIGHT))
    search = GridSearchCV(pipeline, {"trainyardclassifier__epochs": [1, 25]}, cv=2)
    search.fit(inputs, numbers > 0)
    assert search.best_params_ == {"trainyardclassifier__epochs": 25}
    wrapped = TransformedTargetRegressor(TrainyardRegressor(**LIGHT), func=np.sinh, inverse_func=np.arcsinh)
    assert wrapped.fit(inputs, numbers).predict(inputs).shape == (ROWS,)


def test_clone_pickle_and_joblib(arrays: Any, tmp_path: Path) -> None:
    inputs, numbers = arrays
    model = TrainyardRegressor(**LIGHT, random_state=3).fit(inputs, numbers)
    expected = model.predict(inputs)
    joblib.dump(model, tmp_path / "model.joblib")
    for copy in (pickle.loads(pickle.dumps(model)), joblib.load(tmp_path / "model.joblib")):
        np.testing.assert_array_equal(copy.predict(inputs), expected)
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(inputs)
    np.testing.assert_array_equal(copy.fit(inputs, numbers).predict(inputs), expected)


def test_random_state_is_the_seed(arrays: Any) -> None:
    inputs, numbers = arrays
    first, same, other, drawn = (
        TrainyardRegressor(**LIGHT, random_state=state).fit(inputs, numbers)
        for state in (5, 5, 6, np.random.RandomState(0))
    )
    assert first.model_.job.seed.all == 5
    np.testing.assert_array_equal(first.predict(inputs), same.predict(inputs))
    assert not np.array_equal(first.predict(inputs), other.predict(inputs))
    assert drawn.model_.job.seed.all not in (0, 1)


def test_fits_in_several_threads_are_those_of_one(arrays: Any) -> None:
    inputs, numbers = arrays
    settings = LIGHT | {"dropout": 0.2, "epochs": 3}
    expected = TrainyardRegressor(**settings).fit(inputs, numbers).predict(inputs)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(TrainyardRegressor(**settings).fit(inputs, numbers).predict(inputs))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)
    assert len(results) == 3


def test_several_targets(arrays: Any) -> None:
    inputs, numbers = arrays
    targets = np.column_stack([numbers, -numbers, numbers * 100])
    model = TrainyardRegressor(**LIGHT).fit(inputs, targets)
    assert model.predict(inputs).shape == (ROWS, 3)
    assert model.score(inputs, targets) > 0.8


def test_parameters_are_those_of_the_job(arrays: Any) -> None:
    inputs, numbers = arrays
    model = TrainyardRegressor(
        hidden=(8, 4), ensemble=2, dropout=0.25, epochs=2, lr=0.5, batch_size=16, patience=7, random_state=9
    ).fit(inputs, numbers)
    job = model.model_.job
    assert isinstance(job.model, MlpConfig)
    assert (job.model.hidden, job.model.ensemble, job.model.dropout) == ([8, 4], 2, 0.25)
    assert (job.train.phases[0].epochs, job.train.phases[0].lr, job.train.batch_size) == (2, 0.5, 16)
    assert (job.best.patience, job.seed.all, model.run_.epoch) == (7, 9, 2)
    default = TrainyardRegressor(epochs=1).fit(inputs, numbers).model_.job
    assert (default.train.optimizer.kind, default.train.batch_size) == ("adamw", "auto")


@pytest.mark.parametrize("as_file", [False, True])
def test_a_job_gives_what_parameters_leave_out(as_file: bool, arrays: Any, tmp_path: Path) -> None:
    inputs, numbers = arrays
    job: Any = {
        "name": "mine",
        "data": {"source": "parquet", "url": "elsewhere", "label": "z", "normalize": "none", "splits": {"val": 0.5}},
        "task": {"kind": "binary"},
        "model": {"kind": "mlp", "hidden": [5], "activation": "tanh"},
        "train": {"optimizer": {"kind": "adam"}, "phases": [{"epochs": 4, "lr": 0.01}]},
    }
    if as_file:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        job = path
    model = TrainyardRegressor(job=job, lr=0.03, set={"train.phases.0.lr": 0.04}).fit(inputs, numbers)
    resolved = model.model_.job
    assert isinstance(resolved.model, MlpConfig)
    assert (resolved.model.hidden, resolved.model.activation, resolved.task.kind) == ([5], "tanh", "regression")
    assert (resolved.train.phases[0].epochs, resolved.train.phases[0].lr) == (4, 0.04)
    assert (resolved.data.normalize, resolved.data.splits.by) == ("none", "column")


def test_class_weights(arrays: Any) -> None:
    inputs, numbers = arrays
    labels = np.where(numbers + np.random.default_rng(2).normal(size=ROWS) > 0, "b", "a")
    shares = [
        (TrainyardClassifier(**LIGHT, class_weight=weights).fit(inputs, labels).predict(inputs) == "a").mean()
        for weights in ({"a": 100.0, "b": 0.01}, None, {"a": 0.01, "b": 100.0})
    ]
    assert shares[0] > 0.95 > shares[1] > 0.05 > shares[2]
    floats = (labels == "a").astype(float)
    weighted = TrainyardClassifier(**LIGHT, class_weight={0.0: 0.01, 1.0: 100.0}).fit(inputs, floats)
    assert weighted.predict(inputs).mean() > 0.95
    assert TrainyardClassifier(**LIGHT, class_weight="balanced").fit(inputs, labels).score(inputs, labels) > 0.7


def test_a_storage_keeps_the_run(arrays: Any, tmp_path: Path) -> None:
    inputs, numbers = arrays
    labels = np.where(numbers > 0, "up", "down")
    settings: dict[str, Any] = LIGHT | {"storage": str(tmp_path / "runs")}
    settings["set"] = settings["set"] | {"data.cache.folder": str(tmp_path / "cache")}
    model = TrainyardClassifier(**settings).fit(inputs, labels)
    assert model.run_.best is not None
    assert evaluate(model.run_.url).metrics["val/loss"] == pytest.approx(model.run_.best.value)
    expected = model.predict(inputs)
    np.testing.assert_array_equal(load(model.run_.url).predict(inputs), expected)
    pq.write_table(pa.table({f"x{number}": inputs[:, number] for number in range(3)}), tmp_path / "new.parquet")
    predict(model.run_.url, input=str(tmp_path / "new.parquet"), output=str(tmp_path / "out.parquet"))
    assert pq.read_table(tmp_path / "out.parquet")["prediction"].to_pylist() == expected.tolist()
    again = TrainyardClassifier(**settings).fit(inputs, labels)  # finds the finished run
    assert (again.run_.url, again.run_.attempts) == (model.run_.url, 1)


def test_without_a_storage_nothing_is_left(arrays: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, numbers = arrays
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    TrainyardRegressor(**LIGHT).fit(inputs, numbers)
    assert {path.name for path in tmp_path.iterdir()} <= {f"trainyard-stacks-{os.getuid()}"}  # the watchdog's
    assert not [path for path in fsspec.filesystem("memory").find("/") if "trainyard-fit" in path]


def test_validation_fraction_zero_trains_on_all_rows(arrays: Any) -> None:
    inputs, numbers = arrays
    model = TrainyardRegressor(**LIGHT, validation_fraction=0).fit(inputs, numbers)
    assert model.run_.best is not None
    assert model.run_.best.metric == "train/loss"
    assert model.score(inputs, numbers) > 0.9


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=60).filter(lambda codes: len(set(codes)) > 1),
    st.floats(0, 0.99),
    st.integers(0, 2**31 - 1),
)
def test_validation_rows(codes: list[int], fraction: float, seed: int) -> None:
    labels = np.array(codes)
    model = TrainyardClassifier(validation_fraction=fraction)
    drawn, again = (model._draw_validation_rows(labels, "multiclass", seed) for _ in range(2))
    np.testing.assert_array_equal(drawn, again)
    assert set(labels[~drawn]) == set(codes)  # each class can be learned
    assert drawn.sum() <= round(fraction * len(codes))
    for code in set(codes):
        count = int((labels == code).sum())
        assert abs(drawn[labels == code].sum() - min(fraction * count, count - 1)) <= 1.5
    assert model._draw_validation_rows(labels, "regression", seed).sum() == min(
        round(fraction * len(codes)), len(codes) - 1
    )


def test_a_rare_class_is_learned(arrays: Any) -> None:
    inputs, numbers = arrays
    labels = np.where(numbers > 0, 1, 0)
    labels[:4] = [7, 8, 9, 10]
    model = TrainyardClassifier(**LIGHT).fit(inputs, labels)
    assert model.classes_.tolist() == [0, 1, 7, 8, 9, 10]
    assert model.predict_proba(inputs).shape == (ROWS, 6)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"epochs": 0}, "train.phases.0.epochs"),
        ({"lr": "fast"}, "train.phases.0.lr"),
        ({"set": {"modle": 1}}, "did you mean 'model'"),
        ({"job": {"name": "x", "train": {"phasess": 1}}}, "train.phasess"),
        ({"job": "missing.yaml"}, "no such job file"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"set": {"data.source": "mnist"}}, "data"),
    ],
)
def test_parameters_that_cannot_be_used(settings: dict[str, Any], part: str, arrays: Any) -> None:
    inputs, numbers = arrays
    with pytest.raises(ValueError, match="(?s)" + part.replace(".", r"\.")):
        TrainyardRegressor(**(LIGHT | settings)).fit(inputs, numbers)


def test_data_that_cannot_be_used(arrays: Any, frame: pd.DataFrame) -> None:
    inputs, numbers = arrays
    for bad, part in (
        (frame.assign(age=np.inf), "infinite"),
        (frame.assign(plan=[1, *["x"] * (ROWS - 1)]), "'plan'"),
        (frame[:10], "inconsistent numbers of samples"),
        (frame[:1], "inconsistent numbers of samples"),
    ):
        with pytest.raises(ValueError, match=part):
            TrainyardRegressor(**LIGHT).fit(bad, numbers)
    with pytest.raises(ValueError, match="minimum of 2"):
        TrainyardRegressor(**LIGHT).fit(frame[:1], numbers[:1])
    with pytest.raises(ValueError, match="one class"):
        TrainyardClassifier(**LIGHT).fit(inputs, np.ones(ROWS))


def test_an_interrupt_is_no_failed_fit(arrays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, numbers = arrays
    from pipeline.training import loop

    original = loop.evaluate

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cross_val_score(TrainyardRegressor(**LIGHT), inputs, numbers, cv=2)


def test_without_scikit_learn_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['sklearn'] = None\nimport pipeline.sklearn"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'trainyard[sklearn]'" in result.stderr.splitlines()[-1]


def test_it_is_as_good_as_its_documentation_says() -> None:
    inputs, labels = load_breast_cancer(return_X_y=True, as_frame=True)
    assert cross_val_score(TrainyardClassifier(**LIGHT), inputs, labels, cv=3).mean() > 0.94
    inputs, values = load_diabetes(return_X_y=True)
    assert cross_val_score(TrainyardRegressor(**LIGHT | {"epochs": 10}), inputs, values, cv=3).mean() > 0.3


def test_fit_prints_nothing(arrays: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, numbers = arrays
    TrainyardRegressor(**LIGHT).fit(inputs, numbers)
    assert capsys.readouterr() == ("", "")
    assert "TrainyardRegressor" in io.StringIO(repr(TrainyardRegressor(epochs=3))).read()
