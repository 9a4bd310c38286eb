"""`train`, `predict` and `evaluate --data` on tables of every file format, whatever the model was trained on."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from tests.cli.command_line import RunCommand
from tests.data.table_files import write_csv, write_table

JOB = """
name: small
data: {source: SOURCE, url: data, label: y, keys: [id], splits: {by: range, train: [0, 150], val: [150, 200]}}
train: {batch_size: 20, phases: [{epochs: 2, lr: 0.1}]}
"""
SOURCES = ("parquet", "csv", "arrow", "jsonl", "numpy")


def make_table(rows: int = 200) -> pa.Table:
    rng = np.random.default_rng(1)
    x = np.round(rng.normal(size=rows), 3)
    return pa.table(
        {
            "id": [f"{number:05d}" for number in range(rows)],
            "x": x,
            "n": rng.integers(0, 50, rows),
            "code": [f"{number:03d}" for number in rng.integers(0, 5, rows)],
            "y": np.where(x > 0, "2", "1a"),
        }
    )


def train(trainyard: RunCommand, source: str) -> str:
    Path("job.yaml").write_text(JOB.replace("SOURCE", source))
    write_table(Path("data"), make_table(), source)
    ended = trainyard("train", "job.yaml", "--json")
    assert ended.exit_code == 0, ended.stderr
    return str(ended.json["run"])


def test_every_format_trains_the_same_bits(trainyard: RunCommand) -> None:
    weights = []
    for source in SOURCES:
        run = train(trainyard, source)
        weights.append(load_file(next(iter(sorted(Path("runs", run).glob("checkpoints/*/model.safetensors"))))))
    for other in weights[1:]:
        for name, values in weights[0].items():
            np.testing.assert_array_equal(other[name], values)


@pytest.mark.parametrize("source", ["parquet", "csv"])
def test_predictions_and_metrics_do_not_depend_on_the_format(trainyard: RunCommand, source: str) -> None:
    run, table = train(trainyard, source), make_table()
    predictions, metrics = [], []
    for other in SOURCES:
        write_table(Path(f"new.{other}"), table, other)
        ended = trainyard("predict", run, "--input", f"new.{other}", "--output", f"{other}.parquet")
        assert ended.exit_code == 0, ended.stderr
        predictions.append(pq.read_table(f"{other}.parquet"))
        metrics.append(trainyard("evaluate", run, "--data", f"new.{other}", "--json").json["metrics"])
    assert all(other == predictions[0] for other in predictions[1:])
    assert all(other == metrics[0] for other in metrics[1:])


def test_text_stays_text_and_an_empty_column_of_numbers_is_missing(trainyard: RunCommand) -> None:
    run = train(trainyard, "parquet")
    new = make_table(4).set_column(1, "x", pa.nulls(4, pa.float64())).set_column(3, "code", pa.array(["000"] * 4))
    write_csv(Path("new.csv"), new.drop_columns("y"), delimiter=";", decimal=",")
    ended = trainyard("predict", run, "--input", "new.csv", "--output", "out.parquet", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert ended.json["columns"]["x"]["filled"] == 1
    assert ended.json["columns"]["code"]["unseen"] == 0
    assert pq.read_table("out.parquet")["id"].to_pylist() == ["00000", "00001", "00002", "00003"]


def test_the_name_of_the_output_says_its_format(trainyard: RunCommand) -> None:
    run = train(trainyard, "csv")

    def predict(output: str) -> Path:
        ended = trainyard("predict", run, "--input", "data", "--output", output)
        assert ended.exit_code == 0, ended.stderr
        return Path(output)

    expected = pq.read_table(predict("out.parquet"))
    text = predict("out.csv").read_bytes()
    types = pa_csv.ConvertOptions(column_types=expected.schema)
    assert pa_csv.read_csv("out.csv", convert_options=types) == expected
    assert gzip.decompress(predict("out.csv.gz").read_bytes()) == text
    tabs = pa_csv.ParseOptions(delimiter="\t")
    assert pa_csv.read_csv(predict("out.tsv"), convert_options=types, parse_options=tabs) == expected
    for name in ("out.arrow", "out.feather"):
        with pa.memory_map(str(predict(name))) as file:
            assert pa.ipc.open_file(file).read_all() == expected
    refused = trainyard("predict", run, "--input", "data", "--output", "out.xlsx")
    assert refused.exit_code == 2
    assert ".csv" in refused.stderr


def test_input_that_is_no_table_is_one_message(trainyard: RunCommand) -> None:
    run = train(trainyard, "csv")
    Path("image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 20)
    Path("words.csv").write_text("id,x,n,code\n1,abc,5,000\n")
    for name, message in {"image.png": "is an image, not a table", "words.csv": "column 'x' holds text"}.items():
        ended = trainyard("predict", run, "--input", name, "--output", "out.csv")
        assert (ended.exit_code, message in ended.stderr) == (2, True), ended.stderr
        assert not Path("out.csv").exists()
