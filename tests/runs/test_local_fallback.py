"""Storage that is lost in mid-run: what is saved on this machine, and how the next attempt takes it up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import StorageError, StorageLostError
from pipeline.runs import async_writer as recorder_module
from pipeline.runs import local_fallback
from pipeline.runs.async_writer import AsyncRunWriter, finish_ended_run
from pipeline.runs.checkpoints.checkpoint import find_checkpoint
from pipeline.runs.journal.entries import Claim, Commit
from pipeline.runs.lease.attempt import Attempt, acquire_lease
from pipeline.runs.run import Run
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.runs.parts import create_run, make_block, make_evaluation, make_snapshot, read_entries

KEEP_CHECKPOINTS = 2


class InterruptibleBackend(LocalBackend):
    """Files whose requests fail while `cut` says so of their path."""

    cut: Callable[[str], bool] = staticmethod(lambda path: False)

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        self._raise_if_cut(path)
        super().replace(path, data, temporary, sync)

    def create(self, path: str, data: bytes, temporary: str) -> None:
        self._raise_if_cut(path)
        super().create(path, data, temporary)

    def _raise_if_cut(self, path: str) -> None:
        if self.cut(path):
            raise TimeoutError("the road is cut")


class LostReplyBackend(InterruptibleBackend):
    """One whose replies are lost, after the work was done."""

    def create(self, path: str, data: bytes, temporary: str) -> None:
        LocalBackend.create(self, path, data, temporary)
        self._raise_if_cut(path)

    def read(self, path: str) -> bytes:
        self._raise_if_cut(path)
        return super().read(path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The spool of this test."""
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "0.2")
    return tmp_path / "spool"


def open_interruptible_run(road: InterruptibleBackend, tmp_path: Path) -> Run:
    top = tmp_path / "runs"
    if not (top / "run").exists():
        create_run(str(top))
    return Run(Storage(road, str(top), str(top)), "run")


def start_attempt(run: Run, dead: int | None = None) -> tuple[Attempt, AsyncRunWriter]:
    attempt = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=dead)
    recorder = AsyncRunWriter(attempt, keep=KEEP_CHECKPOINTS)
    recorder.finish()
    return attempt, recorder


def stop_attempt(attempt: Attempt, recorder: AsyncRunWriter) -> None:
    recorder.close()
    attempt.close()


def lose_storage(
    run: Run, road: InterruptibleBackend, *, end: bool = False, cut: Callable[[str], bool] = lambda path: True
) -> str:
    """An attempt that commits step 120, loses its storage at 150 and notices at 170; returns the message."""
    attempt, recorder = start_attempt(run)
    recorder.log_steps(make_block(1, 120))
    recorder.log_evaluation(make_evaluation(110))
    recorder.commit(make_snapshot(120, best=110, best_weights=make_snapshot(110).weights))
    recorder.finish()
    road.cut = cut
    recorder.log_steps(make_block(121, 150))
    recorder.log_evaluation(make_evaluation(140))
    recorder.commit(make_snapshot(150, best=140, best_weights=make_snapshot(140).weights))
    recorder.log_steps(make_block(151, 160))
    recorder._wait_until_idle()
    recorder.raise_if_failed()
    assert recorder.must_save_now(), "the present has to be saved"
    recorder.log_steps(make_block(161, 170))
    with pytest.raises(StorageLostError) as caught:
        recorder.commit(make_snapshot(170, best=140, end=end))
    recorder.write_exit("failed", caught.value, 170)
    stop_attempt(attempt, recorder)
    road.cut = lambda path: False
    return str(caught.value)


def logged_steps(run: Run) -> list[int]:
    local = run.storage.local_path
    assert local is not None
    return [step for file in sorted(local.glob("metrics/steps/*")) for step in pq.read_table(file)["step"].to_pylist()]


def committed_steps(run: Run) -> list[tuple[int, int]]:
    return [(entry.attempt, entry.step) for entry in read_entries(run.journal) if isinstance(entry, Commit)]


def test_local_save_is_reported_and_committed_by_the_next_attempt(tmp_path: Path, folder: Path) -> None:
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    message = lose_storage(run, road)
    (local_folder,) = folder.glob("*/run")
    assert f"step 170 is saved in {local_folder}" in message
    assert local_folder.stat().st_mode & 0o077 == 0, "only the user may read it"
    assert committed_steps(run) == [(1, 120)], "none of it is acknowledged"

    local_run = Run(Storage.open(str(local_folder.parent)), local_folder.name)
    assert torch.equal(find_checkpoint(local_run, "last").load_weights()["0.weight"], torch.full((3, 4), 170.0))
    assert torch.equal(find_checkpoint(local_run, "best").load_weights()["0.weight"], torch.full((3, 4), 140.0))
    assert local_run.read_job_yaml() == run.read_job_yaml()

    attempt, recorder = start_attempt(run, dead=1)
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.step == 120
    assert attempt.local_checkpoint is not None
    assert attempt.local_checkpoint.position == {"step": 170}
    assert "going on from step 170" in attempt.local_checkpoint_message
    assert committed_steps(run) == [(1, 120), (2, 170)]
    assert not local_folder.exists()
    best = find_checkpoint(run, "best")
    assert best.step == 140
    assert torch.equal(best.load_weights()["0.weight"], torch.full((3, 4), 140.0))
    recorder.log_steps(make_block(171, 250))
    recorder.commit(make_snapshot(250, best=140, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    assert logged_steps(run) == list(range(1, 251))


def test_local_save_of_the_end_finishes_the_run(tmp_path: Path, folder: Path) -> None:
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    lose_storage(run, road, end=True)
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
    """The saved step 170 was built on 120; the journal says 150, of the same attempt: the same chain."""
    road = LostReplyBackend()
    run = open_interruptible_run(road, tmp_path)
    lose_storage(run, road, cut=lambda path: "journal" in path)
    assert committed_steps(run) == [(1, 120), (1, 150)]
    attempt, recorder = start_attempt(run, dead=1)
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.step == 150
    assert committed_steps(run)[2:] == [(2, 170)]
    recorder.log_steps(make_block(171, 200))
    recorder.commit(make_snapshot(200, best=140, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    assert logged_steps(run) == list(range(1, 201))


def test_attempt_that_took_over_is_not_disturbed(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    lose_storage(run, road)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TRAINYARD_SPOOL", str(tmp_path / "of-another-machine"))
        attempt, recorder = start_attempt(run, dead=1)
        assert attempt.local_checkpoint is None
        recorder.log_steps(make_block(121, 130))
        recorder.commit(make_snapshot(130))
        recorder.finish()
        stop_attempt(attempt, recorder)
    attempt, recorder = start_attempt(run, dead=2)
    assert attempt.local_checkpoint is None
    assert "went on from elsewhere" in attempt.local_checkpoint_message
    assert attempt.resume_checkpoint is not None
    assert attempt.resume_checkpoint.step == 130
    stop_attempt(attempt, recorder)
    assert list(folder.glob("*/run/checkpoints/*170*")), "it is left alone"


@pytest.mark.parametrize("harm", ["cut", "lose", "other run"])
def test_damaged_or_foreign_local_save_is_ignored(tmp_path: Path, folder: Path, harm: str) -> None:
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    lose_storage(run, road)
    (weights,) = folder.glob("*/run/checkpoints/*170*/model.safetensors")
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "lose":
        weights.unlink()
    else:
        shutil.rmtree(tmp_path / "runs")
        run = open_interruptible_run(road, tmp_path)
    attempt, recorder = start_attempt(run, dead=None if harm == "other run" else 1)
    assert attempt.local_checkpoint is None
    assert "is not used" in attempt.local_checkpoint_message
    stop_attempt(attempt, recorder)


def test_committed_local_save_is_deleted(tmp_path: Path, folder: Path) -> None:
    """A kill between the commit of what was saved here and its removal."""
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    lose_storage(run, road)
    (local_folder,) = folder.glob("*/run")
    shutil.copytree(local_folder, tmp_path / "copy")
    attempt, recorder = start_attempt(run, dead=1)
    stop_attempt(attempt, recorder)
    shutil.copytree(tmp_path / "copy", local_folder)
    attempt, recorder = start_attempt(run, dead=2)
    assert (attempt.local_checkpoint, attempt.local_checkpoint_message) == (None, "")
    stop_attempt(attempt, recorder)
    assert not local_folder.exists()


def test_storage_lost_again_while_committing_a_local_save(tmp_path: Path, folder: Path) -> None:
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    lose_storage(run, road)
    attempt = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=1)
    road.cut = lambda path: "checkpoints" in path
    recorder = AsyncRunWriter(attempt, keep=KEEP_CHECKPOINTS)
    recorder.log_steps(make_block(171, 180))
    with pytest.raises(StorageLostError, match="step 180 is saved in"):
        recorder.commit(make_snapshot(180, best=140))
    recorder.write_exit("failed", None, 180)
    stop_attempt(attempt, recorder)
    road.cut = lambda path: False
    attempt, recorder = start_attempt(run, dead=2)
    assert committed_steps(run) == [(1, 120), (3, 180)]
    assert find_checkpoint(run, "best").step == 140
    stop_attempt(attempt, recorder)


def test_full_local_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "file"))
    road = InterruptibleBackend()
    assert "could not be saved on this machine" in lose_storage(open_interruptible_run(road, tmp_path), road)


def test_revoked_permission_loses_nothing(tmp_path: Path) -> None:
    def refuse(path: str) -> bool:
        raise PermissionError(13, "Permission denied")

    run = open_interruptible_run(InterruptibleBackend(), tmp_path)
    attempt, recorder = start_attempt(run)
    backend = run.storage.backend
    assert isinstance(backend, InterruptibleBackend)
    recorder.log_steps(make_block(1, 50))
    backend.cut = refuse
    recorder.commit(make_snapshot(50))
    with pytest.raises(StorageError, match=r"no permission .*step 50 is saved in"):
        recorder.finish()
    recorder.close()
    attempt.close()


def test_training_does_not_wait_for_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and one snapshot wait, up to a bound; then all are committed."""
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "60")
    monkeypatch.setattr(recorder_module, "MAX_BUFFERED_ROWS", 100)
    monkeypatch.setattr(recorder_module, "MAX_BUFFERED_ROWS_DURING_COMMIT", 300)
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    attempt, recorder = start_attempt(run)
    road.cut = lambda path: True
    recorder.log_steps(make_block(1, 10))
    recorder.commit(make_snapshot(10))
    assert not recorder.can_save_now()
    recorder.log_steps(make_block(11, 200))
    assert not recorder.must_save_now(), "it would wait"
    recorder.log_steps(make_block(201, 320))
    assert recorder.must_save_now(), "memory has an end"
    road.cut = lambda path: False
    recorder.finish()
    assert recorder.must_save_now()
    recorder.commit(make_snapshot(320, end=True))
    recorder.finish()
    stop_attempt(attempt, recorder)
    assert logged_steps(run) == list(range(1, 321))


def test_spool_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRAINYARD_SPOOL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_fallback.spool_folder() == tmp_path / "trainyard" / "spool"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_fallback.spool_folder() == tmp_path / ".cache" / "trainyard" / "spool"


def test_journal_does_not_depend_on_the_local_save(tmp_path: Path, folder: Path) -> None:
    road = InterruptibleBackend()
    run = open_interruptible_run(road, tmp_path)
    lose_storage(run, road)
    kinds = [type(entry) for entry in read_entries(run.journal)]
    assert kinds == [Claim, Commit]
    assert all("170" not in name for name in run.storage.list("checkpoints"))
