"""Initial weights and user code on the command line: warm starts, mismatches, and what the run stores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline.config import compute_identity, digest_tree
from pipeline.config.files import parse_job
from pipeline.errors import JobError
from pipeline.models import build_model
from pipeline.runs.checkpoints.checkpoint import find_checkpoint
from pipeline.runs.journal.entries import Claim
from pipeline.runs.run import Run, open_run
from pipeline.setup.initial_weights import InitialWeights, compute_weights_digest, load_matching_weights
from pipeline.storage import Storage
from pipeline.training.engine import TrainEngine
from tests.cli.command_line import SMALL_JOB, RunCommand, write_job
from tests.runs.factories import read_entries
from tests.training.factories import make_job

SHORT_TRAIN = {**SMALL_JOB["train"], "phases": [{"epochs": 1, "lr": 0.1}]}


def read_weights(run: str | Path, which: str = "last") -> dict[str, torch.Tensor]:
    result = json.loads((Path(run) / "result.json").read_text())
    return load_file(Path(run) / "checkpoints" / result[which] / "model.safetensors")


def write_changed_job(folder: Path, name: str, **tree: Any) -> str:
    """Write a job file like `write_job`, under another name, and return its path."""
    path = folder / name
    path.write_text(yaml.safe_dump({**SMALL_JOB, "train": SHORT_TRAIN, **tree}))
    return str(path)


def test_warm_start_loads_the_named_checkpoint(trainyard: RunCommand, tmp_path: Path) -> None:
    base = trainyard("train", write_job(tmp_path, checkpoint={"keep": 3}), "--name", "base", "--json").json
    frozen = {"hidden": [16], "freeze": "backbone"}
    heads = {}
    for spec, which in (("base", "chosen"), ("base@last", "last"), (base["url"] + "@best", "chosen"), ("base@8", "")):
        job = write_changed_job(tmp_path, "warm.yaml", model={**frozen, "init_from": spec})
        ended = trainyard("train", job, "--json")
        assert ended.exit_code == 0, ended.stderr
        initial = read_weights(base["url"], which) if which else None
        trained = read_weights(ended.json["url"])
        heads[spec] = trained["2.weight"]
        if initial is not None:
            assert torch.equal(trained["0.weight"], initial["0.weight"]), "frozen parameters keep their initial values"
            assert not torch.equal(trained["2.weight"], initial["2.weight"])
            assert (trained["2.weight"] - initial["2.weight"]).norm() < initial["2.weight"].norm()
    assert not torch.equal(heads["base@8"], heads["base@last"])
    assert trainyard("check", job, "--batch").exit_code == 0


def test_moving_job_data_and_initial_weights_keeps_the_identity(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in a job file are relative to it, and no part of the run's identity."""
    job_folder = tmp_path / "project/jobs"
    job_folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    pq.write_table(pa.table({"x": draw.normal(size=90), "y": draw.integers(0, 2, 90)}), job_folder / "rows.parquet")
    tree = {"data": {"source": "parquet", "url": "rows.parquet", "label": "y"}, "model": {"kind": "mlp"}}
    (job_folder / "base.yaml").write_text(yaml.safe_dump({"name": "base", **tree}))
    warm = {"base": "base.yaml", "name": "warm", "model": {"init_from": "../runs/initial@last"}}
    (job_folder / "warm.yaml").write_text(yaml.safe_dump(warm))
    initial = trainyard(
        "train", str(job_folder / "base.yaml"), "--storage", "project/runs", "--name", "initial", "--max-steps", "2"
    )
    assert initial.exit_code == 0, initial.stderr
    runs = ("--storage", str(tmp_path / "all"), "--max-steps", "3", "--json")
    first = trainyard("train", "project/jobs/warm.yaml", *runs)
    assert first.exit_code == 0, first.stderr
    assert trainyard("evaluate", first.json["url"], "--json").exit_code == 0
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    again = trainyard("train", "jobs/warm.yaml", *runs)
    assert (again.exit_code, again.json["run"], "nothing to do" in again.stderr) == (0, first.json["run"], True), (
        again.stderr
    )
    typed = trainyard("train", "jobs/warm.yaml", "--set", "data.url=jobs/rows.parquet", *runs)
    assert (typed.exit_code, typed.json["run"]) == (0, first.json["run"]), typed.stderr


def test_other_initial_weights_are_another_run(trainyard: RunCommand, tmp_path: Path) -> None:
    write_job(tmp_path)
    for name, lr in (("base", 0.1), ("other", 0.2)):
        trainyard("train", "small.yaml", "--name", name, "--set", f"train.phases.0.lr={lr}", "--max-steps", "4")
    job = write_changed_job(tmp_path, "warm.yaml", model={"hidden": [16], "init_from": "base"})
    first = trainyard("train", job, "--json").json["run"]
    assert trainyard("train", job, "--json").json["run"] == first
    # The same name, but other weights:
    (tmp_path / "runs/base").rename(tmp_path / "runs/was")
    (tmp_path / "runs/other").rename(tmp_path / "runs/base")
    assert trainyard("train", job, "--json").json["run"] != first
    refused = trainyard("train", job, "--name", first)
    assert refused.exit_code == 2
    assert "start: " in refused.stderr
    assert trainyard("evaluate", first).exit_code == 0, "a finished run does not need its initial weights"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no such run"),
        ("base@7", "the run has no checkpoint '7'"),
        ("base@newest", "the run has no checkpoint 'newest'"),
        ("damaged", "was altered"),
    ],
)
def test_missing_initial_weights_are_invalid_input(
    spec: str, message: str, trainyard: RunCommand, tmp_path: Path
) -> None:
    trainyard("train", write_job(tmp_path), "--name", spec.partition("@")[0] if spec != "nowhere" else "any")
    for file in tmp_path.glob("runs/damaged/checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    refused = trainyard("train", write_changed_job(tmp_path, "warm.yaml", model={"hidden": [16], "init_from": spec}))
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_mismatched_weights_are_named_and_skipped_if_not_strict(trainyard: RunCommand, tmp_path: Path) -> None:
    base = trainyard("train", write_job(tmp_path), "--name", "base", "--json").json
    job = write_changed_job(tmp_path, "warm.yaml", model={"hidden": [16, 5], "init_from": "base@last"})
    refused = trainyard("train", job)
    assert refused.exit_code == 2
    for text in ("missing there: 4.weight, 4.bias", "2.weight (2, 16), in this model (5, 16)", "model.strict: false"):
        assert text in refused.stderr
    loaded = trainyard("train", job, "--set", "model.strict=false", "--set", "model.freeze=[0.*]", "--json")
    assert loaded.exit_code == 0, loaded.stderr
    assert "not loaded from base at step 24: missing there: 4.weight, 4.bias" in loaded.stderr
    assert torch.equal(read_weights(loaded.json["url"])["0.weight"], read_weights(base["url"])["0.weight"])


def test_no_matching_weights_is_an_error_even_if_not_strict() -> None:
    model = build_model(make_job(), (2,), 2, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {"0.weight": torch.ones(3, 3), "other": torch.ones(1)}
    for strict in (True, False):
        with pytest.raises(JobError, match=r"no tensor of elsewhere fits.*0\.weight \(3, 3\), in this model \(7, 2\)"):
            load_matching_weights(model, InitialWeights(tensors, "", "elsewhere", "model.init_from"), strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_digest_covers_names_types_shapes_and_bytes() -> None:
    tensors = {
        "a": torch.arange(6.0),
        "b": torch.tensor(3),
        "c": torch.ones(0),
        "d": torch.ones(2, dtype=torch.bfloat16),
    }
    digests = [
        compute_weights_digest(other)
        for other in (
            tensors,
            {**tensors, "a": torch.arange(6.0).view(2, 3)},
            {**tensors, "a": torch.arange(6.0).double()},
            {**tensors, "a": torch.arange(6.0) + 1e-6},
            {"z" if name == "b" else name: tensor for name, tensor in tensors.items()},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert compute_weights_digest(dict(reversed(tensors.items()))) == digests[0]
    assert compute_weights_digest({**tensors, "a": torch.arange(12.0).view(6, 2)[:, 0] / 2}) == digests[0], (
        "strides are no part of the digest"
    )


FINE_TUNED = {
    "kind": "cnn",
    "conv": [{"channels": 3, "kernel": 3}],
    "hidden": [6],
    "batch_norm": True,
    "dropout": 0.2,
    "init_from": "base@last",
}
GROUPS = [{"match": "head.4.*", "lr_factor": 3}, {"match": "*.bias", "weight_decay": 0}]
IMAGE_MODULE = """
import numpy as np

def images():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 300)
    return (draw.integers(0, 200, (300, 8, 8, 1)) + 20 * labels[:, None, None, None]).astype(np.uint8), labels
"""


def test_resumed_fine_tuning_matches_an_uninterrupted_run(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen layers with batch norm, parameter groups and a warm start: interrupted by real signals, and resumed."""
    (tmp_path / "start_images.py").write_text(IMAGE_MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    data = {"source": {"call": "start_images:images"}, "splits": {"val": 60}}
    common = {"data": data, "checkpoint": {"every_steps": 3}, "evaluate": {"every_steps": 5}}
    without_init = {key: value for key, value in FINE_TUNED.items() if key != "init_from"}
    base = write_changed_job(tmp_path, "base.yaml", **common, model=without_init)
    fine = write_changed_job(
        tmp_path,
        "fine.yaml",
        **common,
        model={**FINE_TUNED, "freeze": ["features.*"]},
        train={
            "batch_size": 32,
            "optimizer": {"kind": "adamw", "weight_decay": 0.1, "groups": GROUPS},
            "phases": [{"epochs": 3, "lr": 0.02}],
        },
    )
    assert trainyard("train", base, "--name", "base").exit_code == 0
    whole = trainyard("train", fine, "--name", "whole", "--json").json
    optimizer_step, stops = TrainEngine.optimizer_step, {7, 8, 17}

    def step_and_stop(engine: TrainEngine, lr: float) -> None:
        optimizer_step(engine, lr)
        engine.steps = getattr(engine, "steps", 0) + 1  # type: ignore[attr-defined]
        if stops and engine.steps == min(stops):  # type: ignore[attr-defined]
            stops.remove(min(stops))
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainEngine, "optimizer_step", step_and_stop)
    codes = [trainyard("train", fine, "--name", "cut").exit_code for _ in range(3)]
    assert codes == [130, 130, 0]
    ended = trainyard("train", fine, "--name", "cut", "--json").json
    files = [
        (
            Path(run["url"]) / "checkpoints" / json.loads((Path(run["url"]) / "result.json").read_text())["last"]
        ).resolve()
        for run in (whole, ended)
    ]
    assert (files[0] / "model.safetensors").read_bytes() == (files[1] / "model.safetensors").read_bytes()
    states = [load_file(file / "state.safetensors") for file in files]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole["metrics"] == ended["metrics"]
    initial, last = read_weights(tmp_path / "runs/base"), read_weights(whole["url"])
    for name, tensor in last.items():
        assert torch.equal(tensor, initial[name]) == name.startswith("features."), name


USER_MODEL = """
from torch import nn
from user_start_parts.layers import body

def net(input_shape, outputs, width=4):
    return body(input_shape[0], width, outputs)
"""
USER_LAYERS = """
from torch import nn

def body(inputs, width, outputs):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))
"""


def test_run_stores_its_code_and_names_changed_files(trainyard: RunCommand, tmp_path: Path) -> None:
    code = tmp_path / "jobs/code"
    (code / "user_start_parts").mkdir(parents=True)
    (code / "user_start_net.py").write_text(USER_MODEL)
    (code / "user_start_parts/layers.py").write_text(USER_LAYERS)
    (code / "user_start_unused.py").write_text("")
    job = write_changed_job(tmp_path / "jobs", "custom.yaml", model={"kind": "user_start_net:net"}, code="code")
    run = Path(trainyard("train", job, "--name", "named", "--json").json["url"])
    with zipfile.ZipFile(run / "code.zip") as archive:
        assert archive.read("user_start_parts/layers.py").decode() == USER_LAYERS
        assert archive.namelist() == ["user_start_net.py", "user_start_parts/layers.py"]
    before = (run / "code.zip").read_bytes()
    (run / "code.zip").unlink()
    assert trainyard("train", job, "--name", "named").exit_code == 0
    assert (run / "code.zip").read_bytes() == before
    part = trainyard("train", job, "--name", "part", "--max-steps", "5", "--json").json
    claims = [json.loads(path.read_text()) for path in sorted(Path(part["url"]).glob("journal/*.json"))]
    assert claims[0]["facts"]["code"].keys() == {"user_start_net.py", "user_start_parts/layers.py"}


MODEL_FROM_LAYERS = (
    "from torch import nn\nfrom user_edit_parts import layers\ndef net():\n    return nn.Linear(2, layers)\n"
)


@pytest.fixture
def edited_code(tmp_path: Path) -> tuple[str, Path]:
    """A job with a custom model, and the helper that the model's module imports."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/user_edit_net.py").write_text(MODEL_FROM_LAYERS)
    (tmp_path / "code/user_edit_parts.py").write_text("layers = 2\n")
    (tmp_path / "code/user_edit_unused.py").write_text("")
    job = write_changed_job(tmp_path, "custom.yaml", model={"kind": "user_edit_net:net"}, code="code")
    return job, tmp_path / "code/user_edit_parts.py"


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that has the next run interrupted by SIGINT after `count` steps."""
    optimizer_step = TrainEngine.optimizer_step

    def stop_at(count: int) -> None:
        lrs: list[float] = []

        def step_and_count(engine: TrainEngine, lr: float) -> None:
            optimizer_step(engine, lr)
            lrs.append(lr)
            if len(lrs) == count:
                monkeypatch.setattr(TrainEngine, "optimizer_step", optimizer_step)
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(TrainEngine, "optimizer_step", step_and_count)

    return stop_at


def read_claims(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(path.read_text()) for path in sorted(run.glob("journal/*.json"))]
    return [entry["facts"] for entry in entries if entry["kind"] == "claim"]


def test_edited_code_is_a_new_run(trainyard: RunCommand, edited_code: tuple[str, Path]) -> None:
    job, helper = edited_code
    first = trainyard("train", job, "--json").json["run"]
    helper.with_name("user_edit_unused.py").write_text("x = 1\n")
    same = trainyard("train", job)
    assert f"run {first} (found)" in same.stderr
    assert "nothing to do" in same.stderr
    helper.write_text("layers = 1 + 1\n")
    other = trainyard("train", job, "--json")
    assert "nothing to do" not in other.stderr
    assert other.json["run"] != first


def test_resume_despite_edited_code_is_explicit_and_recorded(
    trainyard: RunCommand, edited_code: tuple[str, Path], interrupted_at: Callable[[int], None], tmp_path: Path
) -> None:
    job, helper = edited_code
    run = tmp_path / "runs/named"
    interrupted_at(2)
    assert trainyard("train", job, "--name", "named").exit_code == 130
    before = (run / "code.zip").read_bytes()
    helper.write_text("layers = 1 + 1\n")
    refused = trainyard("train", job, "--name", "named")
    assert refused.exit_code == 2
    assert "the code changed since this run last ran: user_edit_parts.py" in refused.stderr
    assert "--allow-code-change" in refused.stderr
    assert len(read_claims(run)) == 1
    interrupted_at(2)
    resumed = trainyard("train", job, "--name", "named", "--allow-code-change")
    assert resumed.exit_code == 130
    assert "resuming after step" in resumed.stderr
    assert "code changed since the last attempt: user_edit_parts.py" in resumed.stderr
    assert read_claims(run)[1]["code_changes_allowed"] == ["user_edit_parts.py"]
    with zipfile.ZipFile(run / "code.zip") as archive:
        assert archive.read("user_edit_parts.py") == helper.read_bytes()
    (stored,) = run.glob("code-*.zip")
    assert stored.read_bytes() == before
    ended = trainyard("train", job, "--name", "named")  # nothing changed since, so no option is needed
    assert ended.exit_code == 0
    assert "code changed" not in ended.stderr
    assert "code_changes_allowed" not in read_claims(run)[2]
    assert "nothing to do" in trainyard("train", job, "--name", "named", "--allow-code-change").stderr
    helper.write_text("layers = 2\n")
    finished = trainyard("train", job, "--name", "named", "--allow-code-change")
    assert finished.exit_code == 2
    assert "the code changed since this run ended: user_edit_parts.py" in finished.stderr
    assert "needs --name" in trainyard("train", job, "--allow-code-change").stderr


def test_weights_mismatch_after_an_edit_blames_the_code(
    trainyard: RunCommand, edited_code: tuple[str, Path], interrupted_at: Callable[[int], None]
) -> None:
    job, helper = edited_code
    interrupted_at(2)
    trainyard("train", job, "--name", "named")
    helper.with_name("user_edit_net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(2, 2))\n"
    )
    misfit = trainyard("train", job, "--name", "named", "--allow-code-change")
    assert misfit.exit_code == 2
    assert (
        "model.kind: user_edit_net:net: the code of this model is not the code that its weights were trained"
        in misfit.stderr
    )
    assert "checkpoint" not in misfit.stderr


def test_dynamically_imported_code_is_reported_and_recorded(
    trainyard: RunCommand, edited_code: tuple[str, Path], tmp_path: Path
) -> None:
    job, helper = edited_code
    helper.with_name("user_edit_net.py").write_text(
        "import pydoc\nfrom torch import nn\n"
        "def net():\n    return nn.Linear(2, pydoc.locate('user_edit_parts').layers)\n"
    )
    first = trainyard("train", job, "--name", "named")
    assert first.exit_code == 0
    assert "imported, but not stored with the run: user_edit_parts.py" in first.stderr
    assert read_claims(tmp_path / "runs/named")[0]["code_not_stored"].keys() == {"user_edit_parts.py"}
    assert "nothing to do" in trainyard("train", job, "--name", "named").stderr
    helper.write_text("layers = 1 + 1\n")
    again = trainyard("train", job, "--name", "named")
    assert again.exit_code == 2
    assert "the code changed since this run ended: user_edit_parts.py" in again.stderr


def without_code_identity(new: Path) -> str:
    """Copy a run to the form of an earlier version, which recorded the code of attempts, but not in the identity."""
    run = Run(Storage.open(str(new.parent)), new.name)
    metadata = {name: value for name, value in run.read_metadata().items() if name != "code"}
    job = parse_job(run.read_job_yaml(), "stored")
    identity = compute_identity(
        job,
        fingerprint=metadata["fingerprint"],
        initial_weights_digest=metadata["start"],
        max_steps=metadata["max_steps"],
    )
    older = Run(Storage.open(str(new.parent)), f"{job.name}-{digest_tree(identity)[:8]}")
    shutil.copytree(new, new.with_name(older.name))
    (new.with_name(older.name) / "job.yaml").unlink()
    assert older.create(run.read_job_yaml().partition("\n")[2], {**metadata, "identity": digest_tree(identity)})
    for entry in read_entries(run.journal):
        if isinstance(entry, Claim):
            code = {**entry.facts["code"], "user_edit_unused.py": "a", "code.zip": "b"}
            text = replace(entry, facts={**entry.facts, "code": code}).to_json()
            (new.with_name(older.name) / f"journal/{entry.number:08d}.json").write_text(text)
    return older.name


def test_run_without_code_identity_is_resumed_by_name(
    trainyard: RunCommand, edited_code: tuple[str, Path], interrupted_at: Callable[[int], None], tmp_path: Path
) -> None:
    job, helper = edited_code
    interrupted_at(2)
    assert trainyard("train", job).exit_code == 130
    (run,) = (tmp_path / "runs").iterdir()
    older = without_code_identity(run)
    shutil.rmtree(run)
    new = trainyard("train", job, "--json")
    assert new.json["run"] == run.name
    assert f"--name {older} resumes it" in new.stderr
    resumed = trainyard("train", job, "--name", older)
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming after step" in resumed.stderr
    helper.write_text("layers = 1 + 1\n")
    refused = trainyard("train", job, "--name", older)
    assert refused.exit_code == 2
    assert "the code changed since this run ended: user_edit_parts.py" in refused.stderr


def test_initial_weights_and_code_on_s3(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_url: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "code").mkdir()
    (tmp_path / "code/user_start_s3.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")
    job = write_changed_job(tmp_path, "custom.yaml", model={"kind": "user_start_s3:net"}, code="code")
    assert trainyard("train", job, "--name", "base", "--storage", s3_url, "--max-steps", "2").exit_code == 0
    assert open_run("base", s3_url).read_code() is not None
    start = f"model.init_from={s3_url}/base@last"
    warm = trainyard("train", job, "--set", start, "--max-steps", "1", "--json")
    assert warm.exit_code == 0, warm.stderr
    initial = find_checkpoint(open_run("base", s3_url), "last").load_weights()
    assert (read_weights(warm.json["url"])["weight"] - initial["weight"]).norm() < 0.1 * initial["weight"].norm()


def test_user_module_named_pipeline_is_rejected(trainyard: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/pipeline.py").write_text("")
    refused = trainyard("train", write_changed_job(tmp_path, "custom.yaml", code="code"))
    assert refused.exit_code == 2
    assert "rename yours" in refused.stderr


def test_pretrained_weights_from_a_file(trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    (tmp_path / "start_rgb_images.py").write_text(IMAGE_MODULE.replace("8, 8, 1", "32, 32, 3"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(1)
    published = models.shufflenet_v2_x0_5().state_dict()
    save_file(published, tmp_path / "published.safetensors")
    model = {"kind": "torchvision:shufflenet_v2_x0_5", "weights": "published.safetensors", "freeze": "backbone"}
    data = {"source": {"call": "start_rgb_images:images"}, "splits": {"val": 60}}
    job = write_changed_job(tmp_path, "fine.yaml", model=model, data=data)
    ended = trainyard("train", job, "--max-steps", "2", "--json")
    assert ended.exit_code == 0, ended.stderr
    trained = read_weights(ended.json["url"])
    assert {name for name in trained if name not in published or not torch.equal(trained[name], published[name])} == {
        "fc.weight",
        "fc.bias",
    }
    save_file({**published, "conv5.1.bias": published["conv5.1.bias"] + 1}, tmp_path / "published.safetensors")
    assert trainyard("train", job, "--max-steps", "2", "--json").json["run"] != ended.json["run"]
    missing = trainyard("train", job, "--set", "model.weights=gone.pth")
    assert missing.exit_code == 2
    assert "neither a file nor weights of shufflenet_v2_x0_5" in missing.stderr


def test_cpu_run_does_not_import_the_torch_compiler(tmp_path: Path) -> None:
    """Importing it takes longer than many trainings."""
    program = (
        "import sys; from pipeline import train;"
        "train({'name': 'a', 'data': {'source': 'disc'}, 'scale': {'device': 'cpu'}}, storage='runs', max_steps=3);"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'torchvision', 'ray'} & set(sys.modules)))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert completed.stdout.splitlines()[-1] == "[]"
