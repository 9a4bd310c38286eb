"""Concurrent processes on one store, and SIGKILL during writes: on local files and on S3."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.storage import Storage

RACER_SCRIPT = """
import sys
from pipeline.storage import Storage
storage, name = Storage.open(sys.argv[1]), sys.argv[2]
storage.has_conditional_writes()
print("ready", flush=True)
for number in sys.stdin:
    print(int(storage.create(f"journal/{number.strip()}", name.encode() * 400)), flush=True)
"""

WRITER_SCRIPT = """
import itertools, sys
from pipeline.storage import Storage, remote
storage, size = Storage.open(sys.argv[1]), int(sys.argv[2])
remote.PART_BYTES = 5 * 2**20  # the smallest part that S3 allows
for number in itertools.count():
    data = bytes([number % 251]) * size
    storage.replace("run/replaced", data)
    storage.create(f"run/created-{number}", data[:300_000])
    if number == 0:
        print("ready", flush=True)
"""


@contextmanager
def start_ready(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process, wait until it is ready, and kill it at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def race_processes(url: str, rounds: int) -> None:
    """Let two processes create the same names at the same time, and check that each create succeeds in one of them."""
    winners: list[str] = []
    with start_ready(RACER_SCRIPT, url, "a") as first, start_ready(RACER_SCRIPT, url, "b") as second:
        for number in range(rounds):
            for racer in (first, second) if number % 2 else (second, first):
                assert racer.stdin is not None
                racer.stdin.write(f"{number}\n")
                racer.stdin.flush()
            answers = [int(racer.stdout.readline()) for racer in (first, second) if racer.stdout is not None]
            assert sum(answers) == 1, f"{answers} in round {number}"
            winners.append("ab"[answers.index(1)])
    assert set(winners) == {"a", "b"}, "both must win some rounds, or there was no race"
    storage = Storage.open(url)
    contents = storage.map_concurrent(lambda number: storage.read(f"journal/{number}"), range(rounds))
    assert [data.decode() for data in contents] == [winner * 400 for winner in winners]


def test_processes_race_for_local_files(tmp_path: Path) -> None:
    race_processes(str(tmp_path), 400)


def test_processes_race_for_objects(s3_url: str) -> None:
    race_processes(s3_url, 40)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["local", "s3"])
def test_thousands_of_races(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    race_processes(str(tmp_path) if store == "local" else request.getfixturevalue("s3_url"), 4000)


def test_threads_race_for_names_in_memory() -> None:
    storage = Storage.open(f"memory://{uuid.uuid4().hex}")
    rounds, racers = 1000, 3
    won: list[list[int]] = [[] for _ in range(racers)]

    def run(racer: int) -> None:
        won[racer] = [number for number in range(rounds) if storage.create(f"journal/{number}", str(racer).encode())]

    threads = [threading.Thread(target=run, args=(thread_index,)) for thread_index in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for numbers in won for number in numbers) == list(range(rounds))
    for thread_index, numbers in enumerate(won):
        assert all(storage.read(f"journal/{number}") == str(thread_index).encode() for number in numbers)
    storage.delete_folder("journal")


@pytest.mark.parametrize(("store", "size", "kills"), [("local", 300_000, 6), ("s3", 12 * 2**20, 3)])
def test_kill_at_any_moment_leaves_whole_files(
    store: str, size: int, kills: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On S3 the replaced file is sent in three parts, and the created ones in one request."""
    url = str(tmp_path) if store == "local" else request.getfixturevalue("s3_url")
    storage = Storage.open(url)
    for index in range(kills):
        with start_ready(WRITER_SCRIPT, url, str(size)) as writer:
            time.sleep(0.004 * index if store == "local" else 0.15 * index)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        for name in storage.list("run"):
            data = storage.read(f"run/{name}")
            assert len(data) == (size if name == "replaced" else 300_000)
            assert data.count(data[0]) == len(data), f"{name} is torn"
    assert len(storage.list("run")) > 1
    assert ".tmp" not in storage.list()
    storage.remove_temporary()
    if store == "local":
        assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("store", ["local", "memory", "s3"])
def test_folder_deleted_during_concurrent_writes(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Late writes of a superseded attempt may stay: neither call fails, and no file is torn."""
    url = str(tmp_path) if store == "local" else f"memory://{uuid.uuid4().hex}"
    storage = Storage.open(request.getfixturevalue("s3_url") if store == "s3" else url)
    stopped, failures = threading.Event(), list[BaseException]()

    def write() -> None:
        number = 0
        try:
            while not stopped.is_set():
                number += 1
                storage.replace(f"checkpoints/old/{number % 7}", b"x" * 5000)
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    for number in range(8 if store == "s3" else 60):
        storage.replace("checkpoints/old/manifest.json", b"{}")
        storage.delete("checkpoints/old/manifest.json")
        storage.delete_folder("checkpoints/old")
        storage.replace("checkpoints/new", str(number).encode())
    stopped.set()
    writer.join()
    assert failures == []
    for name in storage.list("checkpoints/old"):
        assert storage.read(f"checkpoints/old/{name}") == b"x" * 5000
    storage.delete_folder("checkpoints/old")
    assert storage.list("checkpoints") == ["new"]
    storage.delete_folder("checkpoints")
