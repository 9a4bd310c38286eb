"""A process that has imported everything and forks one child per attempt, so that tests can kill hundreds of attempts
within a minute.

A child runs the real command line. With a `SignalAt`, it sends itself a real signal at the n-th file operation or the
n-th step. File operations count before and after each operation, and in the middle of a write.

Run as a program, it reads one JSON request per line: the reply to {"start": argv, "signal_at": ..., "output": path,
"env": {}} is the child's pid, and the reply to {"wait": pid} is its wait status.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

WAIT_S = 60.0
"""Time limit of an attempt."""


@dataclass(frozen=True)
class SignalAt:
    """A signal that a child sends itself at the `count`-th file operation or step, from 1."""

    counter: Literal["files", "steps"]
    count: int
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class ChildResult:
    """The result of a child: `exit_code` is minus the signal number if a signal killed it."""

    exit_code: int
    stdout: str
    stderr: str
    counts: dict[str, int] = field(default_factory=dict)
    """File operations and steps of the child; empty if it was killed."""


@dataclass(frozen=True)
class ChildProcess:
    """A running attempt."""

    pid: int
    output_folder: Path


class ForkServer:
    """Starts the forking process and sends it requests.

    Parameters
    ----------
    folder: the working directory of the children, and the folder of their output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
            },
        )

    def start(self, *argv: str, signal_at: SignalAt | None = None, env: dict[str, str] | None = None) -> ChildProcess:
        """Start `trainyard argv...` in a child."""
        self._count += 1
        output = self.folder / f"child-{self._count}"
        for suffix in (".out", ".err"):  # a child may be killed before it opens them
            output.with_suffix(suffix).touch()
        request = {
            "start": argv,
            "signal_at": asdict(signal_at) if signal_at else None,
            "output": str(output),
            "env": env or {},
        }
        return ChildProcess(int(self._request(request)), output)

    def wait_until_stopped(self, child: ChildProcess) -> bool:
        """Wait until SIGSTOP has stopped a child; return False if it ended instead."""
        deadline = time.monotonic() + WAIT_S
        while (state := _process_state(child.pid)) not in ("T", "Z", ""):
            assert time.monotonic() < deadline, f"attempt {child.pid} neither stops nor ends"
            time.sleep(0.002)
        return state == "T"

    def wait(self, child: ChildProcess) -> ChildResult:
        """Wait for the end of a child; raise AssertionError after `WAIT_S`."""
        status = self._request({"wait": child.pid})
        out, err = (child.output_folder.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        assert status is not None, f"attempt {child.pid} hangs:\n{err}"
        counts_file = child.output_folder.with_suffix(".counts")
        counts = json.loads(counts_file.read_text()) if counts_file.exists() else {}
        return ChildResult(os.waitstatus_to_exitcode(int(status)), out, err, counts)

    def run(self, *argv: str, signal_at: SignalAt | None = None, env: dict[str, str] | None = None) -> ChildResult:
        """Call `start` and `wait`."""
        return self.wait(self.start(*argv, signal_at=signal_at, env=env))

    def close(self) -> None:
        """End the forking process; its children end by themselves."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=WAIT_S)
        self._process.stdout.close()

    def _request(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _process_state(pid: int) -> str:
    """Return the state letter that ps shows; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


# ------------------------------------------------------------------------------------------ the forking process


class _Counter:
    """Counts operations of one kind, and sends the signal when its count is reached."""

    def __init__(self, kind: str, signal_at: SignalAt | None) -> None:
        self.count = 0
        self._at = signal_at.count if signal_at is not None and signal_at.counter == kind else 0
        self._signal = signal_at.signal if signal_at is not None else 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.count += 1
            is_due = self.count == self._at
        if is_due:
            os.kill(os.getpid(), self._signal)

    def before(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self()
            return action(*args, **named)

        return call

    def around(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = self.before(action)(*args, **named)
            self()
            return result

        return call


class _TornWriter(io.BufferedWriter):
    """A file that counts an operation halfway through each write."""

    counter: _Counter

    def write(self, data: Any) -> int:
        half = len(data) // 2
        super().write(data[:half])
        self.flush()
        self.counter()
        super().write(data[half:])
        return len(data)


def _install_counters(signal_at: SignalAt | None) -> dict[str, _Counter]:
    import pipeline.storage.local as local
    from pipeline.training.engine import TrainEngine

    files, steps = _Counter("files", signal_at), _Counter("steps", signal_at)
    for name in ("replace", "link", "unlink", "mkdir", "rmdir"):
        setattr(os, name, files.around(getattr(os, name)))
    os.fsync = lambda fd: files()  # skipped: it matters for power loss only, and takes most of the time

    def torn_open(path: str, mode: str) -> Any:
        if mode != "xb":
            return open(path, mode)
        file = _TornWriter(io.FileIO(path, "x"))
        file.counter = files
        return file

    local.open = torn_open  # type: ignore[attr-defined]
    TrainEngine.optimizer_step = steps.before(TrainEngine.optimizer_step)  # type: ignore[method-assign]
    return {"files": files, "steps": steps}


def _run_child(request: dict[str, Any]) -> None:
    import pipeline.cli

    output = Path(request["output"])
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    counters = _install_counters(SignalAt(**request["signal_at"]) if request["signal_at"] else None)
    sys.argv = ["trainyard", *request["start"]]
    code = 70
    try:
        pipeline.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    counts = {kind: counter.count for kind, counter in counters.items()}
    output.with_suffix(".counts").write_text(json.dumps(counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_child(pid: int) -> int | None:
    """Return the wait status of a child, or None if it hung and was killed."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        waited_pid, status = os.waitpid(pid, os.WNOHANG)
        if waited_pid:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _serve() -> None:
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    from pipeline.runs import async_writer

    torch.set_num_threads(1)
    async_writer.COMMIT_INTERVAL_FACTOR = 0  # never delay a commit: more moments at which a kill can happen
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = _wait_for_child(request["wait"])
        else:
            reply = os.fork()
            if reply == 0:
                _run_child(request)
        replies.write(f"{json.dumps(reply)}\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
