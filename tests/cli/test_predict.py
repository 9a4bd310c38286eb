"""`predict` and `evaluate --data` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import load
from pipeline.errors import DataError
from pipeline.inference.predictor import Predictor
from tests.cli.command_line import RunCommand

JOB = """
name: small
data: {source: parquet, url: URL, label: color, keys: [id], splits: {val: 0.25}}
train: {batch_size: 20, phases: [{epochs: 3, lr: 0.5}]}
"""


def make_table(rows: int = 200, seed: int = 0) -> pa.Table:
    x = np.random.default_rng(seed).normal(size=rows)
    return pa.table({"id": np.arange(rows), "x": x, "color": np.where(x > 0.3, "red", "blue")})


@pytest.fixture
def run_name(trainyard: RunCommand, tmp_path: Path) -> str:
    pq.write_table(make_table(), tmp_path / "colors.parquet")
    (tmp_path / "job.yaml").write_text(JOB.replace("URL", "colors.parquet"))
    ended = trainyard("train", "job.yaml", "--json")
    assert ended.exit_code == 0, ended.stderr
    return str(ended.json["run"])


def test_predictions_are_written_with_their_keys_in_order(trainyard: RunCommand, tmp_path: Path, run_name: str) -> None:
    (tmp_path / "new").mkdir()
    new = make_table(100, seed=1).drop_columns("color")
    pq.write_table(new.slice(0, 60), tmp_path / "new" / "a.parquet")
    pq.write_table(new.slice(60), tmp_path / "new" / "b.parquet")
    ended = trainyard("predict", run_name, "--input", "new", "--output", "out.parquet", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert ended.json["rows"] == 100
    out = pq.read_table("out.parquet")
    assert out.schema.names == ["id", "prediction", "probability_blue", "probability_red", "uncertainty"]
    assert out["id"].to_pylist() == list(range(100))
    predictions = np.array(out["prediction"].to_pylist())
    assert np.mean(predictions == np.where(new["x"].to_numpy() > 0.3, "red", "blue")) > 0.8
    assert [path for path in tmp_path.iterdir() if "tmp" in path.name and path.name != ".tmp"] == []


def test_evaluation_of_copied_data_matches(trainyard: RunCommand, tmp_path: Path, run_name: str) -> None:
    splits = pq.read_table(f"runs/{run_name}/splits.parquet").to_pandas()
    held = splits[splits.split == "val"].row.to_numpy()
    pq.write_table(make_table().take(held), tmp_path / "held.parquet")
    copied = trainyard("evaluate", run_name, "--data", "held.parquet", "--json").json["metrics"]
    metrics = trainyard("evaluate", run_name, "--json").json["metrics"]
    assert copied["data/samples"] == len(held)
    for name in ("loss", "accuracy", "f1", "auc"):
        assert copied[f"data/{name}"] == pytest.approx(metrics[f"val/{name}"], abs=1e-9)


def test_evaluation_needs_only_features_and_label_in_any_order(trainyard: RunCommand, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    columns = {
        "id": np.arange(300),
        "day": pa.array(np.datetime64("2026-01-01") + np.arange(300)),
        "plan": [f"p{number}" for number in draw.integers(0, 3, 300)],
        "x": draw.normal(size=300),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(draw.normal(size=600)), 2),
    }
    columns["color"] = np.where(columns["x"] > 0.3, "red", "blue")
    pq.write_table(pa.table(columns), tmp_path / "days.parquet")
    job = JOB.replace("URL", "days.parquet").replace("{val: 0.25}", "{by: time, column: day, val: 60d}")
    (tmp_path / "days.yaml").write_text(job)
    run = trainyard("train", "days.yaml", "--json").json["run"]
    held = pa.table(columns).slice(240).select(["vector", "color", "x", "plan"])
    pq.write_table(held, tmp_path / "held.parquet")
    ended = trainyard("evaluate", run, "--data", "held.parquet", "--json")
    assert ended.exit_code == 0, ended.stderr
    metrics = trainyard("evaluate", run, "--json").json["metrics"]
    assert ended.json["metrics"]["data/samples"] == metrics["val/samples"] == 60
    assert ended.json["metrics"]["data/loss"] == pytest.approx(metrics["val/loss"], abs=1e-9)
    assert trainyard("predict", run, "--input", "held.parquet", "--output", "out.parquet").exit_code == 0
    names = ["prediction", "probability_blue", "probability_red", "uncertainty"]
    assert pq.read_table("out.parquet").schema.names == names


@pytest.mark.parametrize("kind", ["bytes", "numbers"])
def test_predict_single_column_samples(trainyard: RunCommand, tmp_path: Path, kind: str) -> None:
    draw = np.random.default_rng(0)
    red = draw.integers(0, 2, 200)
    pixels = (draw.integers(0, 100, (200, 16)) + 120 * red[:, None]).astype(np.uint8)
    if kind == "bytes":
        samples: Any = pa.array([row.tobytes() for row in pixels], pa.binary(16))
    else:
        samples = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1) / 255), 16)
    images = pa.table({"id": np.arange(200), "image": samples, "color": np.where(red, "red", "blue")})
    pq.write_table(images, tmp_path / "images.parquet")
    (tmp_path / "images.yaml").write_text(
        JOB.replace("URL", "images.parquet").replace("keys: [id]", "keys: [id], shape: [1, 4, 4]")
        + "model: {kind: cnn, conv: [{channels: 2, kernel: 3}], hidden: [4]}\n"
    )
    trained = trainyard("train", "images.yaml", "--json")
    assert trained.exit_code == 0, trained.stderr
    run = trained.json["run"]
    ended = trainyard("predict", run, "--input", "images.parquet", "--output", "out.parquet")
    assert ended.exit_code == 0, ended.stderr
    out = pq.read_table("out.parquet")
    assert out["id"].to_pylist() == list(range(200))
    model = load(trained.json["url"])
    arrays = pixels.reshape(-1, 1, 4, 4) if kind == "bytes" else (pixels / 255).astype(np.float32).reshape(-1, 1, 4, 4)
    assert out["prediction"].to_pylist() == model.predict(arrays).tolist() == model.predict(images).tolist()
    assert model.predict(images.to_pandas()).tolist() == model.predict(arrays).tolist()
    for wrong in (images.drop_columns("image"), images.append_column("other", samples)):
        with pytest.raises(DataError, match="could be the samples"):
            model.predict(wrong)
    with pytest.raises(DataError, match=r"16|wanted"):
        model.predict(images.set_column(1, "image", pa.array([b"short"] * 200)))


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["predict", "RUN", "--input", "none.parquet", "--output", "out.parquet"], ["none.parquet"]),
        (["predict", "RUN", "--input", "colors.parquet", "--output", "out.txt"], ["--output", ".parquet, .csv"]),
        (["predict", "RUN@77", "--input", "colors.parquet", "--output", "o.parquet"], ["no checkpoint '77'"]),
        (["predict", "none", "--input", "colors.parquet", "--output", "o.parquet"], ["no such run"]),
        (["predict", "RUN", "--input", "other.parquet", "--output", "o.parquet"], ["no column 'x'"]),
        (["evaluate", "RUN", "--data", "other.parquet"], ["x"]),
        (["evaluate", "RUN", "--data", "green.parquet"], ["'green'", "blue, red"]),
    ],
)
def test_invalid_arguments_are_one_message(
    trainyard: RunCommand, tmp_path: Path, run_name: str, arguments: list[str], messages: list[str]
) -> None:
    pq.write_table(make_table().rename_columns(["id", "y", "color"]), tmp_path / "other.parquet")
    pq.write_table(pa.table({"id": [1, 2], "x": [0.0, 1.0], "color": ["green", "red"]}), tmp_path / "green.parquet")
    ended = trainyard(*[argument.replace("RUN", run_name) for argument in arguments])
    assert ended.exit_code == 2
    assert "Traceback" not in ended.stderr
    for message in messages:
        assert message in ended.stderr
    assert not Path("o.parquet").exists()


def test_unseen_values_are_reported(trainyard: RunCommand, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x, work = draw.normal(size=200), draw.choice(["Private", "State"], 200)
    rows = {"id": np.arange(200), "x": x, "work": work, "color": np.where(x + (work == "State") > 0.3, "red", "blue")}
    pq.write_table(pa.table(rows), tmp_path / "work.parquet")
    (tmp_path / "work.yaml").write_text(JOB.replace("URL", "work.parquet"))
    run = trainyard("train", "work.yaml", "--json").json["run"]
    usual = trainyard("evaluate", run, "--json")
    assert usual.json["columns"]["work"] == {"rows": 50, "unseen": 0.0, "filled": 0.0, "outside": 0.0}
    assert usual.json["warnings"] == []
    assert "warning" not in usual.stderr
    changed = {"work": [f" {text}" for text in work], "x": np.where(x > 0, 1000 * x, np.nan)}
    pq.write_table(pa.table({**rows, **changed}), tmp_path / "other.parquet")
    for command in (
        ("evaluate", run, "--data", "other.parquet"),
        ("predict", run, "--input", "other.parquet", "--output", "out.parquet"),
    ):
        ended = trainyard(*command, "--json", "--quiet")
        assert ended.exit_code == 0
        columns = ended.json["columns"]
        assert columns["work"] == {"rows": 200, "unseen": 1.0, "filled": 0.0, "outside": 0.0}
        assert columns["x"]["filled"] == np.mean(x <= 0)
        assert columns["x"]["outside"] == pytest.approx(np.mean(x > 0), abs=0.02)
        assert len(ended.json["warnings"]) == 3
        assert "warning: column 'work': all of 200 values were never seen in training, such as ' " in ended.stderr
        assert "column 'work': all never seen in training" in trainyard(*command).stdout
    pq.write_table(pa.table({**rows, "work": np.arange(200)}), tmp_path / "numbers.parquet")
    refused = trainyard("predict", run, "--input", "numbers.parquet", "--output", "out.parquet")
    assert refused.exit_code == 2
    assert "'work' holds whole numbers (int64), but held text in training" in refused.stderr
    refused = trainyard("evaluate", run, "--data", "numbers.parquet")
    assert refused.exit_code == 2
    assert "'work' holds numbers, in training holds text or categories" in refused.stderr


def write_parts(folder: Path, *keys: pa.Array) -> None:
    """Write a file of two rows for each key column."""
    folder.mkdir(exist_ok=True)
    for number, key in enumerate(keys):
        pq.write_table(pa.table({"id": key, "x": [0.0, 1.0]}), folder / f"{number}.parquet")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (pa.array([1, 2], pa.int32()), pa.array([2**40, 4], pa.int64()), pa.int64()),
        (pa.array([2**40, 4]), pa.array([1, 2], pa.int8()), pa.int64()),
        (pa.array(["a", "b"]).dictionary_encode(), pa.array(["c", "a"]), pa.string()),
        (pa.array(["c", "a"]), pa.array(["a", "b"], pa.dictionary(pa.int8(), pa.large_string())), pa.string()),
        (pa.array([1, 2]), pa.array([3.0, None]), pa.float64()),
        (pa.nulls(2), pa.array(["a", "b"]), pa.string()),
    ],
    ids=["wider", "narrower", "dictionary", "dictionary of other text", "floats", "nulls"],
)
def test_keys_of_several_files_have_one_type(
    trainyard: RunCommand, tmp_path: Path, run_name: str, first: pa.Array, second: pa.Array, expected: pa.DataType
) -> None:
    write_parts(tmp_path / "new", first, second)
    ended = trainyard("predict", run_name, "--input", "new", "--output", "out.parquet")
    assert ended.exit_code == 0, ended.stderr
    keys = pq.read_table("out.parquet")["id"]
    assert keys.type == expected
    assert keys.to_pylist() == [*first.to_pylist(), *second.to_pylist()]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (pa.array(["a", "b"]), "the key 'id' is string in this file, but int64 in"),
        (pa.array([0.5, 1.5]), "the key 'id' is int64 in this file and becomes double"),
        (None, "the key 'id' is not in this file, but in others"),
    ],
)
def test_conflicting_keys_are_rejected_before_predicting(
    trainyard: RunCommand,
    tmp_path: Path,
    run_name: str,
    monkeypatch: pytest.MonkeyPatch,
    second: pa.Array | None,
    message: str,
) -> None:
    write_parts(tmp_path / "new", pa.array([2**53 + 1, 1]), pa.nulls(2) if second is None else second)
    if second is None:
        pq.write_table(pa.table({"x": [0.0, 1.0]}), tmp_path / "new" / "1.parquet")

    def predict(*_: Any) -> None:
        raise AssertionError("predicts before the check")

    monkeypatch.setattr(Predictor, "predict_scores", predict)
    ended = trainyard("predict", run_name, "--input", "new", "--output", "out.parquet")
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert not Path("out.parquet").exists()


def test_file_with_other_columns_is_rejected_before_predicting(
    trainyard: RunCommand, tmp_path: Path, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(tmp_path / "new", pa.array([1, 2]), pa.array([3, 4]))
    monkeypatch.setattr(Predictor, "predict_scores", None)
    for table, message in (
        (pa.table({"id": [3, 4], "y": [0.0, 1.0]}), "1.parquet: there is no column 'x'"),
        (pa.table({"id": [3, 4], "x": ["a", "b"]}), "1.parquet: the column 'x' holds text"),
    ):
        pq.write_table(table, tmp_path / "new" / "1.parquet")
        ended = trainyard("predict", run_name, "--input", "new", "--output", "out.parquet")
        assert ended.exit_code == 2
        assert message in ended.stderr


def test_unused_columns_may_differ_between_files(trainyard: RunCommand, tmp_path: Path, run_name: str) -> None:
    write_parts(tmp_path / "new", pa.array([1, 2]), pa.array([3, 4]))
    pq.write_table(pa.table({"note": ["a", "b"], "id": [1, 2], "x": [0.0, 1.0]}), tmp_path / "new" / "0.parquet")
    assert trainyard("predict", run_name, "--input", "new", "--output", "out.parquet").exit_code == 0
    assert pq.read_table("out.parquet")["id"].to_pylist() == [1, 2, 3, 4]


def test_missing_key_is_reported(trainyard: RunCommand, tmp_path: Path, run_name: str) -> None:
    pq.write_table(pa.table({"ids": [1, 2], "x": [0.0, 1.0]}), tmp_path / "new.parquet")
    ended = trainyard("predict", run_name, "--input", "new.parquet", "--output", "out.parquet", "--json", "--quiet")
    assert ended.exit_code == 0
    assert "warning: the key 'id' is not in" in ended.stderr
    assert "did you mean ids?" in ended.json["warnings"][0]


def test_keys_named_like_prediction_columns_are_kept(trainyard: RunCommand, tmp_path: Path) -> None:
    rows = {name: np.arange(200) for name in ("prediction", "probability_red", "key_prediction")}
    columns = {**rows, **{name: make_table()[name] for name in ("x", "color")}}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    job = JOB.replace("URL", "c.parquet").replace("[id]", f"[{', '.join(rows)}]")
    (tmp_path / "named.yaml").write_text(job)
    run = trainyard("train", "named.yaml", "--json").json["run"]
    ended = trainyard("predict", run, "--input", "c.parquet", "--output", "out.parquet")
    assert ended.exit_code == 0
    assert "warning: the key 'prediction' is named 'key_key_prediction' in the output" in ended.stderr
    out = pq.read_table("out.parquet")
    assert out.schema.names == [
        *("key_key_prediction", "key_probability_red", "key_prediction"),
        *("prediction", "probability_blue", "probability_red", "uncertainty"),
    ]
    assert out["key_key_prediction"].to_pylist() == list(range(200))
    assert set(out["prediction"].to_pylist()) == {"red", "blue"}


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("data/new.parquet", "data/new.parquet", "is a file of the input, which it would replace"),
        ("data/new.parquet", "./data/../data/new.parquet", "is a file of the input"),
        ("data/new.parquet", "link/new.parquet", "is a file of the input"),
        ("data", "data/new.parquet", "is a file of the input"),
        ("data", "data/out.parquet", "is in the input's folder"),
        ("data/", "data/deep/out.parquet", "is in the input's folder"),
        (".", "out.parquet", "is in the input's folder"),
        ("data/*.parquet", "data/out.parquet", "matches the input's glob"),
        ("link/*.parquet", "data/out.parquet", "matches the input's glob"),
        ("*", "data/out.parquet", "matches the input's glob"),
        ("whole.parquet/a", "whole.parquet", "is a folder"),
        ("data/new.parquet", "data/new.parquet/out.parquet", "data/new.parquet"),
    ],
)
def test_output_never_replaces_its_input(
    trainyard: RunCommand, tmp_path: Path, run_name: str, source: str, output: str, message: str
) -> None:
    for path in ("data/new.parquet", "whole.parquet/a/new.parquet"):
        (tmp_path / path).parent.mkdir(parents=True)
        pq.write_table(make_table(20).drop_columns("color"), tmp_path / path)
    (tmp_path / "link").symlink_to("data")
    before = (tmp_path / "data" / "new.parquet").read_bytes()
    ended = trainyard("predict", run_name, "--input", source, "--output", output)
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "data" / "new.parquet").read_bytes() == before


def test_output_next_to_its_input_is_allowed(trainyard: RunCommand, tmp_path: Path, run_name: str) -> None:
    pq.write_table(make_table(20), tmp_path / "new.parquet")
    (tmp_path / "new").mkdir()
    pq.write_table(make_table(20), tmp_path / "new" / "a.parquet")
    for source in ("new.parquet", "new", "n*w/*.parquet"):
        for output in ("out.parquet", "new2/out.parquet", "out.parquet"):
            assert trainyard("predict", run_name, "--input", source, "--output", output).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "new2").iterdir() if path.name != ".tmp") == ["out.parquet"]


def test_output_never_replaces_an_input_in_object_storage(
    trainyard: RunCommand, tmp_path: Path, run_name: str, s3_url: str
) -> None:
    import fsspec

    pq.write_table(make_table(20), tmp_path / "new.parquet")
    fs, path = fsspec.core.url_to_fs(s3_url)
    fs.put(str(tmp_path / "new.parquet"), f"{path}/new/a.parquet")
    for source, output in (("new/a.parquet", "new/a.parquet"), ("new", "new/b.parquet"), ("new/*", "new/b.parquet")):
        ended = trainyard("predict", run_name, "--input", f"{s3_url}/{source}", "--output", f"{s3_url}/{output}")
        assert ended.exit_code == 2
        assert "input" in ended.stderr
    assert (
        trainyard("predict", run_name, "--input", f"{s3_url}/new", "--output", f"{s3_url}/out.parquet").exit_code == 0
    )
    assert trainyard("predict", run_name, "--input", f"{s3_url}/new", "--output", "new.parquet").exit_code == 0


def test_unwritable_output_is_rejected_before_predicting(
    trainyard: RunCommand, tmp_path: Path, run_name: str, monkeypatch: pytest.MonkeyPatch, s3_endpoint: str
) -> None:
    pq.write_table(make_table(20), tmp_path / "new.parquet")
    monkeypatch.setattr(Predictor, "predict_scores", None)
    for output in ("new.parquet/out.parquet", "s3://no-such-bucket-of-ours/out.parquet"):
        ended = trainyard("predict", run_name, "--input", "new.parquet", "--output", output)
        assert ended.exit_code == 2
        assert f"--output {output}" in ended.stderr
