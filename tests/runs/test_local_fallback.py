"""Storage that is lost during a run: what is saved on this machine, and how the next attempt resumes from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import StorageError, StorageLostError
from pipeline.runs import async_writer, local_fallback
from pipeline.runs.async_writer import AsyncRunWriter, finish_ended_run
from pipeline.runs.checkpoints.checkpoint import find_checkpoint
from pipeline.runs.journal.entries import Claim, Commit
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.runs.factories import (
    create_run,
    make_block,
    make_evaluation,
    make_snapshot,
    read_entries,
    start_attempt,
    stop_attempt,
)

KEEP_CHECKPOINTS = 2


class InterruptibleBackend(LocalBackend):
    """Local storage whose requests fail if `cut` returns True for their path."""

    cut: Callable[[str], bool] = staticmethod(lambda path: False)

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        self._raise_if_cut(path)
        super().replace(path, data, temporary, sync)

    def create(self, path: str, data: bytes, temporary: str) -> None:
        self._raise_if_cut(path)
        super().create(path, data, temporary)

    def _raise_if_cut(self, path: str) -> None:
        if self.cut(path):
            raise TimeoutError("the connection is cut")


class LostReplyBackend(InterruptibleBackend):
    """Storage that executes a request and loses the reply."""

    def create(self, path: str, data: bytes, temporary: str) -> None:
        LocalBackend.create(self, path, data, temporary)
        self._raise_if_cut(path)

    def read(self, path: str) -> bytes:
        self._raise_if_cut(path)
        return super().read(path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The spool folder of this test."""
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "0.2")
    return tmp_path / "spool"


def open_interruptible_run(backend: InterruptibleBackend, tmp_path: Path) -> Run:
    root = tmp_path / "runs"
    if not (root / "run").exists():
        create_run(str(root))
    return Run(Storage(backend, str(root), str(root)), "run")


def resume_attempt(run: Run, known_dead_attempt: int | None = None) -> tuple[Attempt, AsyncRunWriter]:
    """Start an attempt and wait until its writer has resumed."""
    attempt, writer = start_attempt(run, keep=KEEP_CHECKPOINTS, known_dead_attempt=known_dead_attempt)
    writer.finish()
    return attempt, writer


def lose_storage(
    run: Run, backend: InterruptibleBackend, *, end: bool = False, cut: Callable[[str], bool] = lambda path: True
) -> str:
    """Run an attempt that commits step 120, loses its storage at 150 and detects it at 170; return the message."""
    attempt, writer = resume_attempt(run)
    writer.log_steps(make_block(1, 120))
    writer.log_evaluation(make_evaluation(110))
    writer.commit(make_snapshot(120, best=110, best_weights=make_snapshot(110).weights))
    writer.finish()
    backend.cut = cut
    writer.log_steps(make_block(121, 150))
    writer.log_evaluation(make_evaluation(140))
    writer.commit(make_snapshot(150, best=140, best_weights=make_snapshot(140).weights))
    writer.log_steps(make_block(151, 160))
    writer._wait_until_idle()
    writer.raise_if_failed()
    assert writer.must_save_now(), "the current state must be saved"
    writer.log_steps(make_block(161, 170))
    with pytest.raises(StorageLostError) as caught:
        writer.commit(make_snapshot(170, best=140, is_final=end))
    writer.write_exit("failed", caught.value, 170)
    stop_attempt(attempt, writer)
    backend.cut = lambda path: False
    return str(caught.value)


def logged_steps(run: Run) -> list[int]:
    local = run.storage.local_path
    assert local is not None
    return [step for file in sorted(local.glob("metrics/steps/*")) for step in pq.read_table(file)["step"].to_pylist()]


def committed_steps(run: Run) -> list[tuple[int, int]]:
    return [(entry.attempt, entry.step) for entry in read_entries(run.journal) if isinstance(entry, Commit)]


def test_local_save_is_reported_and_committed_by_the_next_attempt(tmp_path: Path, folder: Path) -> None:
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    message = lose_storage(run, backend)
    (local_folder,) = folder.glob("*/run")
    assert f"step 170 is saved in {local_folder}" in message
    assert local_folder.stat().st_mode & 0o077 == 0, "only the user may read it"
    assert committed_steps(run) == [(1, 120)], "nothing else is committed"

    local_run = Run(Storage.open(str(local_folder.parent)), local_folder.name)
    assert torch.equal(find_checkpoint(local_run, "last").load_weights()["0.weight"], torch.full((3, 4), 170.0))
    assert torch.equal(find_checkpoint(local_run, "best").load_weights()["0.weight"], torch.full((3, 4), 140.0))
    assert local_run.read_job_yaml() == run.read_job_yaml()

    attempt, writer = resume_attempt(run, 1)
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.step == 120
    assert attempt.local_checkpoint is not None
    assert attempt.local_checkpoint.position == {"step": 170}
    assert "resuming from step 170" in attempt.local_checkpoint_message
    assert committed_steps(run) == [(1, 120), (2, 170)]
    assert not local_folder.exists()
    best = find_checkpoint(run, "best")
    assert best.step == 140
    assert torch.equal(best.load_weights()["0.weight"], torch.full((3, 4), 140.0))
    writer.log_steps(make_block(171, 250))
    writer.commit(make_snapshot(250, best=140, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert logged_steps(run) == list(range(1, 251))


def test_local_save_of_the_end_finishes_the_run(tmp_path: Path, folder: Path) -> None:
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    lose_storage(run, backend, end=True)
    attempt = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=1)
    assert attempt.local_checkpoint is not None
    assert attempt.local_checkpoint.is_final
    finish_ended_run(attempt, KEEP_CHECKPOINTS)
    assert committed_steps(run) == [(1, 120), (2, 170)]
    assert run.has_result()
    assert logged_steps(run) == list(range(1, 171))
    last = read_entries(run.journal)[-1]
    assert isinstance(last, Commit)
    assert run.storage.list("checkpoints") == sorted(name for pair in last.kept for name in pair if name is not None)


def test_commit_with_a_lost_reply_may_have_arrived(tmp_path: Path, folder: Path) -> None:
    """Step 170 was saved when only 120 was known to be committed; 150 in the journal is of the same attempt."""
    backend = LostReplyBackend()
    run = open_interruptible_run(backend, tmp_path)
    lose_storage(run, backend, cut=lambda path: "journal" in path)
    assert committed_steps(run) == [(1, 120), (1, 150)]
    attempt, writer = resume_attempt(run, 1)
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.step == 150
    assert committed_steps(run)[2:] == [(2, 170)]
    writer.log_steps(make_block(171, 200))
    writer.commit(make_snapshot(200, best=140, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert logged_steps(run) == list(range(1, 201))


def test_attempt_that_took_over_is_not_disturbed(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    lose_storage(run, backend)
    with monkeypatch.context() as other_machine:
        other_machine.setenv("TRAINYARD_SPOOL", str(tmp_path / "other-machine"))
        attempt, writer = resume_attempt(run, 1)
        assert attempt.local_checkpoint is None
        writer.log_steps(make_block(121, 130))
        writer.commit(make_snapshot(130))
        writer.finish()
        stop_attempt(attempt, writer)
    attempt, writer = resume_attempt(run, 2)
    assert attempt.local_checkpoint is None
    assert "resumed from another checkpoint" in attempt.local_checkpoint_message
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.step == 130
    stop_attempt(attempt, writer)
    assert list(folder.glob("*/run/checkpoints/*170*")), "it is not deleted"


@pytest.mark.parametrize("damage", ["truncated", "missing", "other run"])
def test_damaged_or_foreign_local_save_is_ignored(tmp_path: Path, folder: Path, damage: str) -> None:
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    lose_storage(run, backend)
    (weights,) = folder.glob("*/run/checkpoints/*170*/model.safetensors")
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        weights.unlink()
    else:
        shutil.rmtree(tmp_path / "runs")
        run = open_interruptible_run(backend, tmp_path)
    attempt, writer = resume_attempt(run, None if damage == "other run" else 1)
    assert attempt.local_checkpoint is None
    assert "is not used" in attempt.local_checkpoint_message
    stop_attempt(attempt, writer)


def test_committed_local_save_is_deleted(tmp_path: Path, folder: Path) -> None:
    """The process is killed between the commit of the local save and its removal."""
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    lose_storage(run, backend)
    (local_folder,) = folder.glob("*/run")
    shutil.copytree(local_folder, tmp_path / "copy")
    attempt, writer = resume_attempt(run, 1)
    stop_attempt(attempt, writer)
    shutil.copytree(tmp_path / "copy", local_folder)
    attempt, writer = resume_attempt(run, 2)
    assert (attempt.local_checkpoint, attempt.local_checkpoint_message) == (None, "")
    stop_attempt(attempt, writer)
    assert not local_folder.exists()


def test_storage_lost_again_while_committing_a_local_save(tmp_path: Path, folder: Path) -> None:
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    lose_storage(run, backend)
    attempt = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=1)
    backend.cut = lambda path: "checkpoints" in path
    writer = AsyncRunWriter(attempt, keep=KEEP_CHECKPOINTS)
    writer.log_steps(make_block(171, 180))
    with pytest.raises(StorageLostError, match="step 180 is saved in"):
        writer.commit(make_snapshot(180, best=140))
    writer.write_exit("failed", None, 180)
    stop_attempt(attempt, writer)
    backend.cut = lambda path: False
    attempt, writer = resume_attempt(run, 2)
    assert committed_steps(run) == [(1, 120), (3, 180)]
    assert find_checkpoint(run, "best").step == 140
    stop_attempt(attempt, writer)


def test_unusable_local_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "file"))
    backend = InterruptibleBackend()
    assert "could not be saved on this machine" in lose_storage(open_interruptible_run(backend, tmp_path), backend)


def test_revoked_permission_loses_nothing(tmp_path: Path) -> None:
    def refuse(path: str) -> bool:
        raise PermissionError(13, "Permission denied")

    run = open_interruptible_run(InterruptibleBackend(), tmp_path)
    attempt, writer = resume_attempt(run)
    backend = run.storage.backend
    assert isinstance(backend, InterruptibleBackend)
    writer.log_steps(make_block(1, 50))
    backend.cut = refuse
    writer.commit(make_snapshot(50))
    with pytest.raises(StorageError, match=r"no permission .*step 50 is saved in"):
        writer.finish()
    writer.close()
    attempt.close()


def test_training_does_not_wait_for_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and one snapshot are buffered, up to a limit; then all are committed."""
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "60")
    monkeypatch.setattr(async_writer, "MAX_BUFFERED_ROWS", 100)
    monkeypatch.setattr(async_writer, "MAX_BUFFERED_ROWS_DURING_COMMIT", 300)
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    attempt, writer = resume_attempt(run)
    backend.cut = lambda path: True
    writer.log_steps(make_block(1, 10))
    writer.commit(make_snapshot(10))
    assert not writer.can_save_now()
    writer.log_steps(make_block(11, 200))
    assert not writer.must_save_now(), "training would wait for the commit in progress"
    writer.log_steps(make_block(201, 320))
    assert writer.must_save_now(), "the buffer is limited"
    backend.cut = lambda path: False
    writer.finish()
    assert writer.must_save_now()
    writer.commit(make_snapshot(320, is_final=True))
    writer.finish()
    stop_attempt(attempt, writer)
    assert logged_steps(run) == list(range(1, 321))


def test_spool_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRAINYARD_SPOOL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_fallback.spool_folder() == tmp_path / "trainyard" / "spool"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_fallback.spool_folder() == tmp_path / ".cache" / "trainyard" / "spool"


def test_journal_does_not_depend_on_the_local_save(tmp_path: Path, folder: Path) -> None:
    backend = InterruptibleBackend()
    run = open_interruptible_run(backend, tmp_path)
    lose_storage(run, backend)
    kinds = [type(entry) for entry in read_entries(run.journal)]
    assert kinds == [Claim, Commit]
    assert all("170" not in name for name in run.storage.list("checkpoints"))
