"""User code in a long-running process such as a notebook: the code that trains is the code stored and loaded."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import load, train
from pipeline.commands.check import check
from pipeline.errors import JobError
from pipeline.runs.run import CODE_FILE

MODEL_MODULE = """
import torch
from lc_scale import SCALE

class Net(torch.nn.Module):
    marker = "MARKER"
    def __init__(self, outputs):
        super().__init__()
        self.layer = torch.nn.Linear(2, outputs)
        self.register_buffer("seen", torch.tensor(SCALE))
    def forward(self, inputs):
        return self.layer(inputs) * SCALE
"""
POINTS = np.random.default_rng(0).uniform(size=(7, 2))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job as a dict, with its code in the working directory, as next to a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_module("first", 1.0)
    return {
        "name": "small",
        "data": {"source": "disc", "normalize": "scalar", "splits": {"val": 0.2}},
        "model": {"kind": "lc_net:Net"},
        "train": {"batch_size": 100, "phases": [{"epochs": 1, "lr": 0.1}]},
    }


def write_module(marker: str, scale: float) -> None:
    Path("lc_net.py").write_text(MODEL_MODULE.replace("MARKER", marker))
    Path("lc_scale.py").write_text(f"SCALE = {scale}\n")


def stored_scale(url: str) -> str:
    with zipfile.ZipFile(Path(url) / CODE_FILE) as archive:
        assert archive.namelist() == ["lc_net.py", "lc_scale.py"]
        return archive.read("lc_net.py").decode()


def test_edits_are_loaded_and_each_run_uses_its_own_code(job: dict[str, Any]) -> None:
    first = train(job)
    write_module("second", 3.0)
    second = train(job)
    assert first.run != second.run
    assert ("first" in stored_scale(first.url), "second" in stored_scale(second.url)) == (True, True)
    write_module("third", 7.0)  # importable, but not the code of the run
    nets: list[Any] = [load(run.url, trust=True).model for run in (first, second, first)]
    assert [net.marker for net in nets] == ["first", "second", "first"]
    assert [float(net.seen) for net in nets] == [1.0, 3.0, 1.0], "the helper that was trained with"
    assert type(nets[0]) is type(nets[2])
    assert type(nets[0]) is not type(nets[1])
    inputs = torch.from_numpy(POINTS).float()
    for net, scale in zip(nets, (1.0, 3.0, 1.0), strict=True):
        assert torch.equal(net(inputs), net.layer(inputs) * scale)
    assert not {"lc_net", "lc_scale"} & sys.modules.keys()


def test_mismatched_weights_of_changed_code_name_the_code(job: dict[str, Any]) -> None:
    run = train(job)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as other:
        other.writestr("lc_net.py", MODEL_MODULE.replace("self.layer", "self.renamed"))
        other.writestr("lc_scale.py", "SCALE = 1.0\n")
    (Path(run.url) / CODE_FILE).write_bytes(archive.getvalue())
    with pytest.raises(
        JobError, match="the code of this model is not the code that its weights were trained with"
    ) as raised:
        load(run.url, trust=True)
    assert raised.value.where == "model.kind: lc_net:Net"
    assert "checkpoint" not in str(raised.value)


def test_predictor_pickles_with_its_code(job: dict[str, Any], tmp_path: Path) -> None:
    model = load(train(job).url, trust=True)
    probabilities = model.predict_proba(POINTS)  # creates the input transform, which is not pickled
    np.testing.assert_array_equal(copy.deepcopy(model).predict_proba(POINTS), probabilities)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    np.save(tmp_path / "points.npy", POINTS)
    (tmp_path / "elsewhere").mkdir()
    script = (
        "import pickle, numpy as np; model = pickle.load(open('../model.pkl', 'rb'))\n"
        "np.save('../said.npy', model.predict_proba(np.load('../points.npy'))); print(model.model.marker)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=True
    )
    assert ran.stdout == "first\n"
    np.testing.assert_allclose(np.load(tmp_path / "said.npy"), probabilities, rtol=1e-6)


def test_fp64_weights_round_trip_bit_identically(job: dict[str, Any]) -> None:
    job["train"]["precision"] = "fp64"
    job["model"] = {"kind": "mlp", "hidden": [5]}
    run = train(job)
    trained = load_weights(run.url)
    assert any((tensor != tensor.float().double()).any() for tensor in trained.values()), "they need fp64"
    loaded = load(run.url).model.state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == dict.fromkeys(trained, torch.float64)
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    job["model"] |= {"init_from": f"{run.url}@best", "freeze": "backbone"}
    warm = load_weights(train(job).url)
    assert torch.equal(warm["0.weight"], trained["0.weight"])
    job["train"]["precision"] = "fp32"
    single = load_weights(train(job).url)
    assert torch.equal(single["0.weight"], trained["0.weight"].float())


def load_weights(url: str) -> dict[str, torch.Tensor]:
    """Return the weights of the best checkpoint as stored."""
    from pipeline.runs.checkpoints.checkpoint import find_checkpoint
    from pipeline.runs.run import open_run

    return find_checkpoint(open_run(url, "."), "best").load_weights()


def test_job_as_a_dict(job: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(job)
    run = train(job, set={"train.batch_size": 50}, storage=str(tmp_path / "elsewhere"))
    assert job == before
    assert (run.status, run.step) == ("finished", 16)
    assert train({**job, "code": ".", "train": {**job["train"], "batch_size": 50}}, storage="elsewhere").run == run.run
    assert check(job, batch=True).batch is not None
    assert train(check(job).job, set={"train.batch_size": 50}, storage="elsewhere").run == run.run
    with pytest.raises(JobError, match="modle: unknown key"):
        train({**job, "modle": {}})
    with pytest.raises(JobError, match="not a job or a table, but a value of type int"):
        train(3)
