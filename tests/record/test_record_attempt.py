"""Who may write a run: real processes that live, hang, die and race."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from pipeline.errors import BusyError, InputError, SupersededError
from pipeline.record import decisions
from pipeline.record.attempt import Attempt, claim, peek
from pipeline.record.entries import Claim, Leave
from pipeline.record.heartbeat import Beat, read_beat
from pipeline.record.lock import ProcessLock, boot, is_held
from pipeline.record.recorder import Recorder, complete
from pipeline.record.run import Run
from pipeline.record.soundness import damage
from pipeline.record.standing import standing
from pipeline.record.values import sealed, to_json, unsealed
from pipeline.record.watch import refuse_where_it_beats
from pipeline.storage import Storage, remote
from tests.faults.fault_evidence import wait_for
from tests.record.record_parts import block, born, read_entries, snapshot
from tests.record.record_process import train

SCRIPT = Path(__file__).with_name("record_process.py")
INTERVAL_S = 0.3

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def _quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", str(INTERVAL_S))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return born(str(tmp_path))


@pytest.fixture
def start(run: Run) -> Iterator[Start]:
    """Starts processes that hold the run."""
    processes: list[subprocess.Popen[str]] = []

    def begin(command: str = "hold", **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), run.root_url, run.name, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_free_run_is_claimed_at_once(run: Run) -> None:
    assert peek(run) == "free"
    watched: list[str] = []
    attempt = claim(run, driver="d", facts={"host": "h"}, on_watch=watched.append)
    assert (attempt.number, attempt.base, attempt.ended_at, attempt.highest_step) == (1, None, None, 0)
    assert not watched
    assert attempt.previous_facts == {}
    assert peek(run) == "busy"
    assert peek(run, "d") == "free", "a driver knows of its own attempts"
    attempt.close()
    assert peek(run) == "free", "its lock is free: it is proven to do no more"
    second = claim(run, driver="e", facts={}, on_watch=watched.append)
    assert second.number == 2
    assert second.previous_facts == {"host": "h"}
    assert not watched
    second.close()


def test_a_living_process_keeps_its_run(run: Run, start: Start) -> None:
    holder = start()
    assert line(holder) == "claimed 1"
    watched: list[str] = []
    with pytest.raises(BusyError, match=r"attempt 1 on here \(process \d+\) is writing this run") as caught:
        claim(run, driver="me", facts={}, on_watch=watched.append)
    assert watched == [], "no watching where a lock and a young heart are proof"
    assert caught.value.exit_code == 3
    assert len(read_entries(run.journal)) == 1


def test_a_killed_process_is_followed_at_once(run: Run, start: Start) -> None:
    holder = start()
    assert line(holder) == "claimed 1"
    holder.kill()
    holder.wait()
    assert peek(run) == "free"
    watched: list[str] = []
    attempt = claim(run, driver="me", facts={}, on_watch=watched.append)
    assert attempt.number == 2
    assert not watched
    first = read_entries(run.journal)[0]
    assert isinstance(first, Claim)
    assert not Path(first.lock).exists(), "the proof is no longer needed"
    attempt.close()


def test_a_stopped_process_is_watched_then_followed_and_finds_itself_superseded(run: Run, start: Start) -> None:
    holder = start("train")
    assert line(holder) == "claimed 1"
    while line(holder) != "handed over 100":
        pass
    holder.send_signal(signal.SIGSTOP)
    time.sleep(3.5 * INTERVAL_S)  # so that its heart is known to have stopped
    assert peek(run) == "unproven"
    watched: list[str] = []
    attempt = claim(run, driver="me", facts={}, on_watch=watched.append)
    assert attempt.number == 2
    assert len(watched) == 1
    assert "watching its heartbeat for 1 s" in watched[0]
    assert attempt.base is not None
    holder.send_signal(signal.SIGCONT)
    output, _ = holder.communicate(timeout=200)
    assert output.splitlines()[-1].startswith("SupersededError 3 attempt 1 was taken for dead")
    assert holder.returncode == 3
    recorder = Recorder(attempt, keep=2)
    recorder.steps(block(attempt.base.step + 1, 1000))
    recorder.commit(snapshot(1000, best=25, end=True))
    recorder.finish()
    recorder.close()
    attempt.close()
    assert peek(run) == "finished"


def test_without_proof_a_heart_that_beats_means_not_now(run: Run, start: Start, tmp_path: Path) -> None:
    holder = start(TMPDIR=str(tmp_path))  # like another container of this machine
    assert line(holder) == "claimed 1"
    assert peek(run) == "unproven"
    watched: list[str] = []
    with pytest.raises(BusyError, match="is writing this run"):
        claim(run, driver="me", facts={}, on_watch=watched.append)
    assert len(watched) == 1


def test_a_heart_that_beats_is_told_before_workers_are_started(run: Run, start: Start, tmp_path: Path) -> None:
    refuse_where_it_beats(run, "me")
    holder = start(TMPDIR=str(tmp_path))
    assert line(holder) == "claimed 1"
    with pytest.raises(BusyError, match="is writing this run"):
        refuse_where_it_beats(run, "me")
    holder.kill()
    holder.wait()
    refuse_where_it_beats(run, "me")


def test_without_proof_a_silent_heart_is_watched_for_three_intervals(run: Run, start: Start, tmp_path: Path) -> None:
    holder = start(TMPDIR=str(tmp_path))
    assert line(holder) == "claimed 1"
    holder.kill()
    holder.wait()
    assert peek(run) == "unproven"
    began = time.monotonic()
    watched: list[str] = []
    claim(run, driver="me", facts={}, on_watch=watched.append).close()
    assert time.monotonic() - began >= 3 * INTERVAL_S
    assert len(watched) == 1
    assert f"watching its heartbeat for {3 * INTERVAL_S:.0f} s" in watched[0], "and no longer"


def test_who_leaves_during_the_watch_is_followed(run: Run, start: Start, tmp_path: Path) -> None:
    holder = start(TMPDIR=str(tmp_path))
    assert line(holder) == "claimed 1"
    holder.kill()
    holder.wait()
    first = read_entries(run.journal)[0]

    def leaves(_line: str) -> None:
        run.journal.append(Leave(number=2, nonce=first.nonce, time=first.time, attempt=1, status="interrupted", step=0))

    attempt = claim(run, driver="me", facts={}, on_watch=leaves)
    assert [entry.kind for entry in read_entries(run.journal)] == ["claim", "leave", "claim"]
    assert attempt.number == 2
    attempt.close()


def test_a_driver_need_not_watch_what_it_has_ended_itself(run: Run, start: Start, tmp_path: Path) -> None:
    first = claim(run, driver="d", facts={})
    with pytest.raises(BusyError):
        claim(run, driver="other", facts={}, dead=1)
    second = claim(run, driver="d", facts={}, dead=1)
    assert second.number == 2
    first.close()
    second.close()


def test_of_processes_that_claim_at_once_one_wins(run: Run, start: Start) -> None:
    racers = [start() for _ in range(3)]
    lines = [line(racer) for racer in racers]
    assert sorted(lines)[-1] == "claimed 1", lines
    assert sum(words.startswith("BusyError 3") for words in lines) == 2, lines


def test_a_forked_loader_does_not_keep_the_lock_of_its_dead_parent() -> None:
    code = """
import os, sys, time
from pipeline.record.lock import ProcessLock
lock = ProcessLock(sys.argv[1])
if os.fork():
    print(lock.path, flush=True)
time.sleep(60)
"""
    nonce = os.urandom(16).hex()
    parent = subprocess.Popen(
        [sys.executable, "-c", code, nonce], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        path = line(parent)
        held = Claim(number=1, nonce=nonce, time="", attempt=1, boot=boot(), lock=path)
        assert is_held(held) is True
        parent.kill()
        parent.wait()
        assert is_held(held) is False
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        assert parent.stdout is not None
        parent.stdout.close()
        Path(path).unlink()


def test_only_a_lock_file_of_this_machine_proves_anything(tmp_path: Path) -> None:
    lock = ProcessLock("ab" * 16)

    def of(boot_id: str, path: str) -> Claim:
        return Claim(number=1, nonce="", time="", attempt=1, boot=boot_id, lock=path)

    try:
        assert is_held(of(boot(), lock.path)) is True
        assert is_held(of("another life", lock.path)) is None
        assert is_held(of("", lock.path)) is None
        assert is_held(of(boot(), lock.path.replace("ab", "ac"))) is None
        (tmp_path / "trainyard-ab.lock").touch()
        assert is_held(of(boot(), str(tmp_path / "trainyard-ab.lock"))) is None
    finally:
        lock.release(remove=True)


def test_the_heart_says_how_far_training_is(run: Run) -> None:
    attempt = claim(run, driver="d", facts={})
    attempt.beat(7, 0.25)

    def beat() -> Beat | None:
        return read_beat(run.storage, 1)[1]

    wait_for(lambda: (heartbeat := beat()) is not None and heartbeat.step == 7, 60, "a heartbeat")
    heartbeat = beat()
    assert heartbeat is not None
    assert heartbeat.loss == 0.25
    attempt.beat(8, float("nan"))
    attempt.close()


@pytest.mark.parametrize("text", ["soon", "-1", "0"])
def test_an_interval_that_is_none(run: Run, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", text)
    with pytest.raises(InputError, match="number of seconds"):
        claim(run, driver="d", facts={})
    assert read_entries(run.journal) == ()


def test_unfinished_files_of_the_dead_are_swept_away(run: Run) -> None:
    folder = run.storage.local_path
    assert folder is not None
    (folder / ".tmp").mkdir(exist_ok=True)
    (folder / ".tmp" / "leftover").write_bytes(b"half")
    claim(run, driver="d", facts={}).close()
    assert list((folder / ".tmp").iterdir()) == []


def test_an_entry_that_arrived_after_all_is_adopted(run: Run) -> None:
    attempt = claim(run, driver="d", facts={})
    late = Leave(**attempt.common(), status="failed", step=3)
    assert run.journal.append(late), "as if the reply had been lost, and storage away ever since"
    attempt.append(Leave(**attempt.common(), status="interrupted", step=4))
    assert read_entries(run.journal)[2].before == decisions.fold(read_entries(run.journal)[:2]), (
        "what the next one carries"
    )
    assert attempt.state == decisions.fold(read_entries(run.journal))
    other = claim(run, driver="d", facts={}, dead=1)
    with pytest.raises(SupersededError):
        attempt.append(Leave(**attempt.common(), status="interrupted", step=4))
    attempt.close()
    other.close()


@pytest.mark.parametrize("moment", range(3))
def test_killed_at_any_moment_the_next_one_ends_as_if_nothing_had_happened(run: Run, start: Start, moment: int) -> None:
    holder = start("train")
    assert line(holder) == "claimed 1"
    for _ in range(9 * moment):
        line(holder)
    time.sleep(0.007 * moment)
    holder.kill()
    holder.wait()
    train(claim(run, driver="me", facts={}))
    folder = run.storage.local_path
    assert folder is not None
    assert ds.dataset(folder / "metrics" / "steps").to_table()["step"].to_pylist() == list(range(1, 1001))
    assert ds.dataset(folder / "metrics" / "evals").to_table()["step"].to_pylist() == list(range(0, 1001, 25))
    assert run.has_result()
    assert len(run.storage.list("checkpoints")) <= 4
    attempt = claim(run, driver="me", facts={})
    assert attempt.base is not None
    assert attempt.base.end
    assert attempt.ended_at == 1000
    complete(attempt)


def test_a_run_of_the_version_before_is_gone_on_with(run: Run, start: Start) -> None:
    """Its entries carry nothing of those before them: they are read once, and what is added carries it all."""
    holder = start("train")
    assert line(holder) == "claimed 1"
    while line(holder) != "handed over 150":
        pass
    holder.kill()
    holder.wait()
    folder = run.storage.local_path
    assert folder is not None
    view = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({name: value for name, value in view.items() if name != "journal"}))
    for path in sorted((folder / "journal").iterdir()):
        tree = unsealed(json.loads(path.read_text()))
        assert tree.pop("before") is not None
        path.write_text(to_json(sealed(tree)))
    old = len(list((folder / "journal").iterdir()))
    shown = standing(run)
    assert (shown.status, shown.attempts) == ("running", 1)
    assert shown.step >= 100
    train(claim(run, driver="me", facts={"host": "here"}))
    entries = read_entries(run.journal)
    assert [entry.before is None for entry in entries] == [number < old for number in range(len(entries))]
    for entry in entries[old:]:
        assert entry.before == decisions.fold(entries[: entry.number - 1])
    assert ds.dataset(folder / "metrics" / "steps").to_table()["step"].to_pylist() == list(range(1, 1001))
    assert damage(Run(Storage.open(run.root_url), run.name)) == []


@pytest.fixture
def lossy_s3_url(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same store, through a server that does a conditional write and drops the connection instead of replying, the
    first time that it gets one for a name: the HTTP library then sends it again by itself."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    answer, lock, seen = server._server.app, threading.Lock(), set[str]()

    def lose_replies(environ: dict[str, Any], start_response: Any) -> Any:
        if not environ.get("HTTP_IF_NONE_MATCH"):
            return answer(environ, start_response)
        with lock:  # moto's own look and write are two
            body = list(answer(environ, start_response))
            is_first = environ["PATH_INFO"] not in seen
            seen.add(environ["PATH_INFO"])
        if is_first:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return body

    server._server.app = lose_replies
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setattr(remote, "_CONDITIONAL", {})
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_url
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
    assert any("/.probe-" in path for path in seen)
    assert any(path.endswith("job.yaml") for path in seen)


def test_of_six_that_start_at_once_on_a_store_that_loses_replies_one_wins(lossy_s3_url: str) -> None:
    lines: list[str] = []
    barrier = threading.Barrier(6)

    def start(driver: str) -> None:
        run = Run(Storage.open(lossy_s3_url), "run")
        barrier.wait()
        try:
            run.exists()
            births.append(run.birth("name: run\n", {"total_steps": 1000, "cell_steps": 100}))
            held.append(claim(run, driver=driver, facts={}))
            lines.append(f"claimed {held[-1].number}")
        except BaseException as error:
            lines.append(type(error).__name__)

    births: list[bool] = []
    held: list[Attempt] = []
    threads = [threading.Thread(target=start, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for attempt in held:
        attempt.close()
    assert sorted(births) == [False] * 5 + [True]
    assert sorted(lines) == ["BusyError"] * 5 + ["claimed 1"]
