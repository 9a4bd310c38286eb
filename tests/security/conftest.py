"""A finished and an interrupted run, made once; each test gets copies to damage."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import train
from pipeline.errors import Interrupted
from pipeline.events import EvaluationLogged, Event
from pipeline.runs import async_writer
from tests.cli.conftest import trainyard as trainyard
from tests.security.corruption import JOB, ExampleRuns

STEPS = 600
"""Steps of the whole run: 3 segments of the metric log."""
INTERRUPTED_AFTER = 450


@pytest.fixture(scope="session")
def example_runs(tmp_path_factory: pytest.TempPathFactory) -> ExampleRuns:
    """The two runs and their job file."""
    folder = tmp_path_factory.mktemp("security")
    job = folder / "victim.yaml"
    job.write_text(JOB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_writer, "COMMIT_INTERVAL_FACTOR", 0)  # never delay a commit
        finished = train(job, storage=str(folder / "finished"))

        def stop(event: Event) -> None:
            if isinstance(event, EvaluationLogged) and event.step >= INTERRUPTED_AFTER:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted):
            train(job, storage=str(folder / "interrupted"), on_event=stop)
    return ExampleRuns(job, Path(finished.url), folder / "interrupted" / finished.run)


@pytest.fixture
def copy_run(example_runs: ExampleRuns, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies the finished or the interrupted run to `runs` in the working directory."""

    def copy(which: str = "finished") -> Path:
        source = example_runs.finished if which == "finished" else example_runs.interrupted
        return Path(shutil.copytree(source, tmp_path / "runs" / source.name))

    return copy
