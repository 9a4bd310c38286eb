"""Exclusive write access to a run, with real processes that run, hang, are killed and compete."""

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
from pipeline.runs.async_writer import AsyncRunWriter, finish_ended_run
from pipeline.runs.integrity import find_damage
from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import Claim, Exit
from pipeline.runs.lease.attempt import Attempt, acquire_lease, probe_lease
from pipeline.runs.lease.heartbeat import HeartbeatSample, read_heartbeat
from pipeline.runs.lease.liveness import raise_if_alive
from pipeline.runs.lease.process_lock import ProcessLock, is_held, read_boot_id
from pipeline.runs.run import Run
from pipeline.runs.serialization import to_json, verify_digest, with_digest
from pipeline.runs.status import read_run_status
from pipeline.storage import Storage, remote
from tests.process_kill.run_assertions import wait_for
from tests.runs.factories import SEGMENT_STEPS, create_run, make_block, make_snapshot, read_entries
from tests.runs.writer_process import train_attempt

SCRIPT = Path(__file__).with_name("writer_process.py")
INTERVAL_S = 0.3

StartProcess = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def _fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", str(INTERVAL_S))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(str(tmp_path))


@pytest.fixture
def start_process(run: Run) -> Iterator[StartProcess]:
    """Start processes that claim the run."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: str = "hold", **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), run.root_url, run.name, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_unclaimed_run_is_acquired_at_once(run: Run) -> None:
    assert probe_lease(run) == "free"
    watched: list[str] = []
    attempt = acquire_lease(run, driver="d", metadata={"host": "h"}, on_watch=watched.append)
    assert (attempt.number, attempt.resume_checkpoint, attempt.end_step, attempt.highest_step) == (1, None, None, 0)
    assert not watched
    assert attempt.previous_metadata == {}
    assert probe_lease(run) == "busy"
    assert probe_lease(run, "d") == "free", "a driver may supersede its own attempts"
    attempt.close()
    assert probe_lease(run) == "free", "its lock is free, which proves that it has stopped"
    second = acquire_lease(run, driver="e", metadata={}, on_watch=watched.append)
    assert second.number == 2
    assert second.previous_metadata == {"host": "h"}
    assert not watched
    second.close()


def test_live_process_keeps_its_run(run: Run, start_process: StartProcess) -> None:
    holder = start_process()
    assert read_line(holder) == "claimed 1"
    watched: list[str] = []
    with pytest.raises(BusyError, match=r"attempt 1 on here \(process \d+\) is writing this run") as caught:
        acquire_lease(run, driver="me", metadata={}, on_watch=watched.append)
    assert watched == [], "a held lock and a fresh heartbeat are proof"
    assert caught.value.exit_code == 3
    assert len(read_entries(run.journal)) == 1


def test_killed_process_is_superseded_at_once(run: Run, start_process: StartProcess) -> None:
    holder = start_process()
    assert read_line(holder) == "claimed 1"
    holder.kill()
    holder.wait()
    assert probe_lease(run) == "free"
    watched: list[str] = []
    attempt = acquire_lease(run, driver="me", metadata={}, on_watch=watched.append)
    assert attempt.number == 2
    assert not watched
    first = read_entries(run.journal)[0]
    assert isinstance(first, Claim)
    assert not Path(first.lock).exists(), "the proof is no longer needed"
    attempt.close()


def test_stopped_process_is_superseded_after_watching(run: Run, start_process: StartProcess) -> None:
    holder = start_process("train")
    assert read_line(holder) == "claimed 1"
    while read_line(holder) != "submitted 100":
        pass
    holder.send_signal(signal.SIGSTOP)
    time.sleep(3.5 * INTERVAL_S)  # so that its heartbeat is stale
    assert probe_lease(run) == "unproven"
    watched: list[str] = []
    attempt = acquire_lease(run, driver="me", metadata={}, on_watch=watched.append)
    assert attempt.number == 2
    assert len(watched) == 1
    assert "watching its heartbeat for 1 s" in watched[0]
    assert attempt.resume_checkpoint is not None
    holder.send_signal(signal.SIGCONT)
    output, _ = holder.communicate(timeout=200)
    assert output.splitlines()[-1].startswith("SupersededError 3 attempt 1 was presumed dead")
    assert holder.returncode == 3
    writer = AsyncRunWriter(attempt, keep=2)
    writer.log_steps(make_block(attempt.resume_checkpoint.step + 1, 1000))
    writer.commit(make_snapshot(1000, best=25, is_final=True))
    writer.finish()
    writer.close()
    attempt.close()
    assert probe_lease(run) == "finished"


def test_fresh_heartbeat_without_proof_is_busy(run: Run, start_process: StartProcess, tmp_path: Path) -> None:
    holder = start_process(TMPDIR=str(tmp_path))  # as in another container of this machine
    assert read_line(holder) == "claimed 1"
    assert probe_lease(run) == "unproven"
    watched: list[str] = []
    with pytest.raises(BusyError, match="is writing this run"):
        acquire_lease(run, driver="me", metadata={}, on_watch=watched.append)
    assert len(watched) == 1


def test_fresh_heartbeat_is_reported_before_workers_start(
    run: Run, start_process: StartProcess, tmp_path: Path
) -> None:
    raise_if_alive(run, "me")
    holder = start_process(TMPDIR=str(tmp_path))
    assert read_line(holder) == "claimed 1"
    with pytest.raises(BusyError, match="is writing this run"):
        raise_if_alive(run, "me")
    holder.kill()
    holder.wait()
    raise_if_alive(run, "me")


def test_stale_heartbeat_is_watched_for_three_intervals(run: Run, start_process: StartProcess, tmp_path: Path) -> None:
    holder = start_process(TMPDIR=str(tmp_path))
    assert read_line(holder) == "claimed 1"
    holder.kill()
    holder.wait()
    assert probe_lease(run) == "unproven"
    began = time.monotonic()
    watched: list[str] = []
    acquire_lease(run, driver="me", metadata={}, on_watch=watched.append).close()
    assert time.monotonic() - began >= 3 * INTERVAL_S
    assert len(watched) == 1
    assert f"watching its heartbeat for {3 * INTERVAL_S:.0f} s" in watched[0], "and no longer"


def test_exit_during_the_watch_is_noticed(run: Run, start_process: StartProcess, tmp_path: Path) -> None:
    holder = start_process(TMPDIR=str(tmp_path))
    assert read_line(holder) == "claimed 1"
    holder.kill()
    holder.wait()
    first = read_entries(run.journal)[0]

    def append_exit(_line: str) -> None:
        run.journal.append(Exit(number=2, nonce=first.nonce, time=first.time, attempt=1, status="interrupted", step=0))

    attempt = acquire_lease(run, driver="me", metadata={}, on_watch=append_exit)
    assert [entry.kind for entry in read_entries(run.journal)] == ["claim", "leave", "claim"]
    assert attempt.number == 2
    attempt.close()


def test_driver_skips_the_watch_for_attempts_it_ended(run: Run, start_process: StartProcess, tmp_path: Path) -> None:
    first = acquire_lease(run, driver="d", metadata={})
    with pytest.raises(BusyError):
        acquire_lease(run, driver="other", metadata={}, known_dead_attempt=1)
    second = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=1)
    assert second.number == 2
    first.close()
    second.close()


def test_one_of_several_concurrent_claims_wins(run: Run, start_process: StartProcess) -> None:
    processes = [start_process() for _ in range(3)]
    lines = [read_line(process) for process in processes]
    assert sorted(lines)[-1] == "claimed 1", lines
    assert sum(line.startswith("BusyError 3") for line in lines) == 2, lines


def test_forked_loader_does_not_hold_the_lock_of_its_parent() -> None:
    code = """
import os, sys, time
from pipeline.runs.lease.process_lock import ProcessLock
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
        path = read_line(parent)
        held = Claim(number=1, nonce=nonce, time="", attempt=1, boot=read_boot_id(), lock=path)
        assert is_held(held) is True
        parent.kill()
        parent.wait()
        assert is_held(held) is False
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        assert parent.stdout is not None
        parent.stdout.close()
        Path(path).unlink()


def test_only_a_lock_on_the_same_machine_is_proof(tmp_path: Path) -> None:
    lock = ProcessLock("ab" * 16)

    def make_claim(boot_id: str, path: str) -> Claim:
        return Claim(number=1, nonce="", time="", attempt=1, boot=boot_id, lock=path)

    try:
        assert is_held(make_claim(read_boot_id(), lock.path)) is True
        assert is_held(make_claim("another-boot-id", lock.path)) is None
        assert is_held(make_claim("", lock.path)) is None
        assert is_held(make_claim(read_boot_id(), lock.path.replace("ab", "ac"))) is None
        (tmp_path / "trainyard-ab.lock").touch()
        assert is_held(make_claim(read_boot_id(), str(tmp_path / "trainyard-ab.lock"))) is None
    finally:
        lock.release(remove=True)


def test_heartbeat_reports_training_progress(run: Run) -> None:
    attempt = acquire_lease(run, driver="d", metadata={})
    attempt.update_heartbeat(7, 0.25)

    def read_sample() -> HeartbeatSample | None:
        return read_heartbeat(run.storage, 1)[1]

    wait_for(lambda: (heartbeat := read_sample()) is not None and heartbeat.step == 7, 60, "a heartbeat")
    heartbeat = read_sample()
    assert heartbeat is not None
    assert heartbeat.loss == 0.25
    attempt.update_heartbeat(8, float("nan"))
    attempt.close()


@pytest.mark.parametrize("text", ["soon", "-1", "0"])
def test_invalid_interval(run: Run, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", text)
    with pytest.raises(InputError, match="number of seconds"):
        acquire_lease(run, driver="d", metadata={})
    assert read_entries(run.journal) == ()


def test_temporary_files_of_dead_attempts_are_removed(run: Run) -> None:
    folder = run.storage.local_path
    assert folder is not None
    (folder / ".tmp").mkdir(exist_ok=True)
    (folder / ".tmp" / "leftover").write_bytes(b"half")
    acquire_lease(run, driver="d", metadata={}).close()
    assert list((folder / ".tmp").iterdir()) == []


def test_entry_with_a_lost_reply_is_adopted(run: Run) -> None:
    attempt = acquire_lease(run, driver="d", metadata={})
    late = Exit(**attempt.next_entry_fields(), status="failed", step=3)
    assert run.journal.append(late), "as if the reply had been lost and storage unavailable since"
    attempt.append(Exit(**attempt.next_entry_fields(), status="interrupted", step=4))
    assert read_entries(run.journal)[2].before == decisions.fold(read_entries(run.journal)[:2]), (
        "the state carried by the next entry"
    )
    assert attempt.state == decisions.fold(read_entries(run.journal))
    other = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=1)
    with pytest.raises(SupersededError):
        attempt.append(Exit(**attempt.next_entry_fields(), status="interrupted", step=4))
    attempt.close()
    other.close()


@pytest.mark.parametrize("delay", range(3))
def test_next_attempt_completes_the_log_after_a_kill_at_any_time(
    run: Run, start_process: StartProcess, delay: int
) -> None:
    holder = start_process("train")
    assert read_line(holder) == "claimed 1"
    for _ in range(9 * delay):
        read_line(holder)
    time.sleep(0.007 * delay)
    holder.kill()
    holder.wait()
    train_attempt(acquire_lease(run, driver="me", metadata={}))
    folder = run.storage.local_path
    assert folder is not None
    assert ds.dataset(folder / "metrics" / "steps").to_table()["step"].to_pylist() == list(range(1, 1001))
    assert ds.dataset(folder / "metrics" / "evals").to_table()["step"].to_pylist() == list(range(0, 1001, 25))
    assert run.has_result()
    assert len(run.storage.list("checkpoints")) <= 4
    attempt = acquire_lease(run, driver="me", metadata={})
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.is_final
    assert attempt.end_step == 1000
    finish_ended_run(attempt)


def test_run_of_the_previous_version_is_resumed(run: Run, start_process: StartProcess) -> None:
    """Its entries carry no state: they are all read, and new entries carry the state after them."""
    holder = start_process("train")
    assert read_line(holder) == "claimed 1"
    while read_line(holder) != "submitted 150":
        pass
    holder.kill()
    holder.wait()
    folder = run.storage.local_path
    assert folder is not None
    summary = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({name: value for name, value in summary.items() if name != "journal"}))
    for path in sorted((folder / "journal").iterdir()):
        tree = verify_digest(json.loads(path.read_text()))
        assert tree.pop("before") is not None
        path.write_text(to_json(with_digest(tree)))
    num_old = len(list((folder / "journal").iterdir()))
    status = read_run_status(run)
    assert (status.status, status.attempts) == ("running", 1)
    assert status.step >= 100
    train_attempt(acquire_lease(run, driver="me", metadata={"host": "here"}))
    entries = read_entries(run.journal)
    assert [entry.before is None for entry in entries] == [number < num_old for number in range(len(entries))]
    for entry in entries[num_old:]:
        assert entry.before == decisions.fold(entries[: entry.number - 1])
    assert ds.dataset(folder / "metrics" / "steps").to_table()["step"].to_pylist() == list(range(1, 1001))
    assert find_damage(Run(Storage.open(run.root_url), run.name)) == []


@pytest.fixture
def lossy_s3_url(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same store through a server that executes the first conditional write of each name, then drops the connection
    instead of replying, so that the HTTP library repeats the request."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    app, lock, paths = server._server.app, threading.Lock(), set[str]()

    def lose_replies(environ: dict[str, Any], start_response: Any) -> Any:
        if not environ.get("HTTP_IF_NONE_MATCH"):
            return app(environ, start_response)
        with lock:  # moto's check and write are not atomic
            body = list(app(environ, start_response))
            is_first = environ["PATH_INFO"] not in paths
            paths.add(environ["PATH_INFO"])
        if is_first:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return body

    server._server.app = lose_replies
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setattr(remote, "_HAS_CONDITIONAL_WRITES", {})
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_url
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
    assert any("/.probe-" in path for path in paths)
    assert any(path.endswith("job.yaml") for path in paths)


def test_one_of_six_claims_wins_despite_lost_replies(lossy_s3_url: str) -> None:
    lines: list[str] = []
    barrier = threading.Barrier(6)

    def start(driver: str) -> None:
        run = Run(Storage.open(lossy_s3_url), "run")
        barrier.wait()
        try:
            run.exists()
            created.append(run.create("name: run\n", {"total_steps": 1000, "cell_steps": SEGMENT_STEPS}))
            attempts.append(acquire_lease(run, driver=driver, metadata={}))
            lines.append(f"claimed {attempts[-1].number}")
        except BaseException as error:
            lines.append(type(error).__name__)

    created: list[bool] = []
    attempts: list[Attempt] = []
    threads = [threading.Thread(target=start, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for attempt in attempts:
        attempt.close()
    assert sorted(created) == [False] * 5 + [True]
    assert sorted(lines) == ["BusyError"] * 5 + ["claimed 1"]
