"""Hangs of a run without a cluster: detection, message, exit and resume; and what must not count as a hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.context import ProgressCounter, WaitTarget, WorkerHeartbeat
from pipeline.errors import StorageError, StorageLostError
from pipeline.storage import Storage
from pipeline.watchdog import HangTimeouts, blocking_on
from pipeline.watchdog.policy import detect_hang
from pipeline.watchdog.progress import current_wait
from pipeline.watchdog.stack_dump import find_user_frame
from tests.process_kill.fork_server import ChildResult, ForkServer, SignalAt
from tests.process_kill.run_assertions import final_state, find_run, read_entries, wait_for
from tests.storage.silent_server import SilentProxy

HANG_S = 1.5
SHORT_TIMEOUTS = HangTimeouts(HANG_S, storage_s=300)
USER_MODEL = '''
import os
import re
import threading
import time

import torch


class HangingNet(torch.nn.Module):
    """Hangs at step 40, in the method that the environment variable HANG names."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.method, self.calls = os.environ.get("HANG"), 0

    def forward(self, inputs):
        if self.training:
            self.calls += 1
            if self.calls == 40 and self.method:
                getattr(self, self.method)()
        return self.layers(inputs)

    def deadlock(self):
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    def ignores_errors(self):
        while True:
            try:
                time.sleep(3600)
            except Exception:
                pass

    def polls(self):
        while True:
            time.sleep(0.01)

    def holds_gil(self):
        re.match("(a*)*b", "a" * 60)

    def pauses(self):
        time.sleep(3)

    def disk_never_responds(self):
        os.replace = lambda *_: time.sleep(3600)
'''
JOB = f"""
schema: 1
name: hang
data: {{source: disc, normalize: scalar, splits: {{by: random, val: 0.2}}}}
model: {{kind: "hang_code:HangingNet"}}
train: {{batch_size: 32, optimizer: {{kind: sgd, momentum: 0.9}}, phases: [{{epochs: 4, lr: 0.2}}]}}
evaluate: {{every_steps: 20}}
checkpoint: {{every_steps: 10, keep: 2}}
scale: {{hang_s: {HANG_S}}}
"""
ARGV = ["train", "hang.yaml", "--storage"]
NO_HANG_LIMIT = ("--set", "scale.hang_s=300")
"""For runs without a hang: on a busy machine a step may take longer than `HANG_S`."""


@pytest.fixture(scope="module")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    folder = tmp_path_factory.mktemp("hang")
    (folder / "hang_code.py").write_text(USER_MODEL)
    (folder / "hang.yaml").write_text(JOB)
    server = ForkServer(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def reference_state(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> object:
    storage = tmp_path_factory.mktemp("reference")
    assert fork_server.run(*ARGV, str(storage), *NO_HANG_LIMIT).exit_code == 0
    return final_state(find_run(storage))


def check_message(outcome: ChildResult, run: Path) -> None:
    """Check that there is one message, which names the line of code and the stored stacks."""
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    stacks = run / "stacks" / "attempt-0001-rank-0.txt"
    assert "training made no progress for 2 s in hang_code.py:" in line
    assert f"stacks in {stacks}" in line
    assert "the same command resumes" in outcome.stderr
    assert "scale.hang_s" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    text = stacks.read_text()
    assert "in forward" in text
    assert "async_writer.py" in text, "the stacks of all threads"


@pytest.mark.parametrize("method", ["deadlock", pytest.param("ignores_errors", marks=pytest.mark.slow)])
def test_hang_is_reported_with_its_line_and_resumed(
    fork_server: ForkServer, reference_state: object, tmp_path: Path, method: str
) -> None:
    began = time.monotonic()
    outcome = fork_server.run(*ARGV, str(tmp_path), env={"HANG": method})
    took_s = time.monotonic() - began
    assert outcome.exit_code == 1, outcome.stderr
    run = find_run(tmp_path)
    check_message(outcome, run)
    assert f"({method})" in outcome.stderr
    if method == "deadlock":  # the error could be raised in the thread, which then wrote the journal
        leave = read_entries(run)[-1]
        assert (leave["kind"], leave["status"], leave["error"]["type"]) == ("leave", "failed", "HungError")
        assert fork_server.run("show", str(run), "--json").stdout.count('"status": "failed"') == 1
    again = fork_server.run(*ARGV, str(tmp_path), *NO_HANG_LIMIT)
    assert again.exit_code == 0, again.stderr
    assert "resuming after step" in again.stderr
    assert final_state(run) == reference_state
    print(f"\n{method}: the command took {took_s:.1f} s with a limit of {HANG_S} s")


CALLER_SCRIPT = """
import sys, threading, time
from pipeline import train
from pipeline.errors import HungError

def call():
    try:
        train("hang.yaml", storage=sys.argv[1], on_event=lambda event: events.append(type(event).__name__))
    except HungError as error:
        errors.append(type(error).__name__ + ": " + str(error))

events, errors = [], []
thread = threading.Thread(target=call, daemon=True)
thread.start()
while thread.is_alive() and "HangReported" not in events:
    time.sleep(0.05)
print("raised" if errors else "still hangs", *errors, flush=True)
sys.stdin.read()
print("the caller continues", flush=True)
"""


@pytest.mark.parametrize(("method", "outcome_line"), [("polls", "raised"), ("deadlock", "still hangs")])
def test_callers_process_is_never_ended(
    fork_server: ForkServer, reference_state: object, tmp_path: Path, method: str, outcome_line: str
) -> None:
    """The hanging thread is not the main thread, so no signal reaches it. If no error can be raised in it, another
    process may take over the run."""
    folder = fork_server.folder
    heartbeat = {"TRAINYARD_HEARTBEAT_S": "0.2"}
    with subprocess.Popen(
        [sys.executable, "-c", CALLER_SCRIPT, str(tmp_path)],
        cwd=folder,
        env={**os.environ, **heartbeat, "HANG": method, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as caller:
        assert caller.stdout is not None
        output_line = caller.stdout.readline()
        assert output_line.startswith(outcome_line), output_line + (
            caller.stderr.read() if caller.stderr and not output_line else ""
        )
        attempts = iter(lambda: fork_server.run(*ARGV, str(tmp_path), env=heartbeat), None)
        again = next(result for result in attempts if result.exit_code != 3)  # 3 while its heartbeat is recent
        assert again.exit_code == 0, again.stderr
        out, err = caller.communicate()
    assert (caller.returncode, out.splitlines()[-1]) == (0, "the caller continues")
    assert re.search(
        r"training made no progress for \d+ s in hang_code\.py", output_line if outcome_line == "raised" else err
    )
    if outcome_line == "raised":
        assert output_line.startswith("raised HungError: ")
        leave = [entry for entry in read_entries(find_run(tmp_path)) if entry["kind"] == "leave"]
        assert [entry["error"]["type"] for entry in leave] == ["HungError"]
    assert final_state(find_run(tmp_path)) == reference_state


def test_hang_while_holding_the_gil(fork_server: ForkServer, reference_state: object, tmp_path: Path) -> None:
    outcome = fork_server.run(*ARGV, str(tmp_path), env={"HANG": "holds_gil"})
    assert outcome.exit_code == 1
    assert "Timeout" in outcome.stderr
    assert "in holds_gil" in outcome.stderr
    assert fork_server.run(*ARGV, str(tmp_path), *NO_HANG_LIMIT).exit_code == 0
    assert final_state(find_run(tmp_path)) == reference_state


@pytest.mark.slow
def test_storage_call_that_never_returns_is_detected(
    fork_server: ForkServer, reference_state: object, tmp_path: Path
) -> None:
    """Such as a mount whose server is lost: no call fails, and none returns."""
    env = {"HANG": "disk_never_responds", "TRAINYARD_STORAGE_LIMIT_S": "1"}
    outcome = fork_server.run(*ARGV, str(tmp_path), env=env)
    assert outcome.exit_code == 1, outcome.stderr
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "storage that does not respond" in line
    stacks = Path(line.rpartition("stacks in ")[2])
    assert not stacks.is_relative_to(tmp_path), "storage does not respond: the stacks stay on this machine"
    assert "in replace" in stacks.read_text()

    again = fork_server.run(*ARGV, str(tmp_path), *NO_HANG_LIMIT)
    assert again.exit_code == 0, again.stderr
    assert "an earlier process hung" in again.stderr
    run = find_run(tmp_path)
    assert (run / "stacks" / "attempt-0001-rank-0.txt").exists()
    assert not stacks.exists()
    assert final_state(run) == reference_state


@pytest.mark.slow
def test_no_limit_never_detects_a_hang(fork_server: ForkServer, reference_state: object, tmp_path: Path) -> None:
    outcome = fork_server.run(*ARGV, str(tmp_path), "--set", "scale.hang_s=null", env={"HANG": "pauses"})
    assert outcome.exit_code == 0, outcome.stderr
    assert final_state(find_run(tmp_path)) == reference_state


@pytest.mark.slow
def test_suspended_process_is_no_hang(fork_server: ForkServer, reference_state: object, tmp_path: Path) -> None:
    child = fork_server.start(*ARGV, str(tmp_path), signal_at=SignalAt("steps", 30, signal.SIGTSTP))
    assert fork_server.wait_until_stopped(child)
    time.sleep(SHORT_TIMEOUTS.gil_timeout_s + 0.5)
    os.kill(child.pid, signal.SIGCONT)
    outcome = fork_server.wait(child)
    assert outcome.exit_code == 0, outcome.stderr
    assert final_state(find_run(tmp_path)) == reference_state


@pytest.fixture
def silent_s3_proxy(s3_endpoint: str) -> Iterator[SilentProxy]:
    with SilentProxy(s3_endpoint) as proxy:
        yield proxy


def test_requests_to_a_silent_server_time_out(
    silent_s3_proxy: SilentProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads too: the timeouts of the libraries begin only when the server has accepted the data."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", silent_s3_proxy.url)
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "2")
    storage = Storage.open(s3_url)

    def is_written() -> bool:
        """Return whether a request met the limit: on a busy machine a healthy server may take longer."""
        try:
            storage.replace("file", b"1")
        except (StorageError, StorageLostError):
            return False
        return True

    wait_for(is_written, 200, "a response from storage")
    answered = storage.response_count
    assert answered > 0
    silent_s3_proxy.silent.set()
    for request in (lambda: storage.replace("file", b"2"), lambda: storage.read("file")):
        with pytest.raises(StorageLostError, match="was unavailable for 2 s"):  # not the time limit of the test
            request()
    assert storage.response_count == answered


@pytest.mark.slow
def test_silent_server_is_a_storage_failure_and_no_hang(
    fork_server: ForkServer, silent_s3_proxy: SilentProxy, s3_url: str, tmp_path: Path
) -> None:
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    env = {**aws, "AWS_ENDPOINT_URL": silent_s3_proxy.url, "TRAINYARD_STORAGE_LIMIT_S": "2", "HANG": "pauses"}
    child = fork_server.start(*ARGV, s3_url, "--set", "scale.hang_s=10", env=env)
    wait_for(lambda: "step 20 " in child.output_folder.with_suffix(".err").read_text(), 60, "training")
    silent_s3_proxy.silent.set()
    began = time.monotonic()
    outcome = fork_server.wait(child)
    assert outcome.exit_code == 1, outcome.stderr
    assert "storage was unavailable" in outcome.stderr
    assert "made no progress" not in outcome.stderr
    assert "Traceback" not in outcome.stderr
    print(f"\nended {time.monotonic() - began:.1f} s after the server fell silent, with a limit of 2 s")


# --------------------------------------------------------------------------------------------- decisions and stacks

TIMEOUTS = HangTimeouts(hang_s=100, storage_s=400)
WORKING, HANGING, WAITING, STORING = (
    WorkerHeartbeat(1, ""),
    WorkerHeartbeat(90, ""),
    WorkerHeartbeat(105, "workers"),
    WorkerHeartbeat(300, "storage"),
)


@pytest.mark.parametrize(
    ("heartbeat", "heartbeats", "message"),
    [
        (WorkerHeartbeat(100, ""), {}, None),
        (WorkerHeartbeat(101, ""), {}, "made no progress for 101 s"),
        (WorkerHeartbeat(399, "storage"), {}, None),
        (WorkerHeartbeat(401, "storage"), {}, "storage that does not respond"),
        (WorkerHeartbeat(110, "workers"), {}, None),
        (WorkerHeartbeat(111, "workers"), None, "waited 111 s for the other workers"),
        (WorkerHeartbeat(111, "workers"), {1: WORKING, 2: WAITING}, None),
        (WorkerHeartbeat(111, "workers"), {1: HANGING, 2: WAITING}, None),
        (WorkerHeartbeat(111, "workers"), {1: STORING, 2: WAITING}, None),
        (WorkerHeartbeat(111, "workers"), {1: WAITING, 2: WAITING}, "the other workers, which are waiting too"),
        (
            WorkerHeartbeat(111, "workers"),
            {1: WorkerHeartbeat(1, "", last_seen_s=105), 2: WAITING},
            "worker 1, which sends no heartbeat",
        ),
        (WorkerHeartbeat(111, "workers"), {2: WAITING}, "worker 1, which sends no heartbeat"),
        (WorkerHeartbeat(111, "workers"), {}, "workers 1, 2, which send no heartbeat"),
    ],
)
def test_detect_hang_names_the_blocking_rank(
    heartbeat: WorkerHeartbeat, heartbeats: Mapping[int, WorkerHeartbeat] | None, message: str | None
) -> None:
    hang = detect_hang(0, heartbeat, heartbeats, 3, TIMEOUTS)
    assert (message in hang) if message is not None and hang is not None else hang is message


@given(hang_s=st.floats(0.1, 1e6), storage_s=st.floats(1, 1e4))
def test_hung_rank_reports_first_and_collective_timeout_last(hang_s: float, storage_s: float) -> None:
    limits = HangTimeouts(hang_s, storage_s)
    culprit, waiting = WorkerHeartbeat(hang_s + limits.poll_s, ""), WorkerHeartbeat(hang_s + limits.poll_s, "workers")
    assert detect_hang(1, culprit, {0: waiting}, 2, limits) is not None
    assert detect_hang(0, waiting, {1: culprit}, 2, limits) is None
    assert hang_s + limits.poll_s < limits.gil_timeout_s + limits.poll_s < hang_s + limits.grace_s + limits.poll_s
    assert limits.collective_timeout_s > max(hang_s + limits.grace_s, storage_s) + 2 * limits.poll_s


def test_blocking_call_is_found_on_the_stack() -> None:
    targets: list[WaitTarget] = []

    def record_target() -> None:
        targets.append(current_wait(sys._getframe())[0])

    @blocking_on("storage")
    def save() -> None:
        record_target()

    @blocking_on("workers")
    def all_reduce() -> None:
        save()
        record_target()

    record_target()
    all_reduce()
    assert targets == ["", "storage", "workers"]


def test_progress_counter_counts_each_item_twice() -> None:
    progress = ProgressCounter()
    items = progress.track([1, 2, 3])
    assert [list(items), list(items)] == [[1, 2, 3], [1, 2, 3]]
    assert progress.count == 12


def test_innermost_user_frame(tmp_path: Path) -> None:
    (tmp_path / "user_code.py").write_text("import threading\n\ndef waits():\n    threading.Event().wait()\n")
    program = (
        "import faulthandler, sys, threading, time; import user_code\n"
        "thread = threading.Thread(target=user_code.waits, daemon=True); thread.start()\n"
        "while sys._current_frames()[thread.ident].f_code.co_name != 'wait': time.sleep(0.01)\n"
        "print(f'# thread 0x{thread.ident:016x} trains'); sys.stdout.flush()\n"
        "faulthandler.dump_traceback(sys.stdout)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert find_user_frame(done.stdout) == "user_code.py:4 (waits)"
    assert find_user_frame(done.stdout.replace("trains", "runs")) == ""
    assert find_user_frame("") == ""
