"""Data preparation under a watchdog: slow preparation, and waiting for another process's preparation, are not hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.cache import acquire_lock, track_folder_growth
from pipeline.watchdog import listening_to_progress

HANG_S = 1.5
WATCHDOG_SCRIPT = f"""
import sys, time
from pathlib import Path
from pipeline.context import SingleProcessContext, command_line_process
from pipeline.errors import HungError
from pipeline.watchdog import HangTimeouts, StackDump, Watchdog, note_progress

def watched():
    def save(name, text):
        raise OSError("no storage here")
    on_event = lambda event: print(event.text, file=sys.stderr, flush=True)
    limits = HangTimeouts({HANG_S}, storage_s=60)
    context, stacks = SingleProcessContext(on_event), StackDump(str(Path.cwd()), 0, save)
    return Watchdog(context, limits, stacks, where="run", response_count=lambda: 0)
"""
CACHE_SCRIPT = """
from pipeline.data.cache import get_or_build
from pipeline.config import CacheConfig

def build(folder):
    print("building", flush=True)
    for _ in range(int(sys.argv[1])):
        time.sleep(0.1)
        note_progress()
    (folder / "data").write_bytes(b"x")

with watched():
    print((get_or_build(CacheConfig(folder="cache"), "aa", build, size_bytes=1).folder / "data").read_text())
"""
USER_FUNCTION_SCRIPT = """
from pipeline.data.sources import open_dataset
from pipeline.config.files import build_job

sys.path.append(str(Path.cwd()))
with command_line_process(), watched():
    open_dataset(build_job({"name": "t", "data": {"source": {"call": "slow_code:" + sys.argv[1]}}}, "test"))
print("loaded")
"""
SLOW_CODE = f"""
import ctypes
import threading
import time

import numpy as np

SECONDS = {int(HANG_S + 3)}

def waits():
    threading.Event().wait(SECONDS)
    return np.ones((2, 2)), np.array([0, 1])

def holds_the_gil():
    ctypes.PyDLL(None).sleep(SECONDS)
    return np.ones((2, 2)), np.array([0, 1])
"""


def start_script(folder: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHDOG_SCRIPT + program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_builder(folder: Path, steps: int) -> subprocess.Popen[str]:
    """Start a process that fills the cache in `steps` tenths of a second."""
    process = start_script(folder, CACHE_SCRIPT, str(steps))
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


def test_working_builder_and_its_waiters_are_not_hangs(tmp_path: Path) -> None:
    """The builder takes longer than the watchdog allows without progress."""
    processes = [start_builder(tmp_path, steps=int(10 * (HANG_S + 2) + 20)), start_script(tmp_path, CACHE_SCRIPT, "0")]
    assert [(*process.communicate(timeout=100), process.returncode) for process in processes] == [("x\n", "", 0)] * 2


def test_waiting_for_a_stopped_builder_is_a_hang(tmp_path: Path) -> None:
    stopped = start_builder(tmp_path, steps=10_000)
    try:
        waiting = start_script(tmp_path, CACHE_SCRIPT, "0")
        stopped.send_signal(signal.SIGSTOP)
        out, err = waiting.communicate(timeout=100)
        assert (out, waiting.returncode) == ("", 1)
        assert "s for another process that prepares the same data and makes no progress" in err
        assert "scale.hang_s" in err
    finally:
        stopped.kill()
        stopped.communicate()


@pytest.mark.parametrize("function", ["waits", "holds_the_gil"])
def test_user_function_that_loads_data_may_be_slow(tmp_path: Path, function: str) -> None:
    (tmp_path / "slow_code.py").write_text(SLOW_CODE)
    process = start_script(tmp_path, USER_FUNCTION_SCRIPT, function)
    assert (*process.communicate(timeout=100), process.returncode) == ("loaded\n", "", 0)


def test_watchdog_resumes_after_user_function(tmp_path: Path) -> None:
    (tmp_path / "slow_code.py").write_text(SLOW_CODE.replace(f"SECONDS = {int(HANG_S + 3)}", "SECONDS = 0"))
    process = start_script(tmp_path, USER_FUNCTION_SCRIPT.replace("print", "    time.sleep(1000)\nprint"), "waits")
    out, err = process.communicate(timeout=100)
    assert (out, process.returncode) == ("", 1)
    assert "training made no progress for" in err


def test_growing_download_counts_as_progress(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = tmp_path / "download"
    folder.mkdir()
    with (tmp_path / "lock").open("w") as lock:
        acquire_lock(lock)
        os.utime(lock.fileno(), (1, 1))
        with listening_to_progress(lambda: notes.append("progress")), track_folder_growth(folder, lock):
            (folder / "file").write_bytes(b"some")
            deadline = time.monotonic() + 60
            while not (notes and os.fstat(lock.fileno()).st_mtime > 1):
                assert time.monotonic() < deadline
                time.sleep(0.01)
