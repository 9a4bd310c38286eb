"""Commands on an interrupted run of an earlier version: reading it works, and training refuses to resume it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from pipeline import load, train
from pipeline.errors import Interrupted
from pipeline.events import EvaluationLogged, Event
from tests.cli.command_line import RunCommand, write_job
from tests.runs.earlier_checkpoints import contents, pickle_states


@pytest.fixture
def job(tmp_path: Path) -> str:
    return write_job(tmp_path, checkpoint={"every_epochs": 1})


@pytest.fixture
def interrupted(job: str, tmp_path: Path) -> Path:
    """The directory of a run that was interrupted after 2 of its 3 epochs."""

    def stop(event: Event) -> None:
        if isinstance(event, EvaluationLogged) and event.step >= 16:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(job, name="cut", storage=str(tmp_path / "runs"), on_event=stop)
    pickle_states(tmp_path / "runs/cut")
    return tmp_path / "runs/cut"


def test_training_is_refused_and_changes_nothing(trainyard: RunCommand, job: str, interrupted: Path) -> None:
    before = contents(interrupted)
    for workers in (0, 2):
        refused = trainyard("train", job, "--name", "cut", "--set", f"scale.workers={workers}")
        assert refused.exit_code == 2
        assert refused.stderr.count("error:") == 1
        assert "started by an earlier version" in refused.stderr
        assert f"{interrupted}/checkpoints/step-" in refused.stderr
        assert "finish it with the version that started it" in refused.stderr
        assert contents(interrupted) == before


def test_a_new_run_starts_from_its_weights_as_the_message_says(
    trainyard: RunCommand, job: str, interrupted: Path
) -> None:
    message = trainyard("train", job, "--name", "cut").stderr
    start = message.split("model.init_from: ")[1].split()[0]
    ended = trainyard("train", job, "--set", f"model.init_from={start}")
    assert ended.exit_code == 0, ended.stderr
    assert len(list(interrupted.parent.iterdir())) == 2


def test_show_evaluate_and_load_still_work(trainyard: RunCommand, interrupted: Path) -> None:
    shown = trainyard("show", "cut")
    assert (shown.exit_code, "interrupted at step" in shown.stdout) == (0, True)
    assert trainyard("evaluate", "cut").exit_code == 0
    assert load(str(interrupted)).predict([[0.0, 0.0]]).shape == (1,)


def test_a_finished_run_of_an_earlier_version_is_not_trained_again(
    trainyard: RunCommand, job: str, tmp_path: Path
) -> None:
    assert trainyard("train", job, "--name", "done").exit_code == 0
    run = tmp_path / "runs/done"
    pickle_states(run)
    before = contents(run)
    again = trainyard("train", job, "--name", "done")
    assert (again.exit_code, "nothing to do" in again.stderr) == (0, True)
    assert contents(run) == before
    (run / "result.json").unlink()
    shutil.rmtree(run / "metrics")
    assert trainyard("train", job, "--name", "done").exit_code == 0
    results = [
        {path: data for path, data in files.items() if path.startswith(("metrics", "result"))}
        for files in (before, contents(run))
    ]
    assert results[0] == results[1]
