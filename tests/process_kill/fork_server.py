"""A process that has imported everything and forks one child for each attempt, so that hundreds of attempts can be
killed within a minute.

A child runs the true command line. Its trap, if it has one, sends it a real signal at the n-th operation on files
(`files`; every operation counts before and after it was done, and a write in its middle too) or at the n-th step
(`steps`).

As a program it takes one JSON object a line: {"start": argv, "trap": ..., "out": path, "env": {}} is answered by the
child's pid, {"wait": pid} by its status.
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
"""No attempt of these tests takes so long."""


@dataclass(frozen=True)
class SignalAt:
    """A signal that a child sends itself: at the `count`-th operation on files, or step, from 1."""

    counter: Literal["files", "steps"]
    count: int
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class ChildResult:
    """How a child ended: `code` is its exit code, or minus the signal that killed it."""

    exit_code: int
    stdout: str
    stderr: str
    counts: dict[str, int] = field(default_factory=dict)
    """Operations on files and steps until then; not known of a killed one."""


@dataclass(frozen=True)
class ChildProcess:
    """One attempt under way."""

    pid: int
    output_folder: Path


class ForkServer:
    """The forking process, seen from a test.

    Parameters
    ----------
    folder: where the children's output goes; their working directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self._folder = folder
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
        """Begin `trainyard argv...`."""
        self._count += 1
        out = self._folder / f"child-{self._count}"
        for suffix in (".out", ".err"):  # a child may be killed before it opens them
            out.with_suffix(suffix).touch()
        order = {"start": argv, "trap": asdict(signal_at) if signal_at else None, "out": str(out), "env": env or {}}
        return ChildProcess(int(self._request(order)), out)

    def wait_until_stopped(self, child: ChildProcess) -> bool:
        """Wait until it stands still under SIGSTOP; False if it ended instead."""
        deadline = time.monotonic() + WAIT_S
        while (state := _process_state(child.pid)) not in ("T", "Z", ""):
            assert time.monotonic() < deadline, f"attempt {child.pid} neither stops nor ends"
            time.sleep(0.002)
        return state == "T"

    def wait(self, child: ChildProcess) -> ChildResult:
        """Its end; an AssertionError if it goes on for too long."""
        status = self._request({"wait": child.pid})
        out, err = (child.output_folder.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        assert status is not None, f"attempt {child.pid} hangs:\n{err}"
        counted = child.output_folder.with_suffix(".counted")
        counts = json.loads(counted.read_text()) if counted.exists() else {}
        return ChildResult(os.waitstatus_to_exitcode(int(status)), out, err, counts)

    def run(self, *argv: str, signal_at: SignalAt | None = None, env: dict[str, str] | None = None) -> ChildResult:
        """`start` and `wait`."""
        return self.wait(self.start(*argv, signal_at=signal_at, env=env))

    def close(self) -> None:
        """End the forking process; children end by themselves."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=WAIT_S)
        self._process.stdout.close()

    def _request(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _process_state(pid: int) -> str:
    """The letter that ps shows; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


# ------------------------------------------------------------------------------------------ the forking process


class _Counter:
    """Counts operations of one kind, and springs the trap at its count."""

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
        def counted(*args: Any, **named: Any) -> Any:
            self()
            return action(*args, **named)

        return counted

    def around(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            result = self.before(action)(*args, **named)
            self()
            return result

        return counted


class _TornWriter(io.BufferedWriter):
    """A file that can be caught with half of a write done."""

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
    os.fsync = lambda fd: files()  # only power loss can tell, and it is most of the time

    def torn_open(path: str, mode: str) -> Any:
        if mode != "xb":
            return open(path, mode)
        file = _TornWriter(io.FileIO(path, "x"))
        file.counter = files
        return file

    local.open = torn_open  # type: ignore[attr-defined]
    TrainEngine.optimizer_step = steps.before(TrainEngine.optimizer_step)  # type: ignore[method-assign]
    return {"files": files, "steps": steps}


def _run_child(order: dict[str, Any]) -> None:
    import pipeline.cli

    out = Path(order["out"])
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    counters = _install_counters(SignalAt(**order["trap"]) if order["trap"] else None)
    sys.argv = ["trainyard", *order["start"]]
    code = 70
    try:
        pipeline.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    counts = {kind: counter.count for kind, counter in counters.items()}
    out.with_suffix(".counted").write_text(json.dumps(counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_child(pid: int) -> int | None:
    """The status of a child, or None if it hangs and had to be killed."""
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
    async_writer.COMMIT_INTERVAL_FACTOR = 0  # a commit whenever one is due: more places to die in
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            reply = _wait_for_child(order["wait"])
        else:
            reply = os.fork()
            if reply == 0:
                _run_child(order)
        replies.write(f"{json.dumps(reply)}\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
