"""Preparing data under a watchdog: whoever waits for the process that does it, or takes long itself, is no hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.cache import growing, take_lock
from pipeline.watchdog import on_progress

HANG_S = 1.5
WATCHED = f"""
import sys, time
from pathlib import Path
from pipeline.context import SingleProcessContext, own_process
from pipeline.errors import HungError
from pipeline.watchdog import Limits, Stacks, Watchdog, note_progress

def watched():
    def save(name, text):
        raise OSError("no storage here")
    told = lambda event: print(event.text, file=sys.stderr, flush=True)
    limits = Limits({HANG_S}, storage_s=60)
    context, stacks = SingleProcessContext(told), Stacks(str(Path.cwd()), 0, save)
    return Watchdog(context, limits, stacks, where="run", answers=lambda: 0)
"""
CACHED = """
from pipeline.data.cache import cached
from pipeline.job import Cache

def build(folder):
    print("building", flush=True)
    for _ in range(int(sys.argv[1])):
        time.sleep(0.1)
        note_progress()
    (folder / "data").write_bytes(b"x")

with watched():
    print((cached(Cache(folder="cache"), "aa", build, size=1).folder / "data").read_text())
"""
CALL = """
from pipeline.data.sources import open_source
from pipeline.job_file import build_job

sys.path.append(str(Path.cwd()))
with own_process(), watched():
    open_source(build_job({"name": "t", "data": {"source": {"call": "slow_code:" + sys.argv[1]}}}, "test"))
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

def holds_pythons_lock():
    ctypes.PyDLL(None).sleep(SECONDS)
    return np.ones((2, 2)), np.array([0, 1])
"""


def start(folder: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED + program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def builder(folder: Path, steps: int) -> subprocess.Popen[str]:
    """A process that fills the cache, in so many tenths of a second."""
    process = start(folder, CACHED, str(steps))
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


def test_a_builder_that_works_and_who_waits_for_it_live_on(tmp_path: Path) -> None:
    """Both for longer than either may stand still."""
    processes = [builder(tmp_path, steps=int(10 * (HANG_S + 2) + 20)), start(tmp_path, CACHED, "0")]
    assert [(*process.communicate(timeout=100), process.returncode) for process in processes] == [("x\n", "", 0)] * 2


def test_a_builder_that_is_stopped_is_found_out(tmp_path: Path) -> None:
    stopped = builder(tmp_path, steps=10_000)
    try:
        waiting = start(tmp_path, CACHED, "0")
        stopped.send_signal(signal.SIGSTOP)
        out, err = waiting.communicate(timeout=100)
        assert (out, waiting.returncode) == ("", 1)
        assert "s for another process that prepares the same data and makes no progress" in err
        assert "scale.hang_s" in err
    finally:
        stopped.kill()
        stopped.communicate()


@pytest.mark.parametrize("how", ["waits", "holds_pythons_lock"])
def test_a_function_that_returns_the_data_may_take_its_time(tmp_path: Path, how: str) -> None:
    (tmp_path / "slow_code.py").write_text(SLOW_CODE)
    process = start(tmp_path, CALL, how)
    assert (*process.communicate(timeout=100), process.returncode) == ("loaded\n", "", 0)


def test_after_such_a_function_the_watchdog_is_back(tmp_path: Path) -> None:
    (tmp_path / "slow_code.py").write_text(SLOW_CODE.replace(f"SECONDS = {int(HANG_S + 3)}", "SECONDS = 0"))
    process = start(tmp_path, CALL.replace("print", "    time.sleep(1000)\nprint"), "waits")
    out, err = process.communicate(timeout=100)
    assert (out, process.returncode) == ("", 1)
    assert "training stood still for" in err


def test_a_download_that_grows_is_progress_here_and_for_who_waits(tmp_path: Path) -> None:
    noted: list[str] = []
    folder = tmp_path / "download"
    folder.mkdir()
    with (tmp_path / "lock").open("w") as lock:
        take_lock(lock)
        os.utime(lock.fileno(), (1, 1))
        with on_progress(lambda: noted.append("here")), growing(folder, lock):
            (folder / "file").write_bytes(b"some")
            deadline = time.monotonic() + 60
            while not (noted and os.fstat(lock.fileno()).st_mtime > 1):
                assert time.monotonic() < deadline
                time.sleep(0.01)
