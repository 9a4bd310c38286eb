"""The cache of decoded data: entries are complete or absent, built once, and not deleted while in use; its size is
bounded."""

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

from pipeline.config import CacheConfig
from pipeline.data.cache import get_or_build, has_room_for, scratch_folder
from pipeline.errors import DataError
from tests.data.parquet_jobs import open_parquet, write_parquet

BUILDER_SCRIPT = """
import os, sys, time
from pathlib import Path
from pipeline.data.cache import get_or_build
from pipeline.config import CacheConfig

folder, key, slow_s = sys.argv[1], sys.argv[2], float(sys.argv[3])

def build(entry_folder):
    assert [path.name for path in entry_folder.iterdir()] == [".builder"]
    (entry_folder / "one").write_bytes(b"1" * 100)
    with open(os.path.join(folder, "..", "builds"), "a") as file:
        file.write("built\\n")
    time.sleep(slow_s)
    (entry_folder / "two").write_bytes(b"2" * 100)

entry = get_or_build(CacheConfig(folder=folder, max_gb=1e-6), key, build, size_bytes=200)
print(len((entry.folder / "two").read_bytes()), flush=True)
sys.stdin.read()
"""


def start_builder(folder: Path, key: str, slow_s: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER_SCRIPT, str(folder), key, str(slow_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_output(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make_builder(size: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "data").write_bytes(b"x" * size)

    return build


def fail_if_called(_: Path) -> None:
    raise AssertionError("must not be called")


def list_entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_two_concurrent_processes_build_once(tmp_path: Path) -> None:
    processes = [start_builder(tmp_path / "cache", "aa", slow_s=0.5) for _ in range(2)]
    assert [wait_for_output(process) for process in processes] == ["100\n", "100\n"]
    assert (tmp_path / "builds").read_text() == "built\n"


def test_killed_builder_leaves_nothing_and_the_next_builds(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    killed = start_builder(folder, "aa", slow_s=60)
    wait_until((folder / ".building-aa" / "one").exists)
    waiting = start_builder(folder, "aa")
    time.sleep(0.2)
    assert waiting.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert wait_for_output(waiting) == "100\n"
    assert list_entries(folder) == {"aa"}
    assert {path.name for path in (folder / "aa").iterdir()} == {".builder", ".readers", "one", "two"}


def test_abandoned_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    killed = start_builder(tmp_path / "cache", "aa", slow_s=60)
    wait_until((tmp_path / "cache" / ".building-aa" / "one").exists)
    killed.kill()
    killed.communicate()
    get_or_build(CacheConfig(folder=str(tmp_path / "cache")), "bb", make_builder(10), size_bytes=10)
    assert list_entries(tmp_path / "cache") == {"bb"}


def test_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("broken data")

    cache = CacheConfig(folder=str(tmp_path))
    with pytest.raises(RuntimeError, match="broken data"):
        get_or_build(cache, "aa", build, size_bytes=1)
    assert list_entries(tmp_path) == set()
    assert (get_or_build(cache, "aa", make_builder(3), size_bytes=3).folder / "data").read_bytes() == b"xxx"


def test_concurrent_threads_build_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.1)

    threads = [
        threading.Thread(
            target=get_or_build, args=(CacheConfig(folder=str(tmp_path)), "aa", build), kwargs={"size_bytes": 1}
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_least_recently_used_entry_is_evicted(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for key in ("aa", "bb", "cc"):
        wait_for_output(start_builder(folder, key))
        os.utime(folder / key, (1, 1))
    os.utime(folder / "bb", (2, 2))
    wait_for_output(start_builder(folder, "aa"))  # used just now
    get_or_build(CacheConfig(folder=str(folder), max_gb=900e-9), "dd", make_builder(350), size_bytes=350)
    assert list_entries(folder) == {"aa", "bb", "dd"}
    get_or_build(CacheConfig(folder=str(folder), max_gb=900e-9), "ee", make_builder(200), size_bytes=200)
    assert list_entries(folder) == {"aa", "dd", "ee"}


def test_entry_in_use_is_not_evicted(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    reader = start_builder(folder, "aa")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "100\n"
    cache = CacheConfig(folder=str(folder), max_gb=300e-9)
    with pytest.raises(DataError, match="in use"):
        get_or_build(cache, "bb", make_builder(200), size_bytes=200)
    assert list_entries(folder) == {"aa"}
    wait_for_output(reader)
    entry = get_or_build(cache, "bb", make_builder(200), size_bytes=200)
    assert list_entries(folder) == {entry.folder.name} == {"bb"}
    with pytest.raises(DataError, match="in use"):
        get_or_build(cache, "cc", make_builder(200), size_bytes=200)  # bb is in use by this process


def make_array_builder(rows: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        np.save(folder / "array.npy", np.arange(rows))

    return build


def test_unused_entry_is_evicted(tmp_path: Path) -> None:
    """A notebook may train on one dataset after another."""
    cache, size = CacheConfig(folder=str(tmp_path), max_gb=2500e-9), 8 * 100 + 200
    for number in range(5):
        array = get_or_build(cache, f"a{number}", make_array_builder(100), size_bytes=size).map_array("array.npy")
        assert array.sum() == 4950
    view = array[50:60]
    del array
    for number in range(5):  # the view still uses the last one
        get_or_build(cache, f"b{number}", make_array_builder(100), size_bytes=size)
        assert "a4" in list_entries(tmp_path)
    assert view.tolist() == list(range(50, 60))
    other = get_or_build(cache, "c", make_array_builder(100), size_bytes=size)
    with pytest.raises(DataError, match="in use"):
        get_or_build(cache, "d", make_array_builder(100), size_bytes=size)
    del view, other
    kept = get_or_build(cache, "d", make_array_builder(100), size_bytes=2 * size)
    assert list_entries(tmp_path) == {kept.folder.name}


def test_entry_held_by_a_reference_cycle_is_evicted(tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path), max_gb=1500e-9)
    held: list[object] = [get_or_build(cache, "aa", make_array_builder(100), size_bytes=1000).map_array("array.npy")]
    held.append(held)
    del held
    get_or_build(cache, "bb", make_array_builder(100), size_bytes=1000)
    assert list_entries(tmp_path) == {"bb"}


def test_tables_opened_one_after_another_are_evicted(tmp_path: Path) -> None:
    """A dataset that is no longer referenced releases its cache entry."""
    folder = tmp_path / "cache"
    options: dict[str, Any] = {"cache": {"folder": str(folder), "in_memory_mb": 0, "max_gb": 4e-3}}
    for number in range(4):
        path = write_parquet(
            tmp_path / f"{number}.parquet", {"x": np.arange(100_000) + number, "y": np.arange(100_000) % 2}
        )
        assert float(open_parquet(path, **options).train.inputs[0, 0]) == number
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


def test_entry_being_built_counts_with_its_full_size(tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path), max_gb=500e-9)

    def build(folder: Path) -> None:
        with pytest.raises(DataError, match="in use"):
            get_or_build(cache, "bb", make_builder(200), size_bytes=200)
        with pytest.raises(DataError, match="in use"), scratch_folder(cache, 200):
            pass
        with scratch_folder(cache, 50) as scratch:
            assert scratch.is_dir()
        assert not scratch.exists()

    get_or_build(cache, "aa", build, size_bytes=400)


def test_entry_larger_than_the_limit_is_rejected(tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path), max_gb=2.0)
    with pytest.raises(DataError, match=r"takes 3\.00 GB, but max_gb allows 2\.00 GB\n.*data\.cache\.max_gb=3"):
        get_or_build(cache, "aa", fail_if_called, size_bytes=3 * 10**9)
    assert not has_room_for(cache, 3 * 10**9)
    assert has_room_for(cache, 10**6)
    assert not has_room_for(CacheConfig(folder=str(tmp_path), max_gb=1e9), 10**17)


def test_too_small_disk_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.cache\.folder: the disk of .* is full") as raised:
        get_or_build(CacheConfig(folder=str(tmp_path), max_gb=1e9), "aa", fail_if_called, size_bytes=10**17)
    assert "--set data.cache.folder=DIR" in raised.value.fix


def test_disk_that_fills_up_is_reported(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this machine has no /dev/full")

    def build(_: Path) -> None:
        full.write_bytes(b"x")

    with pytest.raises(DataError, match=r"data\.cache\.folder: .* cannot be written: No space left on device"):
        get_or_build(CacheConfig(folder=str(tmp_path)), "aa", build, size_bytes=1)


def test_decoding_errors_are_passed_through(tmp_path: Path) -> None:
    def build(_: Path) -> None:
        (tmp_path.parent / "no").read_bytes()

    with pytest.raises(FileNotFoundError):
        get_or_build(CacheConfig(folder=str(tmp_path)), "aa", build, size_bytes=1)


@pytest.mark.parametrize("folder", ["file", "file/inner"])
def test_unwritable_folder_is_reported(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache\.folder: .* cannot be written"):
        get_or_build(CacheConfig(folder=str(tmp_path / folder)), "aa", fail_if_called, size_bytes=1)


def test_home_is_expanded_and_a_deleted_entry_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = CacheConfig(folder="~/cache")
    entry = get_or_build(cache, "aa", make_builder(1), size_bytes=1).folder
    assert entry == tmp_path / "cache" / "aa"
    assert get_or_build(cache, "aa", fail_if_called, size_bytes=1).folder == entry
    (entry / "data").unlink()
    (entry / ".builder").unlink()
    (entry / ".readers").unlink()
    entry.rmdir()
    assert (get_or_build(cache, "aa", make_builder(2), size_bytes=2).folder / "data").read_bytes() == b"xx"
