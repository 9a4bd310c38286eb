"""Commands with an object store: a real S3 server on the loopback interface."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tests.cli.command_line import RunCommand, write_job


def test_train_show_evaluate_and_load_on_s3(trainyard: RunCommand, tmp_path: Path, s3_url: str) -> None:
    job = write_job(tmp_path)
    storage = ("--storage", s3_url)
    trained = trainyard("train", job, *storage, "--json")
    assert trained.exit_code == 0, trained.stderr
    result = trained.json
    assert result["status"] == "finished"
    assert result["url"] == f"{s3_url}/{result['run']}"
    assert "nothing to do" in trainyard("train", job, *storage).stderr
    assert trainyard("show", result["url"], "--json").json["step"] == 24
    assert [run["run"] for run in trainyard("runs", *storage, "--json").json["runs"]] == [result["run"]]
    evaluated = trainyard("evaluate", result["url"], "--json").json
    assert evaluated["metrics"]["val/loss"] == result["best"]["value"]
    steps = pd.read_parquet(f"{result['url']}/metrics/steps")
    assert sorted(steps["step"]) == list(range(1, 25))
    assert not list(tmp_path.glob("runs*")), "nothing is written on this machine"


def test_weights_do_not_depend_on_the_storage(trainyard: RunCommand, tmp_path: Path, s3_url: str) -> None:
    import fsspec

    job = write_job(tmp_path)
    local = trainyard("train", job, "--json").json
    remote = trainyard("train", job, "--storage", s3_url, "--json").json
    name = f"checkpoints/{local['checkpoint']}/model.safetensors"
    with fsspec.open(f"{remote['url']}/{name}", "rb") as file:
        assert file.read() == (Path(local["url"]) / name).read_bytes()
