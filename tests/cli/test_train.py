"""`train`, `show` and `runs`: their output, and the files of the run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline import train
from pipeline.config import METRICS
from pipeline.errors import Interrupted
from pipeline.events import EvaluationLogged, Event
from pipeline.runs.metric_log.schema import MetricSchema
from tests.cli.command_line import SMALL_JOB, RunCommand, write_job


def test_a_run_leaves_the_documented_files(trainyard: RunCommand, tmp_path: Path) -> None:
    ended = trainyard("train", write_job(tmp_path), "--json")
    assert ended.exit_code == 0, ended.stderr
    result = ended.json
    assert result["status"] == "finished"
    assert (result["step"], result["epoch"], result["attempts"]) == (24, 3, 1)
    assert result["best"]["metric"] == "val/loss"
    parts = [f"{metric}_{name}" for metric in ("recall", "precision") for name in ("outside", "inside")]
    assert set(result["metrics"]) == {f"val/{name}" for name in (*METRICS["multiclass"], *parts)}
    assert result["error"] is None
    run = Path(result["url"])
    assert run == tmp_path / "runs" / result["run"]
    assert result["run"].startswith("small-")
    names = {path.name for path in run.iterdir()}
    assert {"job.yaml", "run.json", "result.json", "splits.parquet", "journal", "metrics", "checkpoints"} <= names
    assert "epoch 3" in ended.stderr
    assert len([line for line in ended.stderr.splitlines() if line.startswith("epoch")]) == 4, "one line per evaluation"


def test_all_parquet_readers_read_each_step_once(trainyard: RunCommand, tmp_path: Path) -> None:
    run = Path(trainyard("train", write_job(tmp_path), "--json").json["url"])
    steps, evals = run / "metrics/steps", run / "metrics/evals"
    assert pd.read_parquet(steps).sort_values("step")["step"].tolist() == list(range(1, 25))
    assert ds.dataset(steps).to_table().num_rows == 24
    assert [len(pd.read_parquet(path)) for path in sorted(steps.iterdir())] == [10, 10, 4], "small files first"
    assert pl.read_parquet(steps / "*.parquet")["samples"].sum() == 3 * 800
    rows = duckdb.connect().execute(f"select step, split, loss from '{evals}/*.parquet' order by step").fetchall()
    assert [(step, split) for step, split, _ in rows] == [(0, "val"), (8, "val"), (16, "val"), (24, "val")]


def test_plain_torch_reproduces_the_recorded_accuracy(trainyard: RunCommand, tmp_path: Path) -> None:
    run = Path(trainyard("train", write_job(tmp_path), "--json").json["url"])
    result = json.loads((run / "result.json").read_text())
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    model.load_state_dict(load_file(run / "checkpoints" / result["chosen"] / "model.safetensors"))
    evaluated = trainyard("evaluate", run.name, "--json").json
    assert evaluated["checkpoint"] == result["chosen"]
    assert evaluated["metrics"]["val/loss"] == result["best"]["value"]
    splits = pd.read_parquet(run / "splits.parquet")
    rows = splits.loc[splits["split"] == "val", "row"].to_numpy()
    from pipeline.config.files import load_job
    from pipeline.data.sources import open_dataset
    from pipeline.data.transforms import fit_input_transform

    job = load_job(tmp_path / "small.yaml")
    source = open_dataset(job)
    train_rows = splits.loc[splits["split"] == "train", "row"].to_numpy()
    prepare = fit_input_transform(job, source, train_rows).make_transform_fn(torch.device("cpu"), torch.float32)
    outputs = model(prepare(torch.from_numpy(source.train.inputs[rows])))
    correct = int((outputs.argmax(1) == torch.from_numpy(source.train.targets[rows])).sum())
    assert evaluated["metrics"]["val/correct"] == correct


def test_repeated_command_is_a_no_op_and_changed_job_is_a_new_run(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    first = trainyard("train", job, "--json").json
    again = trainyard("train", job, "--json")
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    assert again.json["run"] == first["run"]
    assert again.json["attempts"] == 1
    other = trainyard("train", job, "--set", "train.phases.0.lr=0.3", "--json").json
    assert other["run"] != first["run"]
    same = trainyard("train", job, "--set", "checkpoint.keep=1", "--set", "scale.threads=1", "--json").json
    assert same["run"] == first["run"], "fields of where and how to run do not change the identity"
    listed = trainyard("runs")
    assert {first["run"], other["run"]} <= set(listed.stdout.split())
    assert {run["run"] for run in trainyard("runs", "--json").json["runs"]} == {first["run"], other["run"]}


def test_name_of_another_job_is_rejected_with_differences(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    assert trainyard("train", job, "--name", "named", "--max-steps", "3").exit_code == 0
    refused = trainyard("train", job, "--name", "named", "--set", "train.batch_size=50")
    assert refused.exit_code == 2
    assert "train.batch_size: 100 in the run, 50 now" in refused.stderr
    assert "max_steps: 3 in the run, None now" in refused.stderr
    assert trainyard("show", "named", "--json").json["step"] == 3


def test_storage_precedence_is_flag_environment_job(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path, storage="./from_job")
    short = ("--max-steps", "1", "--json")
    assert "/from_job/" in trainyard("train", job, *short).json["url"]
    monkeypatch.setenv("TRAINYARD_STORAGE", str(tmp_path / "from_env"))
    assert "/from_env/" in trainyard("train", job, *short).json["url"]
    assert "/from_flag/" in trainyard("train", job, *short, "--storage", "from_flag").json["url"]
    assert "/memory" not in trainyard("runs").stdout


def test_quiet_prints_nothing(trainyard: RunCommand, tmp_path: Path) -> None:
    ended = trainyard("train", write_job(tmp_path), "--quiet", "--max-steps", "2")
    assert ended.stderr == ""
    assert "finished" in ended.stdout


def test_only_evaluate_reads_the_test_split_and_each_read_is_logged(trainyard: RunCommand, tmp_path: Path) -> None:
    run = Path(trainyard("train", write_job(tmp_path), "--json").json["url"])
    assert not (run / "reads").exists()
    assert trainyard("evaluate", run.name, "--split", "val").exit_code == 0
    assert not (run / "reads").exists()
    first = trainyard("evaluate", run.name, "--split", "test", "--json").json
    assert first["metrics"]["test/samples"] == 1000
    trainyard("evaluate", str(run), "--split", "test", "--checkpoint", "last")
    assert sorted(path.name for path in (run / "reads").iterdir()) == ["00000001.json", "00000002.json"]
    assert json.loads((run / "reads/00000001.json").read_text())["checkpoint"] == first["checkpoint"]


def test_nonfinite_loss_fails_with_its_step(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(tmp_path, train={**SMALL_JOB["train"], "phases": [{"epochs": 3, "lr": 1e30}]})
    ended = trainyard("train", job, "--json", "--name", "wild")
    assert ended.exit_code == 1
    assert "at step" in ended.stderr
    assert "learning rate 1e+30" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.json["error"]["type"] == "NotFiniteError"
    shown = trainyard("show", "wild", "--json").json
    assert shown["status"] == "failed"
    assert "learning rate" in shown["error"]["message"]
    text = trainyard("show", "wild").stdout
    assert "the same command would fail there again" in text
    assert "resumes from" not in text


def test_run_that_only_worsens_recommends_no_checkpoint(trainyard: RunCommand, tmp_path: Path) -> None:
    train = {**SMALL_JOB["train"], "phases": [{"steps": 6, "lr": 100.0}]}
    job = write_job(tmp_path, train=train, evaluate={"every_steps": 2})
    ended = trainyard("train", job, "--json")
    rows = pd.read_parquet(Path(ended.json["url"]) / "metrics/evals").sort_values("step")
    before, *after = rows["loss"]
    assert min(after) > before, "the premise of this test"
    lines = [line for line in ended.stderr.splitlines() if line.startswith("epoch")]
    assert [line.endswith("  no better than before training") for line in lines] == [False, True, True, True]
    no_gain = f"no evaluation is better than before training (val/loss {before:.4f})"
    assert f"warning: {no_gain}: the learning rate, 100 now, may be too high" in ended.stderr
    assert (ended.json["best"]["value"], ended.json["best"]["before_training"]) == (min(after), before)
    assert f"  warning   {no_gain}" in trainyard("show", ended.json["run"]).stdout
    train["phases"].append({"steps": 9, "lr": 1e30})
    diverged = trainyard("train", write_job(tmp_path, train=train, evaluate={"every_steps": 2}), "--name", "wild")
    assert diverged.exit_code == 1
    assert f"{no_gain}, so no checkpoint is worth starting from" in diverged.stderr
    assert "init_from" not in diverged.stderr + trainyard("show", "wild").stdout
    good = trainyard("train", write_job(tmp_path), "--json")
    assert "before training" not in good.stderr + trainyard("show", good.json["run"]).stdout


def test_best_is_the_earliest_optimum_and_patience_stops(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        train={**SMALL_JOB["train"], "phases": [{"epochs": 200, "lr": 0.5}]},
        evaluate={"every_steps": 4},
        best={"metric": "val/accuracy", "mode": "max", "patience": 3},
    )
    ended = trainyard("train", job, "--json")
    result = ended.json
    evals = pd.read_parquet(Path(result["url"]) / "metrics/evals").sort_values("step")
    trained = [row for row in evals.to_dict("records") if row["step"] > 0]
    best = max(trained, key=lambda row: (row["accuracy"], -row["step"]))
    assert result["best"]["step"] == best["step"]
    assert result["step"] == result["best"]["step"] + 12 < 1600
    assert (result["stopped_early"], result["evaluations_since_best"]) == (True, 3)
    reason = "3 evaluations without a better val/accuracy"
    assert f"early stop at step {result['step']} of 1600: {reason}" in ended.stderr
    assert f"  stopped   early, of 1600 steps: {reason}" in trainyard("show", result["run"]).stdout
    assert "early" not in trainyard("train", write_job(tmp_path)).stdout


OUT_OF_MEMORY_MODULE = """
import torch

class Hungry(torch.nn.Module):
    def __init__(self, input_shape, outputs):
        super().__init__()
        self.layer = torch.nn.Linear(2, outputs)

    def forward(self, inputs):
        if self.training:
            torch.empty(1 << 50)
        return self.layer(inputs)
"""


def test_out_of_memory_names_settings_to_lower(trainyard: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "hungry_model.py").write_text(OUT_OF_MEMORY_MODULE)
    job = write_job(tmp_path, model={"kind": "hungry_model:Hungry"}, code=".")
    ended = trainyard("train", job)
    assert ended.exit_code == 1
    assert "train.batch_size: 100: out of memory on cpu, with micro-batches of 100 samples" in ended.stderr
    assert "train.micro_batch: 50" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "failed" in trainyard("runs").stdout


CUSTOM_METRICS = "tests.training.custom_metrics"


def test_fp16_counts_skipped_updates(trainyard: RunCommand, tmp_path: Path) -> None:
    train = {**SMALL_JOB["train"], "precision": "fp16", "phases": [{"epochs": 3, "lr": 1e-4}]}
    job = write_job(tmp_path, train=train, task={"loss": f"{CUSTOM_METRICS}:steep"})
    ended = trainyard("train", job, "--json")
    result = ended.json
    skipped = pd.read_parquet(Path(result["url"]) / "metrics/steps").sort_values("step")["skipped"]
    assert result["skipped_updates"] >= skipped.max() > 0
    count = result["skipped_updates"]
    assert f"  skipped   {count} updates" in trainyard("show", result["run"]).stdout
    assert trainyard("show", result["run"], "--json").json["skipped_updates"] == count
    assert trainyard("train", write_job(tmp_path), "--json").json["skipped_updates"] is None


def test_fp16_run_of_an_earlier_version_is_resumed(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_job = MetricSchema.from_job
    monkeypatch.setattr(MetricSchema, "from_job", lambda *args: replace(from_job(*args), steps={}))
    result = trainyard("train", write_job(tmp_path, train={**SMALL_JOB["train"], "precision": "fp16"}), "--json").json
    assert (result["status"], result["skipped_updates"]) == ("finished", 0)
    assert "loss_scale" not in pd.read_parquet(Path(result["url"]) / "metrics/steps")


def test_interrupted_run_of_a_version_with_fewer_metrics_is_resumed(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log keeps its columns; weights and the other metrics are those of a run of this version."""
    job = write_job(tmp_path, checkpoint={"every_epochs": 1})
    whole = Path(trainyard("train", job, "--name", "whole", "--json").json["url"])
    columns = MetricSchema(evaluations=dict.fromkeys(["f1", "auc"], "float64"))

    def stop(event: Event) -> None:
        if isinstance(event, EvaluationLogged) and event.step >= 16:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricSchema, "from_job", lambda *args: columns)
        with pytest.raises(Interrupted):
            train(job, name="older", storage=str(tmp_path / "runs"), on_event=stop)
    for workers in (0, 2):
        resumed = trainyard("train", job, "--name", "older", "--set", f"scale.workers={workers}", "--json")
        assert (resumed.exit_code, resumed.json["status"]) == (0, "finished"), resumed.stderr
        message = "this run was begun by a version that did not measure balanced_accuracy, average_precision"
        assert resumed.stderr.count(message) == (1 if workers == 0 else 0), "nothing to do the second time"
    rows, expected = (
        pd.read_parquet(run / "metrics/evals").sort_values("step", ignore_index=True)
        for run in (tmp_path / "runs/older", whole)
    )
    assert "auc" in rows
    assert "average_precision" not in rows
    names = ["step", "loss", "accuracy", "f1", "auc"]
    pd.testing.assert_frame_equal(rows[names], expected[names])


GRADIENTLESS_MODULE = """
import torch

class Gradientless(torch.nn.Module):
    def __init__(self, input_shape, outputs):
        super().__init__()
        self.layer = torch.nn.Linear(2, outputs)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs + (outputs - outputs.detach()).square().sqrt()
"""
"""Finite outputs, gradients that are always NaN."""


@pytest.mark.parametrize(
    ("epochs", "message"),
    [(3, "all 24 updates were skipped"), (9, "layer.weight, layer.bias are not finite at step 32")],
)
def test_fp16_reports_a_model_without_gradients(
    trainyard: RunCommand, tmp_path: Path, epochs: int, message: str
) -> None:
    train = {**SMALL_JOB["train"], "precision": "fp16", "phases": [{"epochs": epochs, "lr": 0.1}]}
    (tmp_path / "gradientless_model.py").write_text(GRADIENTLESS_MODULE)
    job = write_job(tmp_path, train=train, model={"kind": "gradientless_model:Gradientless"}, code=".")
    ended = trainyard("train", job, "--json")
    assert (ended.exit_code, ended.json["error"]["type"]) == (1, "NotFiniteError")
    assert message in ended.stderr
    assert "bf16" in ended.stderr
    again = trainyard("train", job, "--json")  # from the last checkpoint
    assert (again.exit_code, again.stderr.splitlines()[-2:]) == (1, ended.stderr.splitlines()[-2:])


@pytest.mark.parametrize(
    ("changes", "threads"),
    [
        ({}, 1),
        ({"model": {"hidden": [1024, 1024]}}, 3),
        ({"model": {"hidden": [1024, 1024]}, "train": {**SMALL_JOB["train"], "micro_batch": 70}}, 2),
        ({"model": {"hidden": [1024, 1024]}, "scale": {"threads": 1}}, 1),
        ({"scale": {"threads": 2}}, 2),
    ],
)
def test_thread_count_depends_on_the_model(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], threads: int
) -> None:
    monkeypatch.setattr("pipeline.setup.model.available_cpus", lambda: 4)
    before = torch.get_num_threads()
    run = Path(trainyard("train", write_job(tmp_path, **changes), "--max-steps", "1", "--json").json["url"])
    torch.set_num_threads(before)
    assert json.loads((run / "journal/00000001.json").read_text())["facts"]["threads"] == threads


def test_run_of_many_epochs_prints_about_a_hundred_lines(trainyard: RunCommand, tmp_path: Path) -> None:
    train = {"batch_size": "all", "phases": [{"epochs": 120, "lr": 0.1}, {"epochs": 121, "lr": 0.05}]}
    ended = trainyard("train", write_job(tmp_path, train=train), "--json")
    epochs = [int(line.split()[1]) for line in ended.stderr.splitlines() if line.startswith("epoch")]
    assert epochs == sorted({*range(0, 241, 5), 121, 241})
    assert "1 in 5 of 241 evaluations is shown here" in ended.stderr
    assert len(pd.read_parquet(Path(ended.json["url"]) / "metrics/evals")) == 242
