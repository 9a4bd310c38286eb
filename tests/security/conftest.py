"""A finished run and one that was interrupted, made once; each test gets copies to spoil."""

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
"""Of the whole run: 3 cells."""
INTERRUPTED_AFTER = 450


@pytest.fixture(scope="session")
def example_runs(tmp_path_factory: pytest.TempPathFactory) -> ExampleRuns:
    """The runs and their job file."""
    folder = tmp_path_factory.mktemp("security")
    job = folder / "victim.yaml"
    job.write_text(JOB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_writer, "COMMIT_INTERVAL_FACTOR", 0)  # a commit whenever one is due
        untouched = train(job, storage=str(folder / "untouched"))

        def stop(event: Event) -> None:
            if isinstance(event, EvaluationLogged) and event.step >= INTERRUPTED_AFTER:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted):
            train(job, storage=str(folder / "interrupted"), on_event=stop)
    return ExampleRuns(job, Path(untouched.url), folder / "interrupted" / untouched.run)


@pytest.fixture
def copy_run(example_runs: ExampleRuns, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the finished or the interrupted run, in `runs` of the working directory."""

    def copied(which: str = "finished") -> Path:
        source = example_runs.finished if which == "finished" else example_runs.interrupted
        return Path(shutil.copytree(source, tmp_path / "runs" / source.name))

    return copied
