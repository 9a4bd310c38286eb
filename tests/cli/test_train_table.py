"""`train TABLE --label` and `init --data`: from a table to a job file that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from pipeline.config import JobConfig
from pipeline.config.files import load_job
from pipeline.config.recipes import TABLE_RECIPE
from tests.cli.command_line import RunCommand
from tests.cli.tables import customers, write_table


def read_job(path: str | Path = "churned.yaml") -> JobConfig:
    return load_job(path)


def test_one_command_trains_a_table_and_leaves_a_job_file(trainyard: RunCommand, tmp_path: Path) -> None:
    write_table(tmp_path / "customers.parquet", customers())
    command = ("train", "customers.parquet", "--label", "churned", "--set", "train.phases.0.epochs=3", "--json")
    first = trainyard(*command)
    assert first.exit_code == 0, first.stderr
    assert first.json["status"] == "finished"
    assert first.json["metrics"]["val/auc"] > 0.7
    for text in (
        "400 rows, 3 columns",
        "'churned' has 2 different texts",
        "'yes' counts as positive",
        "wrote churned.yaml",
    ):
        assert text in first.stderr
    job = read_job()
    assert (job.task.kind, job.data.splits.model_dump()["stratify"]) == ("binary", True)
    assert job.model.model_dump()["hidden"] == TABLE_RECIPE.model["hidden"]
    again = trainyard(*command)
    assert (again.json["run"], "nothing to do" in again.stderr) == (first.json["run"], True)
    assert "the job file churned.yaml is there" in again.stderr
    by_file = trainyard("train", "churned.yaml", "--set", "train.phases.0.epochs=3", "--json")
    assert by_file.json["run"] == first.json["run"]


def test_a_job_file_of_another_table_is_not_overwritten(trainyard: RunCommand, tmp_path: Path) -> None:
    for name, seed in (("may", 1), ("june", 2), ("july", 3)):
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / "customers.parquet", customers(seed=seed))
    train = ("--label", "churned", "--max-steps", "2", "--json")
    runs = [trainyard("train", f"{name}/customers.parquet", *train) for name in ("may", "june")]
    assert [run.exit_code for run in runs] == [0, 0]
    assert {path.name for path in tmp_path.glob("*.yaml")} == {"churned.yaml", "customers-churned.yaml"}
    assert trainyard("train", "june/customers.parquet", *train).json["run"] == runs[1].json["run"]
    refused = trainyard("train", "july/customers.parquet", *train)
    assert (refused.exit_code, "trainyard init NAME --data" in refused.stderr) == (2, True)


def test_init_writes_a_job_for_a_table_and_does_not_train(trainyard: RunCommand, tmp_path: Path) -> None:
    url = write_table(tmp_path / "t.parquet", customers())
    written = trainyard("init", "churn", "--data", url, "--label", "churned", "--json")
    assert (written.exit_code, written.json["path"]) == (0, "churn.yaml")
    assert read_job("churn.yaml").name == "churn"
    assert not (tmp_path / "runs").exists()
    before = (tmp_path / "churn.yaml").read_text()
    assert trainyard("init", "churn", "--data", url, "--label", "churned").exit_code == 2
    assert (tmp_path / "churn.yaml").read_text() == before


def test_a_table_without_a_label_asks_for_it(trainyard: RunCommand, tmp_path: Path) -> None:
    url = write_table(tmp_path / "t.parquet", customers())
    for arguments, text in (
        (("train", url), "--label COLUMN"),
        (("init", "churn", "--data", url), "--data needs --label"),
        (("init", "churn", "--label", "y"), "--label needs --data"),
        (("train", url, "--label", "churn"), "did you mean churned?"),
        (("train", "none.parquet", "--label", "y"), "none.parquet: does not exist"),
    ):
        refused = trainyard(*arguments)
        assert refused.exit_code == 2, arguments
        assert text in refused.stderr
    assert not list(tmp_path.glob("*.yaml"))


ROWS = 60
LABELS: list[tuple[Any, dict[str, Any]]] = [
    (np.arange(ROWS) % 2 == 0, {"kind": "binary"}),
    (np.arange(ROWS) % 2 + 1, {"kind": "binary"}),
    ((np.arange(ROWS) % 2).astype(float), {"kind": "binary"}),
    (np.arange(ROWS) % 3, {"kind": "multiclass"}),
    ([f"c{i % 4}" for i in range(ROWS)], {"kind": "multiclass"}),
    (pa.array(["no", "yes"] * (ROWS // 2)).dictionary_encode(), {"kind": "binary"}),
    (np.arange(ROWS) % 15, {"kind": "regression"}),
    (np.arange(ROWS), {"kind": "regression"}),
    (np.linspace(0, 1, ROWS), {"kind": "regression"}),
    ((np.arange(ROWS) % 3) / 2, {"kind": "regression"}),
]


@pytest.mark.parametrize(("label", "task"), LABELS)
def test_the_task_follows_from_the_label(
    trainyard: RunCommand, tmp_path: Path, label: Any, task: dict[str, Any]
) -> None:
    url = write_table(tmp_path / "t.parquet", {"x": np.random.default_rng(0).normal(size=ROWS), "y": label})
    ended = trainyard("train", url, "--label", "y", "--max-steps", "3", "--json")
    assert ended.exit_code == 0, ended.stderr
    stored = read_job("y.yaml").task.model_dump()
    assert {key: stored[key] for key in task} == task


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ([1.0] * ROWS, "the same value in all 60 rows"),
        ([None, "a", "b"] * 20, "no value in 20 of 60 rows"),
        ([float("nan"), 1.0, 2.0] * 20, "no value in 20 of 60 rows"),
        ([f"text {i}" for i in range(ROWS)], "60 different texts in 60 rows"),
        ([None] * ROWS, "only nulls"),
        ([[1, 2]] * ROWS, "lists of numbers"),
    ],
)
def test_a_label_that_cannot_be_predicted_is_refused(
    trainyard: RunCommand, tmp_path: Path, label: Any, text: str
) -> None:
    url = write_table(tmp_path / "t.parquet", {"x": np.arange(ROWS), "y": label})
    refused = trainyard("train", url, "--label", "y")
    assert (refused.exit_code, text in refused.stderr) == (2, True), refused.stderr
    assert not list(tmp_path.glob("*.yaml"))


def test_several_labels_of_two_values_are_a_multilabel_task(trainyard: RunCommand, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    columns = {"x": draw.normal(size=ROWS), "y": np.arange(ROWS) % 2, "z": ["a", "b", "b"] * (ROWS // 3)}
    url = write_table(tmp_path / "t.parquet", columns)
    ended = trainyard("train", url, "--label", "y", "--label", "z", "--max-steps", "3", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert read_job("y.yaml").task.kind == "multilabel"
    assert trainyard("check", "y.yaml").exit_code == 0


def test_several_labels_of_numbers_are_one_regression(trainyard: RunCommand, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    columns = {"x": draw.normal(size=ROWS), "y": draw.normal(size=ROWS), "z": draw.normal(size=ROWS)}
    url = write_table(tmp_path / "t.parquet", columns)
    ended = trainyard("train", url, "--label", "y", "--label", "z", "--max-steps", "3", "--json")
    assert ended.exit_code == 0, ended.stderr
    job = read_job("y.yaml")
    assert (job.data.labels, job.task.kind) == (["y", "z"], "regression")


NAMES = ["a b", "it's", 'say "x"', "Größe: 3", "one\ntwo", "- item", "{x}", "#1", "null", "a\u2028b", "..", "=1", "*"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_text_are_written_to_the_job_file(trainyard: RunCommand, tmp_path: Path, name: str) -> None:
    draw = np.random.default_rng(0)
    columns = {f"{name} x": draw.normal(size=ROWS), f"{name} user id": np.arange(ROWS) // 2, name: np.arange(ROWS) % 2}
    url = write_table(tmp_path / "t.parquet", columns)
    ended = trainyard("train", url, "--label", name, "--max-steps", "3", "--json")
    assert ended.exit_code == 0, ended.stderr
    (path,) = tmp_path.glob("*.yaml")
    assert read_job(path).data.labels == [name]
    assert "repeats (30 values in 60 rows)" in ended.stderr


def test_a_name_that_a_job_file_would_replace_is_refused(trainyard: RunCommand, tmp_path: Path) -> None:
    url = write_table(tmp_path / "t.parquet", {"x": np.arange(ROWS), "${HOME}": np.arange(ROWS) % 2})
    refused = trainyard("train", url, "--label", "${HOME}")
    assert (refused.exit_code, "rename the column" in refused.stderr) == (2, True)


def test_times_and_identifiers_are_named_as_reasons_for_other_splits(trainyard: RunCommand, tmp_path: Path) -> None:
    columns = {
        **customers(),
        "day": np.datetime64("2024-01-01") + np.arange(400) // 4,
        "noted": [f"2024-05-0{i % 9 + 1}T10:00:00Z" for i in range(400)],
        "patient_id": np.arange(400) // 4,
    }
    url = write_table(tmp_path / "t.parquet", columns)
    written = trainyard("init", "churn", "--data", url, "--label", "churned", "--json")
    for line in (
        "splits: {by: time, column: day, val: 0.2}",
        "splits: {by: time, column: noted, val: 0.2}",
        "splits: {by: group, column: patient_id, val: 0.2}",
    ):
        assert line in written.stderr
        assert line in (tmp_path / "churn.yaml").read_text()
    tree: dict[str, Any] = yaml.safe_load((tmp_path / "churn.yaml").read_text())
    assert tree["data"]["splits"]["by"] == "random"
    assert json.loads(written.stdout)["path"] == "churn.yaml"


def test_columns_that_are_left_out_are_said_and_not_needed_again(trainyard: RunCommand, tmp_path: Path) -> None:
    columns = {"remark": [f"remark {i}" for i in range(400)], "country": ["de"] * 400, **customers()}
    url = write_table(tmp_path / "t.parquet", columns)
    ended = trainyard("train", url, "--label", "churned", "--max-steps", "5", "--json", "--quiet")
    assert ended.exit_code == 0, ended.stderr
    for text in (
        "'remark' is left out: it is almost unique text (400 different values in 400 rows)",
        "'country' is left out: it has the same value in all training rows",
        'data.features: ["*"]',
    ):
        assert text in ended.stderr
    run = ended.json["run"]
    unlabeled = {name: values for name, values in customers(50, 1).items() if name != "churned"}
    new = write_table(tmp_path / "new.parquet", unlabeled)
    predicted = trainyard("predict", run, "--input", new, "--output", str(tmp_path / "out.parquet"))
    assert (predicted.exit_code, "wrote 50 rows" in predicted.stdout) == (0, True), predicted.stderr
    other = write_table(tmp_path / "other.parquet", customers(60, 2))
    assert trainyard("evaluate", run, "--data", other, "--json").exit_code == 0
    assert trainyard("evaluate", run, "--json").exit_code == 0
    kept = trainyard("train", "churned.yaml", "--set", 'data.features=["*"]', "--max-steps", "5", "--json")
    assert (kept.exit_code, "is left out" in kept.stderr) == (0, False)
    assert kept.json["run"] != run
