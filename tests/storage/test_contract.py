"""One suite for every kind of storage: local files, memory://, S3, and S3 with injected faults."""

from __future__ import annotations

import pickle
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import Storage, remote
from pipeline.testing import inject_faults


@pytest.fixture(params=["local", "memory", "s3", "faulty"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage.open(str(tmp_path / "runs"))
    elif request.param == "memory":
        opened = Storage.open(f"memory://{uuid.uuid4().hex}/runs")
        yield opened
        opened.delete_folder("run")
    elif request.param == "s3":
        yield Storage.open(request.getfixturevalue("s3_url"))
    else:
        with inject_faults("seed=4 error=0.02 lost=0.02 slow_down=0.002 truncated=0.01"):
            yield Storage.open(request.getfixturevalue("s3_url").replace("s3://", "faulty://s3/"))


def test_replace_and_read(storage: Storage) -> None:
    storage.replace("run/a.bin", b"\x00one")
    assert storage.read("run/a.bin") == b"\x00one"
    storage.replace("run/a.bin", b"two", sync=True)
    assert storage.read("run/a.bin") == b"two"
    storage.replace("run/empty", b"")
    assert storage.read("run/empty") == b""


def test_replace_large_file(storage: Storage) -> None:
    data = bytes(range(256)) * 20_000
    storage.replace("run/large.bin", data)
    assert storage.read("run/large.bin") == data


def test_missing_files(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("run/none")
    assert storage.list() == []
    assert storage.list("run/none") == []
    assert not storage.exists("run/none")
    storage.delete("run/none")
    storage.delete_folder("run/none")


def test_files_around_the_first_read_size(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_READ_BYTES", 1000)
    for size in (0, 1, 999, 1000, 1001, 3000):
        storage.replace(f"run/{size}", bytes(size))
        assert storage.read(f"run/{size}") == bytes(size)


def test_no_children_below_a_file(storage: Storage) -> None:
    storage.replace("run/file", b"")
    with pytest.raises(FileNotFoundError):
        storage.read("run/file/below")


def test_create_succeeds_once(storage: Storage) -> None:
    assert storage.create("run/x.json", b"mine")
    assert storage.create("run/x.json", b"mine"), "the same content is a retried request"
    assert not storage.create("run/x.json", b"other")
    assert storage.read("run/x.json") == b"mine"


def test_concurrent_creates_agree_on_the_winner(storage: Storage) -> None:
    rounds, racers = 12, 4
    winners: dict[int, list[bytes]] = {number: [] for number in range(rounds)}
    barrier = threading.Barrier(racers)

    def race(nonce: bytes) -> None:
        for number in range(rounds):
            barrier.wait()
            if storage.create(f"run/{number}", nonce):
                winners[number].append(nonce)

    threads = [threading.Thread(target=race, args=(f"nonce-{number}".encode(),)) for number in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(rounds):
        assert winners[number] == [storage.read(f"run/{number}")]


def test_listing_has_files_and_folders(storage: Storage) -> None:
    assert storage.list("run") == []
    storage.replace("run/b", b"")
    assert storage.list("run") == ["b"]
    storage.replace("run/folder/c", b"")
    storage.create("run/a", b"")
    storage.replace("running/d", b"")
    assert storage.list("run") == ["a", "b", "folder"]
    assert storage.list() == ["run", "running"]
    storage.delete("run/b")
    assert storage.list("run") == ["a", "folder"]
    storage.delete_folder("run")
    assert storage.list() == ["running"]


def test_exists_for_files_and_folders(storage: Storage) -> None:
    storage.replace("run/folder/c", b"")
    assert storage.exists("run")
    assert storage.exists("run/folder")
    assert storage.exists("run/folder/c")
    storage.delete("run/folder/c")
    assert not storage.exists("run/folder/c")


def test_subfolder_paths_are_relative(storage: Storage) -> None:
    inner = storage.subfolder("run").subfolder("metrics/steps")
    inner.replace("0", b"segment")
    assert storage.read("run/metrics/steps/0") == b"segment"
    assert inner.url == f"{storage.url}/run/metrics/steps"


@pytest.mark.parametrize("path", ["..", "../other", "a/../../b", "/etc", "a//b", "./a", "", "a\0b"])
def test_paths_stay_in_their_folder(storage: Storage, path: str) -> None:
    for action in (storage.read, storage.subfolder, storage.exists, storage.delete, storage.delete_folder):
        with pytest.raises(StorageError, match="not a path inside"):
            action(path)
    with pytest.raises(StorageError, match="not a path inside"):
        storage.replace(path, b"")


def test_create_is_reported_as_exclusive(storage: Storage) -> None:
    assert storage.has_conditional_writes()
    assert storage.list() == [], "the probe is removed"


def test_storage_can_be_pickled(storage: Storage) -> None:
    inner = storage.subfolder("run", own_temporary_folder=True).with_timeout(7.0)
    inner.replace("a", b"1")
    copy = pickle.loads(pickle.dumps(inner))
    assert copy.url == inner.url
    assert copy.read("a") == b"1"
    assert copy.create("b", b"2")
    assert storage.list("run") == ["a", "b"]


def test_map_concurrent_keeps_order(storage: Storage) -> None:
    for number in range(20):
        storage.replace(f"run/{number}", str(number).encode())
    assert list(storage.map_concurrent(lambda number: storage.read(f"run/{number}"), range(20))) == [
        str(number).encode() for number in range(20)
    ]
