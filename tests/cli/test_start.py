"""Starting from elsewhere and own code, as a user types them: warm starts, what does not fit, what the run keeps."""

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
    """A job file like `write_job`'s under another name."""
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
        assert ended.code == 0, ended.err
        begun = read_weights(base["url"], which) if which else None
        after = read_weights(ended.json["url"])
        heads[spec] = after["2.weight"]
        if begun is not None:
            assert torch.equal(after["0.weight"], begun["0.weight"]), "the frozen part is that of the start"
            assert not torch.equal(after["2.weight"], begun["2.weight"])
            assert (after["2.weight"] - begun["2.weight"]).norm() < begun["2.weight"].norm()
    assert not torch.equal(heads["base@8"], heads["base@last"])
    assert trainyard("check", job, "--batch").code == 0


def test_moving_job_data_and_start_keeps_the_identity(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path in it is relative to it, and none is part of what the run is."""
    job_folder = tmp_path / "project/jobs"
    job_folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    pq.write_table(pa.table({"x": draw.normal(size=90), "y": draw.integers(0, 2, 90)}), job_folder / "rows.parquet")
    tree = {"data": {"source": "parquet", "url": "rows.parquet", "label": "y"}, "model": {"kind": "mlp"}}
    (job_folder / "base.yaml").write_text(yaml.safe_dump({"name": "base", **tree}))
    warm = {"base": "base.yaml", "name": "warm", "model": {"init_from": "../runs/begun@last"}}
    (job_folder / "warm.yaml").write_text(yaml.safe_dump(warm))
    begun = trainyard(
        "train", str(job_folder / "base.yaml"), "--storage", "project/runs", "--name", "begun", "--max-steps", "2"
    )
    assert begun.code == 0, begun.err
    runs = ("--storage", str(tmp_path / "all"), "--max-steps", "3", "--json")
    first = trainyard("train", "project/jobs/warm.yaml", *runs)
    assert first.code == 0, first.err
    assert trainyard("evaluate", first.json["url"], "--json").code == 0
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    again = trainyard("train", "jobs/warm.yaml", *runs)
    assert (again.code, again.json["run"], "nothing to do" in again.err) == (0, first.json["run"], True), again.err
    typed = trainyard("train", "jobs/warm.yaml", "--set", "data.url=jobs/rows.parquet", *runs)
    assert (typed.code, typed.json["run"]) == (0, first.json["run"]), typed.err


def test_another_start_is_another_run(trainyard: RunCommand, tmp_path: Path) -> None:
    write_job(tmp_path)
    for name, lr in (("base", 0.1), ("other", 0.2)):
        trainyard("train", "small.yaml", "--name", name, "--set", f"train.phases.0.lr={lr}", "--max-steps", "4")
    job = write_changed_job(tmp_path, "warm.yaml", model={"hidden": [16], "init_from": "base"})
    first = trainyard("train", job, "--json").json["run"]
    assert trainyard("train", job, "--json").json["run"] == first
    # The same name, but other weights behind it:
    (tmp_path / "runs/base").rename(tmp_path / "runs/was")
    (tmp_path / "runs/other").rename(tmp_path / "runs/base")
    assert trainyard("train", job, "--json").json["run"] != first
    refused = trainyard("train", job, "--name", first)
    assert refused.code == 2
    assert "start: " in refused.err
    assert trainyard("evaluate", first).code == 0, "a trained run needs its start no more"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere", "no such run"),
        ("base@7", "the run has no checkpoint '7'"),
        ("base@newest", "the run has no checkpoint 'newest'"),
        ("damaged", "was altered"),
    ],
)
def test_missing_start_is_bad_input(spec: str, words: str, trainyard: RunCommand, tmp_path: Path) -> None:
    trainyard("train", write_job(tmp_path), "--name", spec.partition("@")[0] if spec != "nowhere" else "any")
    for file in tmp_path.glob("runs/damaged/checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    refused = trainyard("train", write_changed_job(tmp_path, "warm.yaml", model={"hidden": [16], "init_from": spec}))
    assert refused.code == 2
    assert words in refused.err
    assert "Traceback" not in refused.err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_mismatched_weights_are_named_and_skipped_if_not_strict(trainyard: RunCommand, tmp_path: Path) -> None:
    base = trainyard("train", write_job(tmp_path), "--name", "base", "--json").json
    job = write_changed_job(tmp_path, "warm.yaml", model={"hidden": [16, 5], "init_from": "base@last"})
    refused = trainyard("train", job)
    assert refused.code == 2
    for words in ("missing there: 4.weight, 4.bias", "2.weight (2, 16), in this model (5, 16)", "model.strict: false"):
        assert words in refused.err
    taken = trainyard("train", job, "--set", "model.strict=false", "--set", "model.freeze=[0.*]", "--json")
    assert taken.code == 0, taken.err
    assert "not taken from base at step 24: missing there: 4.weight, 4.bias" in taken.err
    assert torch.equal(read_weights(taken.json["url"])["0.weight"], read_weights(base["url"])["0.weight"])


def test_no_matching_weights_is_an_error_even_if_not_strict() -> None:
    model = build_model(make_job(), (2,), 2, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {"0.weight": torch.ones(3, 3), "other": torch.ones(1)}
    for strict in (True, False):
        with pytest.raises(JobError, match=r"no tensor of elsewhere fits.*0\.weight \(3, 3\), here \(7, 2\)"):
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
        "strides do not count"
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
    """Frozen layers with batch norms, groups and a warm start: interrupted by real signals, and resumed."""
    (tmp_path / "start_images.py").write_text(IMAGE_MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    data = {"source": {"call": "start_images:images"}, "splits": {"val": 60}}
    common = {"data": data, "checkpoint": {"every_steps": 3}, "evaluate": {"every_steps": 5}}
    cold = {key: value for key, value in FINE_TUNED.items() if key != "init_from"}
    base = write_changed_job(tmp_path, "base.yaml", **common, model=cold)
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
    assert trainyard("train", base, "--name", "base").code == 0
    whole = trainyard("train", fine, "--name", "whole", "--json").json
    update, stops = TrainEngine.optimizer_step, {7, 8, 17}

    def update_and_stop(trainee: TrainEngine, lr: float) -> None:
        update(trainee, lr)
        trainee.steps = getattr(trainee, "steps", 0) + 1  # type: ignore[attr-defined]
        if stops and trainee.steps == min(stops):  # type: ignore[attr-defined]
            stops.remove(min(stops))
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainEngine, "optimizer_step", update_and_stop)
    codes = [trainyard("train", fine, "--name", "cut").code for _ in range(3)]
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
    start, last = read_weights(tmp_path / "runs/base"), read_weights(whole["url"])
    for name, tensor in last.items():
        assert torch.equal(tensor, start[name]) == name.startswith("features."), name


USER_MODEL = """
from torch import nn
from own_start_parts.layers import body

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
    (code / "own_start_parts").mkdir(parents=True)
    (code / "own_start_net.py").write_text(USER_MODEL)
    (code / "own_start_parts/layers.py").write_text(USER_LAYERS)
    (code / "own_start_unused.py").write_text("")
    job = write_changed_job(tmp_path / "jobs", "own.yaml", model={"kind": "own_start_net:net"}, code="code")
    run = Path(trainyard("train", job, "--name", "mine", "--json").json["url"])
    with zipfile.ZipFile(run / "code.zip") as archive:
        assert archive.read("own_start_parts/layers.py").decode() == USER_LAYERS
        assert archive.namelist() == ["own_start_net.py", "own_start_parts/layers.py"]
    before = (run / "code.zip").read_bytes()
    (run / "code.zip").unlink()
    assert trainyard("train", job, "--name", "mine").code == 0
    assert (run / "code.zip").read_bytes() == before
    part = trainyard("train", job, "--name", "part", "--max-steps", "5", "--json").json
    claims = [json.loads(path.read_text()) for path in sorted(Path(part["url"]).glob("journal/*.json"))]
    assert claims[0]["facts"]["code"].keys() == {"own_start_net.py", "own_start_parts/layers.py"}


MODEL_FROM_LAYERS = (
    "from torch import nn\nfrom own_edit_parts import layers\ndef net():\n    return nn.Linear(2, layers)\n"
)


@pytest.fixture
def edited_code(tmp_path: Path) -> tuple[str, Path]:
    """A job with a model of its own, and the helper that the model's module imports."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/own_edit_net.py").write_text(MODEL_FROM_LAYERS)
    (tmp_path / "code/own_edit_parts.py").write_text("layers = 2\n")
    (tmp_path / "code/own_edit_unused.py").write_text("")
    job = write_changed_job(tmp_path, "own.yaml", model={"kind": "own_edit_net:net"}, code="code")
    return job, tmp_path / "code/own_edit_parts.py"


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the next run stopped by SIGINT after so many updates."""
    update = TrainEngine.optimizer_step

    def stop_at(count: int) -> None:
        done: list[float] = []

        def update_and_count(trainee: TrainEngine, lr: float) -> None:
            update(trainee, lr)
            done.append(lr)
            if len(done) == count:
                monkeypatch.setattr(TrainEngine, "optimizer_step", update)
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(TrainEngine, "optimizer_step", update_and_count)

    return stop_at


def read_claims(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(path.read_text()) for path in sorted(run.glob("journal/*.json"))]
    return [entry["facts"] for entry in entries if entry["kind"] == "claim"]


def test_edited_code_is_a_new_run(trainyard: RunCommand, edited_code: tuple[str, Path]) -> None:
    job, helper = edited_code
    first = trainyard("train", job, "--json").json["run"]
    helper.with_name("own_edit_unused.py").write_text("x = 1\n")
    same = trainyard("train", job)
    assert f"run {first} (found)" in same.err
    assert "nothing to do" in same.err
    helper.write_text("layers = 1 + 1\n")
    other = trainyard("train", job, "--json")
    assert "nothing to do" not in other.err
    assert other.json["run"] != first


def test_resume_despite_edited_code_is_explicit_and_recorded(
    trainyard: RunCommand, edited_code: tuple[str, Path], interrupted_at: Callable[[int], None], tmp_path: Path
) -> None:
    job, helper = edited_code
    run = tmp_path / "runs/mine"
    interrupted_at(2)
    assert trainyard("train", job, "--name", "mine").code == 130
    before = (run / "code.zip").read_bytes()
    helper.write_text("layers = 1 + 1\n")
    refused = trainyard("train", job, "--name", "mine")
    assert refused.code == 2
    assert "the code changed since this run last ran: own_edit_parts.py" in refused.err
    assert "--allow-code-change" in refused.err
    assert len(read_claims(run)) == 1
    interrupted_at(2)
    going_on = trainyard("train", job, "--name", "mine", "--allow-code-change")
    assert going_on.code == 130
    assert "resuming after step" in going_on.err
    assert "code changed since the last attempt: own_edit_parts.py" in going_on.err
    assert read_claims(run)[1]["code_changes_allowed"] == ["own_edit_parts.py"]
    with zipfile.ZipFile(run / "code.zip") as archive:
        assert archive.read("own_edit_parts.py") == helper.read_bytes()
    (kept,) = run.glob("code-*.zip")
    assert kept.read_bytes() == before
    ended = trainyard("train", job, "--name", "mine")  # nothing changed since, so nothing is to be allowed
    assert ended.code == 0
    assert "code changed" not in ended.err
    assert "code_changes_allowed" not in read_claims(run)[2]
    assert "nothing to do" in trainyard("train", job, "--name", "mine", "--allow-code-change").err
    helper.write_text("layers = 2\n")
    finished = trainyard("train", job, "--name", "mine", "--allow-code-change")
    assert finished.code == 2
    assert "the code changed since this run ended: own_edit_parts.py" in finished.err
    assert "goes with --name" in trainyard("train", job, "--allow-code-change").err


def test_weights_mismatch_after_an_edit_blames_the_code(
    trainyard: RunCommand, edited_code: tuple[str, Path], interrupted_at: Callable[[int], None]
) -> None:
    job, helper = edited_code
    interrupted_at(2)
    trainyard("train", job, "--name", "mine")
    helper.with_name("own_edit_net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(2, 2))\n"
    )
    misfit = trainyard("train", job, "--name", "mine", "--allow-code-change")
    assert misfit.code == 2
    assert (
        "model.kind: own_edit_net:net: the code of this model is not the code that its weights were trained"
        in misfit.err
    )
    assert "checkpoint" not in misfit.err


def test_dynamically_imported_code_is_reported_and_recorded(
    trainyard: RunCommand, edited_code: tuple[str, Path], tmp_path: Path
) -> None:
    job, helper = edited_code
    helper.with_name("own_edit_net.py").write_text(
        "import pydoc\nfrom torch import nn\n"
        "def net():\n    return nn.Linear(2, pydoc.locate('own_edit_parts').layers)\n"
    )
    first = trainyard("train", job, "--name", "mine")
    assert first.code == 0
    assert "imported, but not stored with the run: own_edit_parts.py" in first.err
    assert read_claims(tmp_path / "runs/mine")[0]["code_not_stored"].keys() == {"own_edit_parts.py"}
    assert "nothing to do" in trainyard("train", job, "--name", "mine").err
    helper.write_text("layers = 1 + 1\n")
    again = trainyard("train", job, "--name", "mine")
    assert again.code == 2
    assert "the code changed since this run ended: own_edit_parts.py" in again.err


def without_code_identity(new: Path) -> str:
    """A copy of a run as the version wrote it that noted the code of each attempt but not in the run's identity."""
    run = Run(Storage.open(str(new.parent)), new.name)
    facts = {name: value for name, value in run.read_metadata().items() if name != "code"}
    job = parse_job(run.read_job_yaml(), "stored")
    plain = compute_identity(job, **{name: facts[name] for name in ("fingerprint", "start", "max_steps")})
    older = Run(Storage.open(str(new.parent)), f"{job.name}-{digest_tree(plain)[:8]}")
    shutil.copytree(new, new.with_name(older.name))
    (new.with_name(older.name) / "job.yaml").unlink()
    assert older.create(run.read_job_yaml().partition("\n")[2], {**facts, "identity": digest_tree(plain)})
    for entry in read_entries(run.journal):
        if isinstance(entry, Claim):
            code = {**entry.facts["code"], "own_edit_unused.py": "a", "code.zip": "b"}
            text = replace(entry, facts={**entry.facts, "code": code}).to_json()
            (new.with_name(older.name) / f"journal/{entry.number:08d}.json").write_text(text)
    return older.name


def test_run_without_code_identity_is_resumed_by_name(
    trainyard: RunCommand, edited_code: tuple[str, Path], interrupted_at: Callable[[int], None], tmp_path: Path
) -> None:
    job, helper = edited_code
    interrupted_at(2)
    assert trainyard("train", job).code == 130
    (run,) = (tmp_path / "runs").iterdir()
    older = without_code_identity(run)
    shutil.rmtree(run)
    beside = trainyard("train", job, "--json")
    assert beside.json["run"] == run.name
    assert f"--name {older} goes on with it" in beside.err
    resumed = trainyard("train", job, "--name", older)
    assert resumed.code == 0, resumed.err
    assert "resuming after step" in resumed.err
    helper.write_text("layers = 1 + 1\n")
    refused = trainyard("train", job, "--name", older)
    assert refused.code == 2
    assert "the code changed since this run ended: own_edit_parts.py" in refused.err


def test_start_and_code_on_s3(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_url: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "code").mkdir()
    (tmp_path / "code/own_start_s3.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")
    job = write_changed_job(tmp_path, "own.yaml", model={"kind": "own_start_s3:net"}, code="code")
    assert trainyard("train", job, "--name", "base", "--storage", s3_url, "--max-steps", "2").code == 0
    assert open_run("base", s3_url).read_code() is not None
    start = f"model.init_from={s3_url}/base@last"
    warm = trainyard("train", job, "--set", start, "--max-steps", "1", "--json")
    assert warm.code == 0, warm.err
    begun = find_checkpoint(open_run("base", s3_url), "last").load_weights()
    assert (read_weights(warm.json["url"])["weight"] - begun["weight"]).norm() < 0.1 * begun["weight"].norm()


def test_user_module_named_pipeline_is_rejected(trainyard: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/pipeline.py").write_text("")
    refused = trainyard("train", write_changed_job(tmp_path, "own.yaml", code="code"))
    assert refused.code == 2
    assert "rename yours" in refused.err


def test_pretrained_weights_from_a_file(trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    (tmp_path / "start_pictures.py").write_text(
        IMAGE_MODULE.replace("images", "pictures").replace("8, 8, 1", "32, 32, 3")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(1)
    published = models.shufflenet_v2_x0_5().state_dict()
    save_file(published, tmp_path / "published.safetensors")
    model = {"kind": "torchvision:shufflenet_v2_x0_5", "weights": "published.safetensors", "freeze": "backbone"}
    data = {"source": {"call": "start_pictures:pictures"}, "splits": {"val": 60}}
    job = write_changed_job(tmp_path, "fine.yaml", model=model, data=data)
    ended = trainyard("train", job, "--max-steps", "2", "--json")
    assert ended.code == 0, ended.err
    after = read_weights(ended.json["url"])
    assert {name for name in after if name not in published or not torch.equal(after[name], published[name])} == {
        "fc.weight",
        "fc.bias",
    }
    save_file({**published, "conv5.1.bias": published["conv5.1.bias"] + 1}, tmp_path / "published.safetensors")
    assert trainyard("train", job, "--max-steps", "2", "--json").json["run"] != ended.json["run"]
    missing = trainyard("train", job, "--set", "model.weights=gone.pth")
    assert missing.code == 2
    assert "neither a file nor weights of shufflenet_v2_x0_5" in missing.err


def test_cpu_run_does_not_import_the_torch_compiler(tmp_path: Path) -> None:
    """Its import takes longer than many a training."""
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
