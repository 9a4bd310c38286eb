"""The cache of decoded data: whole or absent, made once, bounded, never taken from under a reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.cache import cached, fits, scratch
from pipeline.errors import DataError
from pipeline.job import Cache
from tests.data.parquet_jobs import opened, write

PROCESS = """
import os, sys, time
from pathlib import Path
from pipeline.data.cache import cached
from pipeline.job import Cache

folder, key, slow_s = sys.argv[1], sys.argv[2], float(sys.argv[3])

def build(place):
    assert [path.name for path in place.iterdir()] == [".builder"]
    (place / "one").write_bytes(b"1" * 100)
    with open(os.path.join(folder, "..", "builds"), "a") as file:
        file.write("built\\n")
    time.sleep(slow_s)
    (place / "two").write_bytes(b"2" * 100)

entry = cached(Cache(folder=folder, max_gb=1e-6), key, build, size=200)
print(len((entry.folder / "two").read_bytes()), flush=True)
sys.stdin.read()
"""


def start(folder: Path, key: str, slow_s: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder), key, str(slow_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ends(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def put(size: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "data").write_bytes(b"x" * size)

    return build


def never(_: Path) -> None:
    raise AssertionError("it is there already")


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_two_processes_that_want_it_at_once_build_it_once(tmp_path: Path) -> None:
    both = [start(tmp_path / "cache", "aa", slow_s=0.5) for _ in range(2)]
    assert [ends(process) for process in both] == ["100\n", "100\n"]
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_killed_builder_leaves_nothing_and_the_next_one_builds(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    killed = start(folder, "aa", slow_s=60)
    until((folder / ".building-aa" / "one").exists)
    waiting = start(folder, "aa")
    time.sleep(0.2)
    assert waiting.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert ends(waiting) == "100\n"
    assert entries(folder) == {"aa"}
    assert {path.name for path in (folder / "aa").iterdir()} == {".builder", ".readers", "one", "two"}


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    killed = start(tmp_path / "cache", "aa", slow_s=60)
    until((tmp_path / "cache" / ".building-aa" / "one").exists)
    killed.kill()
    killed.communicate()
    cached(Cache(folder=str(tmp_path / "cache")), "bb", put(10), size=10)
    assert entries(tmp_path / "cache") == {"bb"}


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("broken data")

    cache = Cache(folder=str(tmp_path))
    with pytest.raises(RuntimeError, match="broken data"):
        cached(cache, "aa", build, size=1)
    assert entries(tmp_path) == set()
    assert (cached(cache, "aa", put(3), size=3).folder / "data").read_bytes() == b"xxx"


def test_threads_build_it_once_too(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.1)

    threads = [
        threading.Thread(target=cached, args=(Cache(folder=str(tmp_path)), "aa", build), kwargs={"size": 1})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for key in ("aa", "bb", "cc"):
        ends(start(folder, key))
        os.utime(folder / key, (1, 1))
    os.utime(folder / "bb", (2, 2))
    ends(start(folder, "aa"))  # used just now
    cached(Cache(folder=str(folder), max_gb=900e-9), "dd", put(350), size=350)
    assert entries(folder) == {"aa", "bb", "dd"}
    cached(Cache(folder=str(folder), max_gb=900e-9), "ee", put(200), size=200)
    assert entries(folder) == {"aa", "dd", "ee"}


def test_what_a_living_process_reads_stays(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    reader = start(folder, "aa")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "100\n"
    cache = Cache(folder=str(folder), max_gb=300e-9)
    with pytest.raises(DataError, match="in use"):
        cached(cache, "bb", put(200), size=200)
    assert entries(folder) == {"aa"}
    ends(reader)
    entry = cached(cache, "bb", put(200), size=200)
    assert entries(folder) == {entry.folder.name} == {"bb"}
    with pytest.raises(DataError, match="in use"):
        cached(cache, "cc", put(200), size=200)  # bb is in use by this process


def array_of(rows: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        np.save(folder / "array.npy", np.arange(rows))

    return build


def test_what_is_no_longer_used_makes_room(tmp_path: Path) -> None:
    """As where a notebook trains on one data set after another."""
    cache, size = Cache(folder=str(tmp_path), max_gb=2500e-9), 8 * 100 + 200
    for number in range(5):
        array = cached(cache, f"a{number}", array_of(100), size=size).map("array.npy")
        assert array.sum() == 4950
    view = array[50:60]
    del array
    for number in range(5):  # the view still needs the last one
        cached(cache, f"b{number}", array_of(100), size=size)
        assert "a4" in entries(tmp_path)
    assert view.tolist() == list(range(50, 60))
    other = cached(cache, "c", array_of(100), size=size)
    with pytest.raises(DataError, match="in use"):
        cached(cache, "d", array_of(100), size=size)
    del view, other
    kept = cached(cache, "d", array_of(100), size=2 * size)
    assert entries(tmp_path) == {kept.folder.name}


def test_what_only_objects_that_refer_to_each_other_hold_makes_room_too(tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path), max_gb=1500e-9)
    held: list[object] = [cached(cache, "aa", array_of(100), size=1000).map("array.npy")]
    held.append(held)
    del held
    cached(cache, "bb", array_of(100), size=1000)
    assert entries(tmp_path) == {"bb"}


def test_many_tables_in_one_process(tmp_path: Path) -> None:
    """A training that is over gives its data back, whoever still holds its numbers."""
    folder = tmp_path / "cache"
    options: dict[str, Any] = {"cache": {"folder": str(folder), "in_memory_mb": 0, "max_gb": 4e-3}}
    for number in range(4):
        path = write(tmp_path / f"{number}.parquet", {"x": np.arange(100_000) + number, "y": np.arange(100_000) % 2})
        assert float(opened(path, **options).train.inputs[0, 0]) == number
    assert len([place for place in folder.iterdir() if place.is_dir()]) == 1


def test_what_is_being_built_counts_with_all_that_it_will_take(tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path), max_gb=500e-9)

    def build(folder: Path) -> None:
        with pytest.raises(DataError, match="in use"):
            cached(cache, "bb", put(200), size=200)
        with pytest.raises(DataError, match="in use"), scratch(cache, 200):
            pass
        with scratch(cache, 50) as place:
            assert place.is_dir()
        assert not place.exists()

    cached(cache, "aa", build, size=400)


def test_one_entry_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path), max_gb=2.0)
    with pytest.raises(DataError, match=r"takes 3\.00 GB, but max_gb allows 2\.00 GB\n.*data\.cache\.max_gb=3"):
        cached(cache, "aa", never, size=3 * 10**9)
    assert not fits(cache, 3 * 10**9)
    assert fits(cache, 10**6)
    assert not fits(Cache(folder=str(tmp_path), max_gb=1e9), 10**17)


def test_a_disk_that_is_too_small_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.cache\.folder: the disk of .* is full") as raised:
        cached(Cache(folder=str(tmp_path), max_gb=1e9), "aa", never, size=10**17)
    assert "--set data.cache.folder=DIR" in raised.value.fix


def test_a_disk_that_fills_up_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here to write to")

    def build(_: Path) -> None:
        full.write_bytes(b"x")

    with pytest.raises(DataError, match=r"data\.cache\.folder: .* cannot be written: No space left on device"):
        cached(Cache(folder=str(tmp_path)), "aa", build, size=1)


def test_errors_of_what_is_decoded_are_not_the_cache_s(tmp_path: Path) -> None:
    def build(_: Path) -> None:
        (tmp_path.parent / "no").read_bytes()

    with pytest.raises(FileNotFoundError):
        cached(Cache(folder=str(tmp_path)), "aa", build, size=1)


@pytest.mark.parametrize("folder", ["file", "file/inner"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache\.folder: .* cannot be written"):
        cached(Cache(folder=str(tmp_path / folder)), "aa", never, size=1)


def test_home_is_understood_and_a_hand_that_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = Cache(folder="~/cache")
    entry = cached(cache, "aa", put(1), size=1).folder
    assert entry == tmp_path / "cache" / "aa"
    assert cached(cache, "aa", never, size=1).folder == entry
    (entry / "data").unlink()
    (entry / ".builder").unlink()
    (entry / ".readers").unlink()
    entry.rmdir()
    assert (cached(cache, "aa", put(2), size=2).folder / "data").read_bytes() == b"xx"
