"""Ctrl-C, SIGTERM, concurrent processes, and zombies: stopped processes that continue after another took over."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import train
from tests.process_kill.fork_server import ForkServer, SignalAt
from tests.process_kill.run_assertions import (
    RunReader,
    final_state,
    find_run,
    hash_committed_files,
    read_entries,
    read_log,
    wait_for,
)

SEED = int(os.environ.get("TRAINYARD_TEST_SEED", "1"))
FAST_HEARTBEAT = {"TRAINYARD_HEARTBEAT_S": "0.1"}
HEARTBEAT_TIMEOUT_S = 0.4
"""More than three of those intervals."""
JOB = """
schema: 1
name: victim
data: {source: disc, normalize: scalar, splits: {by: random, val: 0.2}}
model: {kind: mlp, hidden: [8, 4], activation: relu, dropout: 0.1}
train:
  batch_size: 32
  optimizer: {kind: sgd, momentum: 0.9}
  phases: [{epochs: EPOCHS, lr: 0.2}]
evaluate: {every_steps: 20}
checkpoint: {every_steps: 10, keep: 2}
"""
ARGV = ["train", "victim.yaml", "--storage"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    (folder / "victim.yaml").write_text(JOB.replace("EPOCHS", "10"))
    (folder / "longer.yaml").write_text(JOB.replace("EPOCHS", "40"))
    return folder


@pytest.fixture(scope="module")
def fork_server(folder: Path) -> Iterator[ForkServer]:
    server = ForkServer(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def reference_state(fork_server: ForkServer, folder: Path) -> object:
    storage = folder / "reference"
    assert fork_server.run(*ARGV, str(storage)).exit_code == 0
    return final_state(find_run(storage))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_signal_saves_and_exits_and_the_command_resumes(
    fork_server: ForkServer, reference_state: object, tmp_path: Path, number: int, code: int
) -> None:
    outcome = fork_server.run(*ARGV, str(tmp_path), signal_at=SignalAt("steps", 32, number))
    assert outcome.exit_code == code
    assert "stopped at step 33 of 250" in outcome.stderr
    assert "same command" in outcome.stderr
    run = find_run(tmp_path)
    *_, commit, leave = read_entries(run)
    assert (commit["kind"], commit["step"], commit["end"]) == ("commit", 33, False)
    assert (leave["kind"], leave["status"], leave["step"]) == ("leave", "interrupted", 33)
    assert fork_server.run("show", str(run), "--json").stdout.count('"status": "interrupted"') == 1
    again = fork_server.run(*ARGV, str(tmp_path))
    assert again.exit_code == 0
    assert "resuming after step 33" in again.stderr
    assert final_state(run) == reference_state


def test_nohup_ignores_terminal_close(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    previous_handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run = train("victim.yaml", storage=str(tmp_path), max_steps=40, on_event=lambda event: send_sighup())
    finally:
        signal.signal(signal.SIGHUP, previous_handler)
    assert (run.status, run.attempts) == ("finished", 1)


def send_sighup() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def test_closed_terminal_saves_and_exits_without_output(fork_server: ForkServer, folder: Path, tmp_path: Path) -> None:
    """The real command with a live progress bar on its own terminal, which is then closed."""
    terminal, child_side = os.openpty()
    # The session leader gets SIGHUP for the first terminal that it opens.
    command = [
        "sh",
        "-c",
        f'exec "$@" <{os.ttyname(child_side)} >{os.ttyname(child_side)} 2>&1',
        "sh",
        sys.executable,
        "-m",
        "pipeline",
    ]
    storage = tmp_path / "runs"
    process = subprocess.Popen(
        [*command, "train", "longer.yaml", "--storage", str(storage)], cwd=folder, start_new_session=True
    )
    os.close(child_side)

    def has_committed() -> bool:
        with suppress(OSError):  # the other end is not open yet
            while select.select([terminal], [], [], 0)[0]:
                os.read(terminal, 65536)
        return count_commits(storage) > 0

    wait_for(lambda: has_committed() or process.poll() is not None, 60, "a commit")
    os.close(terminal)
    assert process.wait(timeout=100) == 143
    *_, leave = read_entries(find_run(storage))
    assert (leave["kind"], leave["status"]) == ("leave", "interrupted")


def test_second_interrupt_exits_at_once_and_resumes_from_last_checkpoint(
    fork_server: ForkServer, reference_state: object, tmp_path: Path
) -> None:
    child = fork_server.start(*ARGV, str(tmp_path), signal_at=SignalAt("steps", 60, signal.SIGSTOP))
    assert fork_server.wait_until_stopped(child)
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGCONT)
    outcome = fork_server.wait(child)
    assert outcome.exit_code == 130
    assert "same command" in outcome.stderr
    assert fork_server.run(*ARGV, str(tmp_path)).exit_code == 0
    assert final_state(find_run(tmp_path)) == reference_state


def test_one_of_two_concurrent_processes_runs(fork_server: ForkServer, reference_state: object, tmp_path: Path) -> None:
    for number in range(4):
        storage = tmp_path / str(number)
        with RunReader(storage):
            first, second = (
                fork_server.wait(child) for child in [fork_server.start(*ARGV, str(storage)) for _ in range(2)]
            )
        assert sorted([first.exit_code, second.exit_code]) == [0, 3], first.stderr + second.stderr
        loser = first if first.exit_code == 3 else second
        assert "this run" in loser.stderr
        assert "Traceback" not in loser.stderr
        assert [entry["kind"] for entry in read_entries(find_run(storage))].count("claim") == 1
        assert final_state(find_run(storage)) == reference_state


def test_stopped_process_with_a_heartbeat_is_not_superseded(fork_server: ForkServer, tmp_path: Path) -> None:
    """With the default heartbeat a second process refuses at once, instead of watching for half a minute."""
    child = fork_server.start(*ARGV, str(tmp_path), signal_at=SignalAt("steps", 100, signal.SIGSTOP))
    assert fork_server.wait_until_stopped(child)
    other = fork_server.run(*ARGV, str(tmp_path))
    assert other.exit_code == 3
    assert "another process is writing this run" in other.stderr
    os.kill(child.pid, signal.SIGCONT)
    assert fork_server.wait(child).exit_code == 0


def stop_points() -> list[SignalAt]:
    """Return where a process is stopped: mostly in the middle of a write."""
    rng = random.Random(SEED)
    return [
        SignalAt("steps", rng.randint(1, 240), signal.SIGSTOP),
        *(SignalAt("files", count + rng.randint(0, 39), signal.SIGSTOP) for count in range(40, 440, 40)),
    ]


@pytest.mark.parametrize("signal_at", stop_points(), ids=lambda signal_at: f"{signal_at.counter}-{signal_at.count}")
def test_zombie_after_its_successor_finished_changes_nothing(
    fork_server: ForkServer, reference_state: object, tmp_path: Path, signal_at: SignalAt
) -> None:
    with RunReader(tmp_path):
        zombie = fork_server.start(*ARGV, str(tmp_path), signal_at=signal_at, env=FAST_HEARTBEAT)
        assert fork_server.wait_until_stopped(zombie)
        time.sleep(HEARTBEAT_TIMEOUT_S)
        successor = fork_server.run(*ARGV, str(tmp_path), env=FAST_HEARTBEAT)
        assert successor.exit_code == 0, successor.stderr
        run = find_run(tmp_path)
        before = hash_committed_files(run)
        os.kill(zombie.pid, signal.SIGCONT)
        outcome = fork_server.wait(zombie)
    assert outcome.exit_code == 3, outcome.stderr
    assert "taken" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    after = hash_committed_files(run)
    unreferenced = {name for name in after if "-a0001/" in name and name not in before}  # no entry names them
    assert {name: digest for name, digest in after.items() if name not in unreferenced and name != "run.json"} == {
        name: digest for name, digest in before.items() if name != "run.json"
    }
    assert final_state(run) == reference_state


def test_zombie_during_its_successors_training_exits(
    fork_server: ForkServer, reference_state: object, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    for number in range(3):
        storage = tmp_path / str(number)
        with RunReader(storage):
            zombie = fork_server.start(
                *ARGV,
                str(storage),
                signal_at=SignalAt("files", rng.randint(120, 300), signal.SIGSTOP),
                env=FAST_HEARTBEAT,
            )
            assert fork_server.wait_until_stopped(zombie)
            time.sleep(HEARTBEAT_TIMEOUT_S)
            successor = fork_server.start(
                *ARGV,
                str(storage),
                signal_at=SignalAt("files", rng.randint(90, 200), signal.SIGSTOP),
                env=FAST_HEARTBEAT,
            )
            assert fork_server.wait_until_stopped(successor)
            os.kill(zombie.pid, signal.SIGCONT)
            zombie_outcome = fork_server.wait(zombie)
            os.kill(successor.pid, signal.SIGCONT)
            outcome = fork_server.wait(successor)
        assert (zombie_outcome.exit_code, outcome.exit_code) == (3, 0), zombie_outcome.stderr + outcome.stderr
        assert final_state(find_run(storage)) == reference_state


def test_command_survives_sigint_sigterm_and_sigkill(fork_server: ForkServer, folder: Path, tmp_path: Path) -> None:
    """`python -m pipeline` in its own process group, ended by three signals and then left to finish."""
    storage = tmp_path / "runs"
    argv = ["train", "longer.yaml", "--storage"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *argv, str(storage)],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end_by(number: int) -> tuple[int, str]:
        commits = count_commits(storage)
        process = start()
        wait_for(lambda: count_commits(storage) > commits or process.poll() is not None, 60, "a commit")
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    with RunReader(storage):
        for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
            returncode, err = end_by(number)
            assert returncode == code, err
            assert ("same command" in err) == (code > 0)
        last = start()
        _, err = last.communicate(timeout=120)
        assert last.returncode == 0, err
    assert fork_server.run(*argv, str(tmp_path / "reference")).exit_code == 0
    assert final_state(find_run(storage)) == final_state(find_run(tmp_path / "reference"))
    assert set(read_log(find_run(storage), "steps")["attempt"].to_pylist()) == {1, 2, 3, 4}


def count_commits(storage: Path) -> int:
    return sum(entry["kind"] == "commit" for run in storage.glob("*/journal") for entry in read_entries(run.parent))
