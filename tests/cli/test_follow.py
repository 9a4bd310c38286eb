"""`follow:` in a job, and the command `follow`: both read storage, and a failing tracker never fails the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.trackers import sidecar
from tests.cli.command_line import RunCommand, write_job


def test_follows_until_the_end_and_warns_once_on_unreachable_tracker(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "FINISH_TIMEOUT_S", 120.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ended = trainyard("train", write_job(tmp_path, follow=["tensorboard", "mlflow"]), "--json", "--quiet")
    assert ended.exit_code == 0, ended.stderr
    assert ended.json["status"] == "finished"
    (warning,) = ended.stderr.splitlines()
    assert warning.startswith("warning: mlflow: no tracking server is named")
    assert "MLFLOW_TRACKING_URI" in warning
    run = Path(ended.json["url"])
    cells = [path.stem for path in (run / "metrics" / "steps").iterdir()]
    for split in ("steps", "val"):
        assert {path.suffix[1:] for path in (run / "tensorboard" / split).iterdir()} == set(cells)

    again = trainyard("follow", run.name, "--to", "tensorboard", "--json")
    assert again.json["followers"] == {"tensorboard": {"where": f"{run}/tensorboard", "cells": 0}}
    refused = trainyard("follow", run.name)
    assert (refused.exit_code, "MLFLOW_TRACKING_URI" in refused.stderr) == (2, True)


def test_follow_without_trackers_or_with_an_unknown_one(trainyard: RunCommand, tmp_path: Path) -> None:
    run = trainyard("train", write_job(tmp_path), "--json").json["run"]
    assert trainyard("follow", run).exit_code == 2
    unknown = trainyard("follow", run, "--to", "tensorbord")
    assert unknown.exit_code == 2
    assert "tensorboard or mlflow" in unknown.stderr
    assert trainyard("follow", "no-such-run", "--to", "tensorboard").exit_code == 2
