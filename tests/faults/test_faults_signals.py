"""Ctrl-C, SIGTERM, two processes at once, and zombies that wake after their successor has begun."""

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
from tests.faults.fault_evidence import Watcher, committed, entries, evidence, only_run, read_log, wait_for
from tests.faults.fault_nursery import Nursery, Trap

SEED = int(os.environ.get("TRAINYARD_TEST_SEED", "1"))
QUICK_HEART = {"TRAINYARD_HEARTBEAT_S": "0.1"}
SILENCE_S = 0.4
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
def nursery(folder: Path) -> Iterator[Nursery]:
    nursery = Nursery(folder)
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def untouched(nursery: Nursery, folder: Path) -> object:
    storage = folder / "untouched"
    assert nursery.run(*ARGV, str(storage)).code == 0
    return evidence(only_run(storage))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(
    nursery: Nursery, untouched: object, tmp_path: Path, number: int, code: int
) -> None:
    outcome = nursery.run(*ARGV, str(tmp_path), trap=Trap("steps", 32, number))
    assert outcome.code == code
    assert "stopped at step 33 of 250" in outcome.err
    assert "same command" in outcome.err
    run = only_run(tmp_path)
    *_, commit, leave = entries(run)
    assert (commit["kind"], commit["step"], commit["end"]) == ("commit", 33, False)
    assert (leave["kind"], leave["status"], leave["step"]) == ("leave", "interrupted", 33)
    assert nursery.run("show", str(run), "--json").out.count('"status": "interrupted"') == 1
    again = nursery.run(*ARGV, str(tmp_path))
    assert again.code == 0
    assert "resuming after step 33" in again.err
    assert evidence(run) == untouched


def test_nohup_goes_on_without_its_terminal(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run = train("victim.yaml", storage=str(tmp_path), max_steps=40, on_event=lambda event: hang_up())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (run.status, run.attempts) == ("finished", 1)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def test_a_closed_terminal_saves_and_leaves_though_nothing_can_be_printed_any_more(
    nursery: Nursery, folder: Path, tmp_path: Path
) -> None:
    """The true command with a live bar on a terminal of its own, which is closed."""
    terminal, side = os.openpty()
    # The first terminal that the leader of a session opens is the one whose end it is told of.
    words = [
        "sh",
        "-c",
        f'exec "$@" <{os.ttyname(side)} >{os.ttyname(side)} 2>&1',
        "sh",
        sys.executable,
        "-m",
        "pipeline",
    ]
    storage = tmp_path / "runs"
    process = subprocess.Popen(
        [*words, "train", "longer.yaml", "--storage", str(storage)], cwd=folder, start_new_session=True
    )
    os.close(side)

    def has_committed() -> bool:
        with suppress(OSError):  # before it is opened at the other end
            while select.select([terminal], [], [], 0)[0]:
                os.read(terminal, 65536)
        return count_commits(storage) > 0

    wait_for(lambda: has_committed() or process.poll() is not None, 60, "a commit")
    os.close(terminal)
    assert process.wait(timeout=100) == 143
    *_, leave = entries(only_run(storage))
    assert (leave["kind"], leave["status"]) == ("leave", "interrupted")


def test_a_second_ctrl_c_ends_at_once_and_the_run_goes_on_from_its_last_checkpoint(
    nursery: Nursery, untouched: object, tmp_path: Path
) -> None:
    child = nursery.start(*ARGV, str(tmp_path), trap=Trap("steps", 60, signal.SIGSTOP))
    assert nursery.stopped(child)
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGCONT)
    outcome = nursery.wait(child)
    assert outcome.code == 130
    assert "same command" in outcome.err
    assert nursery.run(*ARGV, str(tmp_path)).code == 0
    assert evidence(only_run(tmp_path)) == untouched


def test_of_two_processes_at_once_one_runs_and_the_other_says_who(
    nursery: Nursery, untouched: object, tmp_path: Path
) -> None:
    for number in range(4):
        storage = tmp_path / str(number)
        with Watcher(storage):
            first, second = (nursery.wait(child) for child in [nursery.start(*ARGV, str(storage)) for _ in range(2)])
        assert sorted([first.code, second.code]) == [0, 3], first.err + second.err
        loser = first if first.code == 3 else second
        assert "this run" in loser.err
        assert "Traceback" not in loser.err
        assert [entry["kind"] for entry in entries(only_run(storage))].count("claim") == 1
        assert evidence(only_run(storage)) == untouched


def test_a_process_that_stands_still_is_not_taken_for_dead_while_its_heart_beats(
    nursery: Nursery, tmp_path: Path
) -> None:
    """With the usual heartbeat a successor has to refuse at once, not to watch for half a minute."""
    child = nursery.start(*ARGV, str(tmp_path), trap=Trap("steps", 100, signal.SIGSTOP))
    assert nursery.stopped(child)
    other = nursery.run(*ARGV, str(tmp_path))
    assert other.code == 3
    assert "another process is writing this run" in other.err
    os.kill(child.pid, signal.SIGCONT)
    assert nursery.wait(child).code == 0


def zombies() -> list[Trap]:
    """Where it stops: mostly in the middle of writing something."""
    draw = random.Random(SEED)
    return [
        Trap("steps", draw.randint(1, 240), signal.SIGSTOP),
        *(Trap("files", count + draw.randint(0, 39), signal.SIGSTOP) for count in range(40, 440, 40)),
    ]


@pytest.mark.parametrize("trap", zombies(), ids=lambda trap: f"{trap.kind}-{trap.count}")
def test_a_zombie_that_wakes_after_its_successor_has_finished_changes_nothing(
    nursery: Nursery, untouched: object, tmp_path: Path, trap: Trap
) -> None:
    with Watcher(tmp_path):
        zombie = nursery.start(*ARGV, str(tmp_path), trap=trap, env=QUICK_HEART)
        assert nursery.stopped(zombie)
        time.sleep(SILENCE_S)
        successor = nursery.run(*ARGV, str(tmp_path), env=QUICK_HEART)
        assert successor.code == 0, successor.err
        run = only_run(tmp_path)
        before = committed(run)
        os.kill(zombie.pid, signal.SIGCONT)
        outcome = nursery.wait(zombie)
    assert outcome.code == 3, outcome.err
    assert "taken" in outcome.err
    assert "Traceback" not in outcome.err
    after = committed(run)
    storage = {name for name in after if "-a0001/" in name and name not in before}  # harmless: no entry names it
    assert {name: digest for name, digest in after.items() if name not in storage and name != "run.json"} == {
        name: digest for name, digest in before.items() if name != "run.json"
    }
    assert evidence(run) == untouched


def test_a_zombie_that_wakes_while_its_successor_trains_leaves(
    nursery: Nursery, untouched: object, tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    for number in range(3):
        storage = tmp_path / str(number)
        with Watcher(storage):
            zombie = nursery.start(
                *ARGV, str(storage), trap=Trap("files", draw.randint(120, 300), signal.SIGSTOP), env=QUICK_HEART
            )
            assert nursery.stopped(zombie)
            time.sleep(SILENCE_S)
            successor = nursery.start(
                *ARGV, str(storage), trap=Trap("files", draw.randint(90, 200), signal.SIGSTOP), env=QUICK_HEART
            )
            assert nursery.stopped(successor)
            os.kill(zombie.pid, signal.SIGCONT)
            woken = nursery.wait(zombie)
            os.kill(successor.pid, signal.SIGCONT)
            outcome = nursery.wait(successor)
        assert (woken.code, outcome.code) == (3, 0), woken.err + outcome.err
        assert evidence(only_run(storage)) == untouched


def test_the_true_command_survives_ctrl_c_sigterm_and_sigkill(nursery: Nursery, folder: Path, tmp_path: Path) -> None:
    """`python -m pipeline` in a process group of its own, ended in three ways and then left to finish."""
    storage = tmp_path / "runs"
    argv = ["train", "longer.yaml", "--storage"]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *argv, str(storage)],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ended_by(number: int) -> tuple[int, str]:
        commits = count_commits(storage)
        process = begin()
        wait_for(lambda: count_commits(storage) > commits or process.poll() is not None, 60, "a commit")
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    with Watcher(storage):
        for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
            found, err = ended_by(number)
            assert found == code, err
            assert ("same command" in err) == (code > 0)
        last = begin()
        _, err = last.communicate(timeout=120)
        assert last.returncode == 0, err
    assert nursery.run(*argv, str(tmp_path / "untouched")).code == 0
    assert evidence(only_run(storage)) == evidence(only_run(tmp_path / "untouched"))
    assert set(read_log(only_run(storage), "steps")["attempt"].to_pylist()) == {1, 2, 3, 4}


def count_commits(storage: Path) -> int:
    return sum(entry["kind"] == "commit" for run in storage.glob("*/journal") for entry in entries(run.parent))
