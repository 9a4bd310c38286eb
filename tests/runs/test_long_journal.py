"""The cost to resume, show, list and load a run with 20,000 journal entries is that of a short one."""

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
from tests.runs.factories import create_run, make_block, make_snapshot

NUM_ENTRIES = 20_000
MAX_REQUESTS = 60


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A run of `NUM_ENTRIES` entries: a valid claim, commit and exit, and unreadable entries between them."""
    root = f"memory://{uuid.uuid4().hex}/runs"
    run = create_run(root)
    attempt = acquire_lease(run, driver="d", metadata={"host": "node-7", "way": "eager"})
    assert isinstance(run.storage.backend, RemoteBackend)
    for number in range(2, NUM_ENTRIES - 1):
        run.storage.backend.fs.pipe_file(f"{run.storage._root}/journal/{number:08d}.json", b"not to be read")
    attempt.state = replace(attempt.state, number=NUM_ENTRIES - 2)
    writer = AsyncRunWriter(attempt, keep=2)
    writer.log_steps(make_block(1, 20))
    writer.commit(make_snapshot(20, best=20))
    writer.write_exit("interrupted", None, 20)
    writer.close()
    attempt.close()
    yield root
    files = run.storage.backend.fs.store  # the removal of a folder by fsspec is quadratic
    for path in [path for path in files if path.startswith(run.storage._root)]:
        del files[path]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests to storage from here on."""
    requests: list[str] = []

    def record_calls(name: str) -> Callable[..., Any]:
        method = getattr(RemoteBackend, name)

        def call(self: RemoteBackend, path: str, *args: Any) -> Any:
            requests.append(f"{name} {path}")
            return method(self, path, *args)

        return call

    for name in ("read", "replace", "create", "list", "exists", "delete", "delete_folder"):
        monkeypatch.setattr(RemoteBackend, name, record_calls(name))
    return requests


@pytest.fixture(params=["with run.json", "without"])
def run(request: pytest.FixtureRequest, url: str) -> Iterator[Run]:
    """The run as opened by another process, with and without the hint in `run.json`."""
    storage = Storage.open(url).subfolder("run")
    summary = storage.read("run.json")
    if request.param == "without":
        storage.delete("run.json")
    yield Run(Storage.open(url), "run")
    storage.replace("run.json", summary)


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
    """The attempt has the metadata of the one before it."""
    run = Run(Storage.open(url), "run")
    attempt = acquire_lease(run, driver="e", metadata={"host": "node-8"})
    assert attempt.resume_checkpoint is not None
    assert (attempt.resume_checkpoint.step, attempt.highest_step, attempt.state.way) == (20, 20, "eager")
    assert attempt.previous_metadata["host"] == "node-7"
    writer = AsyncRunWriter(attempt, keep=2)
    writer.write_exit("interrupted", None, 20)
    writer.close()
    attempt.close()
    assert len([request for request in requests if "heartbeats" not in request]) <= MAX_REQUESTS
    assert run.journal.read_state().number == NUM_ENTRIES + 2
    assert [(item["host"], item["committed"], item["outcome"]) for item in run.read_summary()["history"]] == [
        ("node-7", 20, "interrupted"),
        ("node-8", None, "interrupted"),
    ]
