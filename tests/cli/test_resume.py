"""Commands that find an existing run: they do only what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from pipeline import train
from pipeline.data import fitted_transforms as fitting
from pipeline.errors import InputError
from pipeline.events import EvaluationLogged, Event, RunOpened
from pipeline.models import build_model
from pipeline.runs.run import Run
from pipeline.setup import data as setup_data
from pipeline.setup import model
from tests.cli.command_line import RunCommand
from tests.process_kill.run_assertions import final_state

IMPORT_TRACKING = """
import sys
sys.argv[0] = "trainyard"
from pipeline.cli import main
try:
    main()
except SystemExit as error:
    print(error.code, sorted({"torch", "torchvision", "ray"} & set(sys.modules)))
"""
DATA_MODULE = """
from pathlib import Path

import numpy as np

def data(name):
    with Path("calls.txt").open("a") as file:
        file.write("called\\n")
    draw = np.random.default_rng(0)
    return draw.normal(size=(60, 2)).astype(np.float32), draw.integers(0, 2, 60)
"""


def write_job_file(folder: Path, **data: Any) -> str:
    tree = {
        "name": "small",
        "data": {**data, "splits": {"by": "random", "val": 0.2}},
        "model": {"kind": "mlp", "hidden": [4]},
        "train": {"batch_size": 16, "phases": [{"epochs": 6, "lr": 0.1}]},
        "task": "binary",
        "checkpoint": {"every_epochs": 1, "keep": 2},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "job.yaml")


def write_table(folder: Path, name: str = "t.parquet") -> Path:
    draw = np.random.default_rng(1)
    x = draw.normal(5, 3, 200)
    pd.DataFrame({"x": x, "z": draw.integers(0, 9, 200), "y": x > 5}).to_parquet(folder / name)
    return folder / name


@pytest.mark.parametrize("source", ["disc", "parquet", "call", "named"])
def test_resume_of_a_finished_run_does_not_import_torch(trainyard: RunCommand, tmp_path: Path, source: str) -> None:
    """Also, a user function that returns the data is called once per command."""
    (tmp_path / "user_data.py").write_text(DATA_MODULE)
    sources: dict[str, dict[str, Any]] = {
        "disc": {"source": "disc"},
        "parquet": {"source": "parquet", "url": str(write_table(tmp_path)), "label": "y"},
        "call": {"source": {"call": "user_data:data", "args": {"name": "a"}}},
        "named": {"source": "disc"},
    }
    name = ["--name", "named"] if source == "named" else []
    job = write_job_file(tmp_path, **sources[source])
    first = trainyard("train", job, *name)
    assert first.exit_code == 0, first.stderr
    again = subprocess.run(
        [sys.executable, "-c", IMPORT_TRACKING, "train", job, *name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "nothing to do" in again.stderr, again.stderr
    assert again.stdout.splitlines()[-1] == "0 []"
    if source == "call":
        assert len((tmp_path / "calls.txt").read_text().splitlines()) == 2


def test_missing_files_of_a_finished_run_are_rewritten(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job_file(tmp_path, source="parquet", url=str(write_table(tmp_path)), label="y")
    run = Path(trainyard("train", job, "--json").json["url"])
    before = final_state(run)
    for path in ("splits.parquet", "result.json", "run.json"):
        whole = (run / path).read_bytes()
        for damage in (b"damaged", whole[:-1]):
            (run / path).write_bytes(damage)
            again = trainyard("train", job)
            assert again.exit_code == 0, again.stderr
            assert (run / path).read_bytes() != damage
            assert final_state(run) == before
            assert "nothing to do" in trainyard("train", job).stderr


def test_finished_run_of_an_earlier_version_needs_no_work(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions recorded no digest of the splits."""
    job = write_job_file(tmp_path, source="disc")
    create = Run.create

    def create_without_digest(run: Run, job_yaml: str, metadata: dict[str, Any]) -> bool:
        return create(run, job_yaml, {name: value for name, value in metadata.items() if name != "splits"})

    monkeypatch.setattr(Run, "create", create_without_digest)
    assert trainyard("train", job).exit_code == 0
    again = trainyard("train", job, "--json")
    assert "nothing to do" in again.stderr
    assert again.json["attempts"] == 1


def make_interrupted_run(job: str, storage: Path, epoch: int) -> str:
    """Train until the end of an epoch, and return the name of the interrupted run."""

    class StoppedError(Exception):
        pass

    names: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, RunOpened):
            names.append(event.run)
        if isinstance(event, EvaluationLogged) and event.epoch == epoch:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(job, storage=str(storage), on_event=on_event)
    return names[0]


def test_a_run_in_this_process_builds_its_model_once_per_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is built before the run is created is the one that is trained."""
    models: list[object] = []

    def build_and_count(*args: Any) -> Any:
        models.append(build_model(*args))
        return models[-1]

    monkeypatch.setattr(model, "build_model", build_and_count)
    job = write_job_file(tmp_path, source="parquet", url=str(write_table(tmp_path)), label="y")
    make_interrupted_run(job, tmp_path / "runs", 4)
    assert len(models) == 1
    assert train(job, storage=str(tmp_path / "runs")).attempts == 2
    assert len(models) == 2


def test_resume_reuses_fitted_transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of a library could fit different values."""
    job = write_job_file(tmp_path, source="parquet", url=str(write_table(tmp_path)), label="y")
    untouched = train(job, storage=str(tmp_path / "untouched"))
    name = make_interrupted_run(job, tmp_path / "runs", 4)

    def fit(*args: Any) -> Any:
        raise AssertionError("fitted again")

    monkeypatch.setattr(fitting, "fit_transforms", fit)
    monkeypatch.setattr(setup_data, "fit_transforms", fit)
    resumed = train(job, storage=str(tmp_path / "runs"))
    assert (resumed.run, resumed.status, resumed.attempts) == (name, "finished", 2)
    assert final_state(tmp_path / "runs" / name) == final_state(tmp_path / "untouched" / name)
    assert untouched.run == name


def test_changed_data_is_rejected_before_loading(tmp_path: Path) -> None:
    write_table(tmp_path)
    job = write_job_file(tmp_path, source="parquet", url=str(tmp_path / "t.parquet"), label="y")
    train(job, name="named", storage=str(tmp_path / "runs"))
    frame = pd.read_parquet(tmp_path / "t.parquet")
    frame.assign(x=frame.x + 1).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="another job:\n    fingerprint: "):
        train(job, name="named", storage=str(tmp_path / "runs"))
