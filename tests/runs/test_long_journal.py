"""A run of twenty thousand commits costs what a short one does: to resume, to show, to list, to load."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from pipeline.commands.show import runs
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.checkpoints.checkpoint import find_checkpoint
from pipeline.runs.integrity import find_damage
from pipeline.runs.lease.attempt import acquire_lease
from pipeline.runs.run import Run
from pipeline.runs.status import read_run_status
from pipeline.storage import Storage
from pipeline.storage.remote import RemoteBackend
from tests.runs.parts import create_run, make_block, make_snapshot

NUM_ENTRIES = 20_000
MAX_REQUESTS = 60


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A run of so many entries: a claim, a commit and a leave as they are, and between them what nobody reads."""
    root = f"memory://{uuid.uuid4().hex}/runs"
    run = create_run(root)
    attempt = acquire_lease(run, driver="d", metadata={"host": "node-7", "way": "eager"})
    assert isinstance(run.storage.backend, RemoteBackend)
    for number in range(2, NUM_ENTRIES - 1):
        run.storage.backend.fs.pipe_file(f"{run.storage._root}/journal/{number:08d}.json", b"not to be read")
    attempt.state = replace(attempt.state, number=NUM_ENTRIES - 2)
    recorder = AsyncRunWriter(attempt, keep=2)
    recorder.log_steps(make_block(1, 20))
    recorder.commit(make_snapshot(20, best=20))
    recorder.write_exit("interrupted", None, 20)
    recorder.close()
    attempt.close()
    yield root
    files = run.storage.backend.fs.store  # its own removal of a folder looks through all of them for each
    for path in [path for path in files if path.startswith(run.storage._root)]:
        del files[path]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of storage from here on."""
    asked: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(RemoteBackend, name)

        def ask(self: RemoteBackend, path: str, *words: Any) -> Any:
            asked.append(f"{name} {path}")
            return method(self, path, *words)

        return ask

    for name in ("read", "replace", "create", "list", "exists", "delete", "delete_folder"):
        monkeypatch.setattr(RemoteBackend, name, counted(name))
    return asked


@pytest.fixture(params=["with run.json", "without"])
def run(request: pytest.FixtureRequest, url: str) -> Iterator[Run]:
    """It as another process sees it, with and without what says where the journal ends."""
    storage = Storage.open(url).subfolder("run")
    view = storage.read("run.json")
    if request.param == "without":
        storage.delete("run.json")
    yield Run(Storage.open(url), "run")
    storage.replace("run.json", view)


def test_show_long_journal(run: Run, requests: list[str]) -> None:
    status = read_run_status(run)
    assert (status.status, status.step, status.attempts, status.where["host"]) == ("interrupted", 20, 1, "node-7")
    assert len(requests) <= MAX_REQUESTS
    assert find_damage(run) == []
    assert len(requests) <= MAX_REQUESTS


def test_list_long_journal(run: Run, url: str, requests: list[str]) -> None:
    _, (listed,), unreadable = runs(url)
    assert (listed.status.step, unreadable) == (20, {})
    assert len(requests) <= MAX_REQUESTS


def test_find_checkpoint_in_long_journal(run: Run, requests: list[str]) -> None:
    assert find_checkpoint(run, "best").step == 20
    assert len(requests) <= MAX_REQUESTS


def test_resume_long_journal(url: str, requests: list[str]) -> None:
    """And tells the next what the one before it did."""
    run = Run(Storage.open(url), "run")
    attempt = acquire_lease(run, driver="e", metadata={"host": "node-8"})
    assert attempt.resume_checkpoint is not None
    assert (attempt.resume_checkpoint.step, attempt.highest_step, attempt.state.way) == (20, 20, "eager")
    assert attempt.previous_metadata["host"] == "node-7"
    recorder = AsyncRunWriter(attempt, keep=2)
    recorder.write_exit("interrupted", None, 20)
    recorder.close()
    attempt.close()
    assert len([one for one in requests if "heartbeats" not in one]) <= MAX_REQUESTS
    assert run.journal.read_state().number == NUM_ENTRIES + 2
    assert [(line["host"], line["committed"], line["outcome"]) for line in run.read_summary()["history"]] == [
        ("node-7", 20, "interrupted"),
        ("node-8", None, "interrupted"),
    ]
