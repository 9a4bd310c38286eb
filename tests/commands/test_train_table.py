"""`train` on a table in memory: an ordinary run, which is resumed, evaluated and loaded like that of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import load, train
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict
from pipeline.errors import DataError, InputError, Interrupted, JobError
from pipeline.events import EvaluationLogged, Message, WarningMessage

ROWS = 120


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Storage and cache below the test's folder, and a short training."""
    overrides = {
        "data.cache.folder": str(tmp_path / "cache"),
        "model.hidden": [8],
        "train": {"batch_size": 32, "phases": [{"epochs": 3, "lr": 0.1}]},
    }
    return {"storage": str(tmp_path / "runs"), "set": overrides}


@pytest.fixture
def frame() -> pd.DataFrame:
    """Customers with text, missing values and a text label."""
    rng = np.random.default_rng(0)
    age, plan = rng.normal(40, 10, ROWS), rng.choice(["basic", "pro"], ROWS)
    churned = np.where((age + rng.normal(0, 5, ROWS) > 40) ^ (plan == "pro"), "yes", "no")
    return pd.DataFrame({"age": np.where(rng.random(ROWS) < 0.1, np.nan, age), "plan": plan, "churned": churned})


def messages(events: list[Any]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Message | WarningMessage))


def test_a_finished_run_of_the_same_table_is_found_again(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    run = train(frame, label="churned", **settings)
    assert run.status == "finished"
    assert run.run.startswith("table-")
    same: list[tuple[Any, dict[str, Any]]] = [
        (frame, {"label": "churned"}),
        (pl.from_pandas(frame), {"label": "churned"}),
        (pa.Table.from_pandas(frame, preserve_index=False), {"label": "churned"}),
        ({name: list(frame[name]) for name in frame}, {"label": "churned"}),
        (frame[["age", "plan"]], {"target": frame["churned"]}),
        ((frame[["age", "plan"]], frame["churned"]), {}),
        (frame[["age", "plan"]], {"target": list(frame["churned"]), "label": "churned"}),
    ]
    for data, options in same:
        events: list[Any] = []
        again = train(data, **options, **settings, on_event=events.append)
        assert (again.run, again.attempts) == (run.run, 1)
        assert "nothing to do" in messages(events)
    assert train(frame[1:], label="churned", **settings).run != run.run
    assert train(frame, label="churned", **settings | {"set": settings["set"] | {"seed": 2}}).run != run.run


def test_a_table_trains_as_its_parquet_file_does(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    frame = frame.assign(split=np.where(np.arange(ROWS) < 90, "train", "val"))  # a random split depends on the file
    frame.to_parquet(tmp_path / "customers.parquet", index=False)
    data = {"source": "parquet", "url": str(tmp_path / "customers.parquet"), "label": "churned"}
    settings["set"]["data.splits"] = {"by": "column", "column": "split"}
    from_file, from_memory = (
        train({"name": "file", "data": data, "task": {"kind": "binary", "positive": ["yes"]}}, **settings),
        train(frame, label="churned", **settings),
    )
    assert from_file.metrics == from_memory.metrics
    expected = load(from_file.url).predict_proba(frame)
    np.testing.assert_array_equal(load(from_memory.url).predict_proba(frame), expected)


def test_the_run_is_evaluated_and_predicts_as_one_of_a_file(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(frame, label="churned", **settings)
    assert run.best is not None
    assert evaluate(run.url).metrics["val/loss"] == pytest.approx(run.best.value)
    frame.to_parquet(tmp_path / "new.parquet", index=False)
    predict(run.url, input=str(tmp_path / "new.parquet"), output=str(tmp_path / "out.parquet"))
    predicted = pq.read_table(tmp_path / "out.parquet")["prediction"].to_pylist()
    assert predicted == list(load(run.url).predict(frame))


def test_an_interrupted_run_is_resumed_and_ends_in_the_same_weights(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    uninterrupted = train(frame, label="churned", **settings)

    def interrupt(event: object) -> None:
        if isinstance(event, EvaluationLogged) and event.step > 0:
            raise KeyboardInterrupt

    other = settings | {"storage": str(tmp_path / "other")}
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(frame, label="churned", on_event=interrupt, **other)
    resumed = train(frame, label="churned", **other)
    assert (resumed.run, resumed.attempts) == (uninterrupted.run, 2)
    for name, values in load(uninterrupted.url).model.state_dict().items():
        np.testing.assert_array_equal(values, load(resumed.url).model.state_dict()[name])


def test_an_evaluation_after_the_cache_was_emptied_says_what_to_do(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(frame, label="churned", **settings)
    (table,) = (tmp_path / "cache").glob("table-*/table.parquet")
    table.unlink()
    with pytest.raises(DataError, match="passed in Python"):
        evaluate(run.url)


def test_the_run_does_not_depend_on_the_bytes_of_the_stored_file(
    frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = train(frame, label="churned", **settings)
    (table,) = (tmp_path / "cache").glob("table-*/table.parquet")
    pq.write_table(pq.read_table(table), table, compression="gzip")  # as another version of Arrow would write it
    assert train(frame, label="churned", **settings).run == run.run
    assert evaluate(run.url).metrics["val/loss"] == pytest.approx(run.metrics["val/loss"])


def test_arrays_of_numbers(settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(ROWS, 3))
    inputs[0, 0] = np.nan
    labels = (inputs[:, 1] > 0).astype(int) + 1
    run = train(inputs, labels, **settings)
    assert set(load(run.url).predict(inputs)) == {1, 2}


@pytest.mark.parametrize("targets", [1, 2])
def test_regression(targets: int, settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(ROWS, 3))
    values = 5 + inputs @ rng.normal(size=(3, targets))
    run = train(inputs, values[:, 0] if targets == 1 else values, task="regression", **settings)
    assert load(run.url).predict(inputs).shape == ((ROWS,) if targets == 1 else (ROWS, 2))
    assert run.metrics["val/r2"] > 0.3


def test_a_numeric_categorical_of_pandas_is_a_category(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    coded = frame.assign(plan=pd.Categorical(np.where(frame["plan"] == "pro", 7, 3)))
    run = train(coded, label="churned", **settings)
    schema = load(run.url).fitted.input_transform.schema
    assert schema is not None
    assert {column.name: column.categories for column in schema.columns} == {"age": (), "plan": ("3", "7")}


def test_errors_name_the_table_not_the_file_in_the_cache(settings: dict[str, Any], tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0, np.inf], "y": [0, 1, 1]})
    with pytest.raises(DataError) as caught:
        train(frame, label="y", **settings)
    assert "column 'a' has infinite values" in str(caught.value)
    assert str(caught.value).startswith("table:")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "kind", "classes"),
    [
        (np.tile(["no", "yes"], ROWS // 2), "binary", ("no", "yes")),
        (np.tile([1, 2], ROWS // 2), "binary", ("1", "2")),
        (np.tile(["a", "b", "c"], ROWS // 3), "multiclass", ("a", "b", "c")),
        (np.arange(ROWS) * 1.5, "regression", ()),
        (np.arange(ROWS), "regression", ()),
    ],
)
def test_the_task_follows_from_the_labels(
    labels: np.ndarray, kind: str, classes: tuple[str, ...], settings: dict[str, Any]
) -> None:
    events: list[Any] = []
    inputs = np.random.default_rng(3).normal(size=(ROWS, 2))
    model = load(train(inputs, labels, on_event=events.append, **settings).url)
    assert (model.job.task.kind, model.classes) == (kind, classes)
    assert f"task: {kind}: 'y' has" in messages(events)


def test_a_task_that_is_given_is_not_chosen(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    events: list[Any] = []
    run = train(frame, label="churned", task="multiclass", on_event=events.append, **settings)
    assert load(run.url).job.task.kind == "multiclass"
    settings["set"]["task"] = {"kind": "multiclass"}
    assert load(train(frame, label="churned", **settings).url).job.task.kind == "multiclass"
    assert "task:" not in messages(events)


def test_what_is_not_given_is_the_recipe_for_tables(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    job = load(train(frame, label="churned", storage=settings["storage"], set={"train.phases.0.epochs": 1}).url).job
    assert job.train.optimizer.kind == "adamw"
    assert job.data.splits.stratify  # type: ignore[union-attr]


def test_the_url_of_a_table(frame: pd.DataFrame, settings: dict[str, Any], tmp_path: Path) -> None:
    frame.to_csv(tmp_path / "customers.csv", index=False)
    events: list[Any] = []
    run = train(tmp_path / "customers.csv", label="churned", on_event=events.append, **settings)
    assert "task: {kind: binary" in messages(events)
    assert len(load(run.url).predict(frame)) == ROWS
    assert train(str(tmp_path / "customers.csv"), label=["churned"], **settings).attempts == 1
    assert not list(Path.cwd().glob("churned*.yaml"))
    other = train(str(tmp_path / "customers.csv"), label="churned", task="multiclass", **settings)
    assert load(other.url).job.task.kind == "multiclass"
    with pytest.raises(InputError, match="labels cannot be given apart"):
        train(str(tmp_path / "customers.csv"), [0, 1], label="churned")


def test_the_index_is_said_to_be_left_out(frame: pd.DataFrame, settings: dict[str, Any]) -> None:
    events: list[Any] = []
    frame.index = pd.RangeIndex(ROWS, name="customer")
    train(frame, label="churned", on_event=events.append, **settings)
    assert "the index (customer) is not an input" in messages(events)


def test_options_of_data_do_not_go_with_a_job(frame: pd.DataFrame) -> None:
    job = {"name": "disc", "data": {"source": "disc"}}
    for value in (job, "jobs/disc.yaml", Path("jobs/disc.yml")):
        with pytest.raises(InputError, match="label=") as caught:
            train(value, label="churned")
        assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="target="):
        train(job, [0, 1])
    with pytest.raises(InputError, match="task="):
        train(job, task="binary")
    with pytest.raises(JobError, match="data"):
        train(frame, label="churned", set={"data.source": "disc"})
    with pytest.raises(InputError, match="the data is a table in memory"):
        train(frame, label="churned", set={"data.source": "csv"})
    with pytest.raises(JobError):
        train(frame, label="churned", task="binry")
