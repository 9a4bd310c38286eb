"""A `call` source with a label: what a user's function returns is a table, as one of Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.config.files import build_job, resolve_job
from pipeline.data.sources import open_dataset
from pipeline.errors import DataError, JobError
from pipeline.runs.status import RunStatus
from tests.data import user_tables


@pytest.fixture(autouse=True)
def _modules_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)


def make_job(function: str, **data: Any) -> dict[str, Any]:
    return {
        "name": "returned",
        "data": {"source": {"call": f"user_tables:{function}"}, "label": "churned", "keys": ["customer"], **data},
        "task": {"kind": "binary", "positive": ["yes"]},
        "model": {"kind": "mlp", "hidden": [8]},
        "train": {"batch_size": 32, "phases": [{"epochs": 3, "lr": 0.1}]},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStatus:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent)
        return train(make_job("customers"), storage=str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("function", ["as_polars", "as_arrow", "as_columns", "as_pair"])
def test_the_same_content_is_the_same_data(function: str) -> None:
    expected, dataset = (
        open_dataset(build_job(make_job(name), "job"), float64=None) for name in ("customers", function)
    )
    assert dataset.schema == expected.schema
    assert (dataset.label_names, dataset.fingerprint) == (expected.label_names, expected.fingerprint)
    np.testing.assert_array_equal(dataset.train.inputs, expected.train.inputs)
    np.testing.assert_array_equal(dataset.train.targets, expected.train.targets)


def test_columns_are_those_of_a_parquet_file(tmp_path: Path) -> None:
    user_tables.customers().astype({"zip": str}).to_parquet(tmp_path / "customers.parquet", index=False)
    file = make_job("customers") | {"name": "file"}
    file["data"] = file["data"] | {"source": "parquet", "url": str(tmp_path / "customers.parquet")}
    from_function, from_file = (open_dataset(build_job(job, "job")) for job in (make_job("customers"), file))
    assert from_function.schema == from_file.schema
    np.testing.assert_array_equal(from_function.train.inputs, from_file.train.inputs)
    assert from_function.label_names == from_file.label_names == ("no", "yes")


def test_the_recipe_is_that_for_tables() -> None:
    job = make_job("customers")
    del job["model"], job["train"]
    assert resolve_job(job).train.optimizer.kind == "adamw"


def test_its_models_predict_and_evaluate_files(run: RunStatus, tmp_path: Path) -> None:
    frame = user_tables.customers(50, seed=3)
    for name in ("new.parquet", "new.csv"):
        if name.endswith(".csv"):
            frame.to_csv(tmp_path / name, index=False)
        else:
            frame.astype({"zip": int}).to_parquet(tmp_path / name, index=False)
        predict(run.url, input=str(tmp_path / name), output=str(tmp_path / "out.parquet"))
        predicted = pq.read_table(tmp_path / "out.parquet")
        assert predicted.column_names == ["customer", "prediction", "probability_no", "probability_yes"]
        assert predicted["prediction"].to_pylist() == list(load(run.url).predict(frame))
        metrics = evaluate(run.url, data=str(tmp_path / name), trust=True).metrics
        accuracy = np.mean(np.array(predicted["prediction"].to_pylist()) == frame["churned"])
        assert metrics["data/accuracy"] == pytest.approx(accuracy)


def test_the_run_is_found_again_and_evaluated(run: RunStatus) -> None:
    again = train(make_job("customers"), storage=run.url.rpartition("/")[0])
    assert (again.run, again.attempts) == (run.run, 1)
    assert run.best is not None
    assert evaluate(run.url, trust=True).metrics["val/loss"] == pytest.approx(run.best.value)


def test_a_test_set(tmp_path: Path) -> None:
    dataset = open_dataset(build_job(make_job("with_test"), "job"))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (user_tables.ROWS, 60)
    assert dataset.test.inputs.shape[1] == dataset.train.inputs.shape[1]
    result = train(make_job("with_test"), storage=str(tmp_path))
    assert "test/accuracy" in evaluate(result.url, split="test", trust=True).metrics


def test_several_targets_times_and_splits_by_time(tmp_path: Path) -> None:
    splits = {"by": "time", "column": "day", "val": "30d"}
    job = make_job("sales", label=["price", "rent"], keys=[], splits=splits) | {"task": "regression"}
    result = train(job, storage=str(tmp_path))
    assert load(result.url).predict(user_tables.sales()).shape == (user_tables.ROWS, 2)


def test_digits_beyond_float32_are_kept(tmp_path: Path) -> None:
    job = make_job("sales", label="price", keys=[], features=["size"]) | {"task": "regression"}
    assert open_dataset(build_job(job, "job")).reopen_in_float64 is not None
    wide = open_dataset(build_job(job, "job"), float64=True)
    np.testing.assert_array_equal(wide.train.inputs[:, 0], user_tables.sales()["size"])


@pytest.mark.parametrize(
    ("function", "data", "parts"),
    [
        ("customers", {"label": "churn"}, ("user_tables:customers", "'churn'", "did you mean churned")),
        ("customers", {"exclude": ["plans"]}, ("data.exclude", "plans")),
        ("mixed", {}, ("user_tables:mixed", "'plan'", "astype(str)")),
        ("no_table", {}, ("user_tables:no_table", "a int is not a table")),
        ("with_other_columns", {}, ("'plan'", "user_tables:with_other_columns, test")),
    ],
)
def test_what_cannot_be_used_is_said(function: str, data: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(build_job(make_job(function, **data), "job"))
    for part in parts:
        assert part in str(caught.value)


def test_keys_of_tables_need_a_label() -> None:
    job = make_job("customers")
    del job["data"]["label"]
    with pytest.raises(JobError, match="keys goes with"):
        build_job(job, "job")
