"""`check` on a table: how each column is read, and what the job leaves to the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from tests.cli.command_line import CompletedCommand, RunCommand
from tests.cli.tables import customers, write_table

ROWS = 400


def write_table_job(folder: Path, columns: dict[str, Any], **tree: Any) -> str:
    """Write a table and a job on it, and return the path of the job file."""
    write_table(folder / "t.parquet", columns)
    data = {"source": "parquet", "url": "t.parquet", "label": "churned", **tree.pop("data", {})}
    job = {"name": "t", "data": data, "task": {"kind": "binary", "positive": ["yes"]}, **tree}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return str(folder / "job.yaml")


def read_table(ended: CompletedCommand) -> dict[str, list[str]]:
    """The cells of the table by column, as split at two blanks or more."""
    lines = ended.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("# column "))
    rows = [[cell.strip() for cell in line[2:].split("  ") if cell.strip()] for line in lines[first + 1 :]]
    return {row[0]: row[1:] for row in rows}


def test_each_column_is_shown_with_its_use(trainyard: RunCommand, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    gaps = draw.random(ROWS) < 0.1
    columns = {
        "id": np.arange(ROWS) + 7,
        **customers(ROWS),
        "gaps": pa.array(draw.normal(size=ROWS), mask=gaps),
        "city": [f"city {i % 40}" for i in range(ROWS)],
        "zip": draw.integers(10, 15, ROWS),
        "remark": [f"remark {i}" for i in range(ROWS)],
        "same": [1.5] * ROWS,
        "tmp_x": draw.normal(size=ROWS),
        "day": np.datetime64("2024-01-01") + np.arange(ROWS) // 40,
        "pair": pa.array([[0.5, 1.5], [1.0, 2.0]] * (ROWS // 2), pa.list_(pa.float32(), 2)),
    }
    data = {
        "features": "auto",
        "exclude": ["tmp_*"],
        "keys": ["id"],
        "categorical": ["zip"],
        "splits": {"by": "time", "column": "day", "val": 0.2},
    }
    job = write_table_job(tmp_path, columns, data=data)
    ended = trainyard("check", job)
    assert ended.exit_code == 0, ended.stderr
    table = read_table(ended)
    assert list(table) == list(columns)
    scale = "robust scale, missing: median, periodic embedding"
    assert {name: cells[-1] for name, cells in table.items() if name != "churned"} == {
        "id": "key: copied to predictions",
        "months": scale,
        "calls": scale,
        "plan": "one-hot: 3",
        "gaps": scale,
        "city": "embedded: 40 -> 13",
        "zip": "one-hot: 5",
        "remark": "left out: it is almost unique text (400 different values in 400 rows)",
        "same": "left out: it has the same value in all training rows",
        "tmp_x": "excluded by data.exclude",
        "day": "splits by time",
        "pair": f"2 numbers, each {scale}",
    }
    assert table["gaps"][:2] == ["double", str(gaps.sum())]
    assert table["day"][:3] == ["date32[day]", "0", "2024-01-01 to 2024-01-10"]
    yes = int((columns["churned"] == "yes").sum())
    parts = {f"'yes' {yes}", f"'no' {ROWS - yes}"}
    assert set(table["churned"][-1].removeprefix("label: ").split(", ")) == parts
    assert yaml.safe_load(ended.stdout)["name"] == "t", "the table is a comment of the job file"
    described = {column["name"]: column for column in trainyard("check", job, "--json").json["columns"]}
    assert list(described) == list(columns)
    assert dict(described["churned"]["counts"]) == {"yes": yes, "no": ROWS - yes}
    assert described["zip"] | {"use": ""} == {
        "name": "zip",
        "type": "int64",
        "rows": ROWS,
        "nulls": 0,
        "distinct": 5,
        "more_distinct": False,
        "low": 10,
        "high": 14,
        "role": "feature",
        "use": "",
    }
    assert {name: column["role"] for name, column in described.items() if column["role"] != "feature"} == {
        "id": "key",
        "churned": "label",
        "remark": "unused",
        "same": "unused",
        "tmp_x": "unused",
        "day": "split",
    }


def test_columns_that_are_not_listed_are_named(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_table_job(
        tmp_path, customers(), data={"features": ["mon*"], "normalize": "none"}, model={"kind": "mlp"}
    )
    table = read_table(trainyard("check", job))
    assert table["months"][-1] == "unscaled, missing: median"
    assert table["calls"][-1] == table["plan"][-1] == "not in data.features"


def test_a_wide_table_shows_its_first_columns(trainyard: RunCommand, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    columns = {**{f"x{i}": draw.normal(size=100) for i in range(50)}, **customers(100)}
    job = write_table_job(tmp_path, columns)
    lines = trainyard("check", job).stdout.splitlines()
    assert lines[-1] == "# and 24 more columns: see --json"
    assert len([line for line in lines if line.startswith("# x")]) == 30
    assert len(trainyard("check", job, "--json").json["columns"]) == 54


def test_check_names_the_sections_of_the_recipe(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_table_job(tmp_path, customers(), model={"kind": "mlp", "hidden": [8]}, train={"batch_size": 32})
    sections = ["data.normalize", "train.optimizer", "train.phases", "best"]
    assert trainyard("check", job, "--json").json["recipe"] == sections
    assert f"# the recipe for this kind of data: {', '.join(sections)}" in trainyard("check", job).stdout


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"churned": ["yes"] * ROWS}, "all 320 training rows are of one class"),
        ({"churned": pa.array([None, "yes"] * (ROWS // 2))}, "nulls (or NaN) in 200 of 400 rows"),
        ({"months": [np.inf, 1.0] * (ROWS // 2)}, "infinite values"),
        ({"nested": [{"a": 1}] * ROWS}, "'nested' has neither numbers nor text"),
    ],
)
def test_check_finds_what_training_would(
    trainyard: RunCommand, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    job = write_table_job(tmp_path, customers(ROWS) | changes)
    checked = trainyard("check", job)
    assert (checked.exit_code, text in checked.stderr) == (2, True), checked.stderr
    assert text in trainyard("train", job).stderr


def test_hostile_names_and_texts_stay_on_their_line(trainyard: RunCommand, tmp_path: Path) -> None:
    hostile = {"a\nb: [": np.arange(ROWS) / 7, "\x1b[31m": ["x\ny", "\u2028"] * (ROWS // 2), "n" * 300: np.ones(ROWS)}
    job = write_table_job(tmp_path, {**customers(ROWS), **hostile})
    ended = trainyard("check", job)
    assert ended.exit_code == 0, ended.stderr
    assert yaml.safe_load(ended.stdout)["name"] == "t"
    assert "\x1b" not in ended.stdout
    assert len(next(line for line in ended.stdout.splitlines() if line.startswith("# nnn"))) < 200


def test_dates_and_hashed_columns(trainyard: RunCommand, tmp_path: Path) -> None:
    days = np.datetime64("2024-01-01") + np.arange(ROWS) % 365
    columns = {
        **customers(ROWS),
        "day": days,
        "at": days.astype("datetime64[s]"),
        "text": [str(day) for day in days],
        "took": pa.array(np.arange(ROWS), pa.duration("s")),
        "user": [f"user {i % 300}" for i in range(ROWS)],
    }
    data = {"dates": ["text"], "hashed": {"user": 8}}
    ended = trainyard("check", write_table_job(tmp_path, columns, data=data, model={"numeric_embedding": "piecewise"}))
    assert ended.exit_code == 0, ended.stderr
    use = {name: cells[-1] for name, cells in read_table(ended).items()}
    bins = "piecewise-linear bins, missing: median"
    assert use["day"] == f"5 numbers, days and positions in year and week, each {bins}"
    assert use["at"] == use["text"] == f"7 numbers, days and positions in year, week and day, each {bins}"
    assert use["took"] == bins
    assert use["user"] == "hashed to 8 buckets, one-hot: 8"
