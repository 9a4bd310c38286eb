"""Storage that is lost in mid-run: what is saved on this machine, and how the next attempt takes it up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import StorageError, StorageLostError
from pipeline.record import recorder as recorder_module
from pipeline.record import spool
from pipeline.record.attempt import Attempt, claim
from pipeline.record.checkpoint import find_checkpoint
from pipeline.record.entries import Claim, Commit
from pipeline.record.recorder import Recorder, complete
from pipeline.record.run import Run
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from tests.record.record_parts import block, born, evaluation, read_entries, snapshot

KEEP = 2


class Road(LocalBackend):
    """Files whose requests fail while `cut` says so of their path."""

    cut: Callable[[str], bool] = staticmethod(lambda path: False)

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        self._pass(path)
        super().replace(path, data, temporary, sync)

    def create(self, path: str, data: bytes, temporary: str) -> None:
        self._pass(path)
        super().create(path, data, temporary)

    def _pass(self, path: str) -> None:
        if self.cut(path):
            raise TimeoutError("the road is cut")


class LateRoad(Road):
    """One whose replies are lost, after the work was done."""

    def create(self, path: str, data: bytes, temporary: str) -> None:
        LocalBackend.create(self, path, data, temporary)
        self._pass(path)

    def read(self, path: str) -> bytes:
        self._pass(path)
        return super().read(path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The spool of this test."""
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "0.2")
    return tmp_path / "spool"


def run_on(road: Road, tmp_path: Path) -> Run:
    top = tmp_path / "runs"
    if not (top / "run").exists():
        born(str(top))
    return Run(Storage(road, str(top), str(top)), "run")


def begin(run: Run, dead: int | None = None) -> tuple[Attempt, Recorder]:
    attempt = claim(run, driver="d", facts={}, dead=dead)
    recorder = Recorder(attempt, keep=KEEP)
    recorder.finish()
    return attempt, recorder


def stop(attempt: Attempt, recorder: Recorder) -> None:
    recorder.close()
    attempt.close()


def lost_at(run: Run, road: Road, *, end: bool = False, cut: Callable[[str], bool] = lambda path: True) -> str:
    """An attempt that commits step 120, loses its storage at 150 and notices at 170; returns the message."""
    attempt, recorder = begin(run)
    recorder.steps(block(1, 120))
    recorder.evaluation(evaluation(110))
    recorder.commit(snapshot(120, best=110, best_weights=snapshot(110).weights))
    recorder.finish()
    road.cut = cut
    recorder.steps(block(121, 150))
    recorder.evaluation(evaluation(140))
    recorder.commit(snapshot(150, best=140, best_weights=snapshot(140).weights))
    recorder.steps(block(151, 160))
    recorder._wait()
    recorder.check()
    assert recorder.must_commit(), "the present has to be saved"
    recorder.steps(block(161, 170))
    with pytest.raises(StorageLostError) as caught:
        recorder.commit(snapshot(170, best=140, end=end))
    recorder.leave("failed", caught.value, 170)
    stop(attempt, recorder)
    road.cut = lambda path: False
    return str(caught.value)


def rows_of(run: Run) -> list[int]:
    local = run.storage.local_path
    assert local is not None
    return [step for file in sorted(local.glob("metrics/steps/*")) for step in pq.read_table(file)["step"].to_pylist()]


def committed(run: Run) -> list[tuple[int, int]]:
    return [(entry.attempt, entry.step) for entry in read_entries(run.journal) if isinstance(entry, Commit)]


def test_what_was_trained_is_saved_and_named_and_the_next_attempt_commits_it(tmp_path: Path, folder: Path) -> None:
    road = Road()
    run = run_on(road, tmp_path)
    message = lost_at(run, road)
    (local_folder,) = folder.glob("*/run")
    assert f"step 170 is saved in {local_folder}" in message
    assert local_folder.stat().st_mode & 0o077 == 0, "only the user may read it"
    assert committed(run) == [(1, 120)], "none of it is acknowledged"

    local_run = Run(Storage.open(str(local_folder.parent)), local_folder.name)
    assert torch.equal(find_checkpoint(local_run, "last").weights()["0.weight"], torch.full((3, 4), 170.0))
    assert torch.equal(find_checkpoint(local_run, "best").weights()["0.weight"], torch.full((3, 4), 140.0))
    assert local_run.job_yaml() == run.job_yaml()

    attempt, recorder = begin(run, dead=1)
    assert attempt.base is not None
    assert attempt.base.step == 120
    assert attempt.spooled is not None
    assert attempt.spooled.position == {"step": 170}
    assert "going on from step 170" in attempt.remark
    assert committed(run) == [(1, 120), (2, 170)]
    assert not local_folder.exists()
    best = find_checkpoint(run, "best")
    assert best.step == 140
    assert torch.equal(best.weights()["0.weight"], torch.full((3, 4), 140.0))
    recorder.steps(block(171, 250))
    recorder.commit(snapshot(250, best=140, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert rows_of(run) == list(range(1, 251))


def test_an_end_that_was_saved_here_ends_the_run(tmp_path: Path, folder: Path) -> None:
    road = Road()
    run = run_on(road, tmp_path)
    lost_at(run, road, end=True)
    attempt = claim(run, driver="d", facts={}, dead=1)
    assert attempt.spooled is not None
    assert attempt.spooled.end
    complete(attempt, KEEP)
    assert committed(run) == [(1, 120), (2, 170)]
    assert run.has_result()
    assert rows_of(run) == list(range(1, 171))
    last = read_entries(run.journal)[-1]
    assert isinstance(last, Commit)
    assert run.storage.list("checkpoints") == sorted(name for pair in last.kept for name in pair if name is not None)


def test_a_commit_whose_reply_was_lost_may_have_arrived(tmp_path: Path, folder: Path) -> None:
    """The saved step 170 was built on 120; the journal says 150, of the same attempt: the same chain."""
    road = LateRoad()
    run = run_on(road, tmp_path)
    lost_at(run, road, cut=lambda path: "journal" in path)
    assert committed(run) == [(1, 120), (1, 150)]
    attempt, recorder = begin(run, dead=1)
    assert attempt.base is not None
    assert attempt.base.step == 150
    assert committed(run)[2:] == [(2, 170)]
    recorder.steps(block(171, 200))
    recorder.commit(snapshot(200, best=140, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert rows_of(run) == list(range(1, 201))


def test_another_that_went_on_meanwhile_is_not_disturbed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    road = Road()
    run = run_on(road, tmp_path)
    lost_at(run, road)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TRAINYARD_SPOOL", str(tmp_path / "of-another-machine"))
        attempt, recorder = begin(run, dead=1)
        assert attempt.spooled is None
        recorder.steps(block(121, 130))
        recorder.commit(snapshot(130))
        recorder.finish()
        stop(attempt, recorder)
    attempt, recorder = begin(run, dead=2)
    assert attempt.spooled is None
    assert "went on from elsewhere" in attempt.remark
    assert attempt.base is not None
    assert attempt.base.step == 130
    stop(attempt, recorder)
    assert list(folder.glob("*/run/checkpoints/*170*")), "it is left alone"


@pytest.mark.parametrize("harm", ["cut", "lose", "other run"])
def test_what_is_damaged_or_of_another_run_is_not_taken(tmp_path: Path, folder: Path, harm: str) -> None:
    road = Road()
    run = run_on(road, tmp_path)
    lost_at(run, road)
    (weights,) = folder.glob("*/run/checkpoints/*170*/model.safetensors")
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "lose":
        weights.unlink()
    else:
        shutil.rmtree(tmp_path / "runs")
        run = run_on(road, tmp_path)
    attempt, recorder = begin(run, dead=None if harm == "other run" else 1)
    assert attempt.spooled is None
    assert "is not used" in attempt.remark
    stop(attempt, recorder)


def test_what_is_committed_already_is_forgotten(tmp_path: Path, folder: Path) -> None:
    """A kill between the commit of what was saved here and its removal."""
    road = Road()
    run = run_on(road, tmp_path)
    lost_at(run, road)
    (local_folder,) = folder.glob("*/run")
    shutil.copytree(local_folder, tmp_path / "copy")
    attempt, recorder = begin(run, dead=1)
    stop(attempt, recorder)
    shutil.copytree(tmp_path / "copy", local_folder)
    attempt, recorder = begin(run, dead=2)
    assert (attempt.spooled, attempt.remark) == (None, "")
    stop(attempt, recorder)
    assert not local_folder.exists()


def test_storage_lost_again_while_it_is_taken_up(tmp_path: Path, folder: Path) -> None:
    road = Road()
    run = run_on(road, tmp_path)
    lost_at(run, road)
    attempt = claim(run, driver="d", facts={}, dead=1)
    road.cut = lambda path: "checkpoints" in path
    recorder = Recorder(attempt, keep=KEEP)
    recorder.steps(block(171, 180))
    with pytest.raises(StorageLostError, match="step 180 is saved in"):
        recorder.commit(snapshot(180, best=140))
    recorder.leave("failed", None, 180)
    stop(attempt, recorder)
    road.cut = lambda path: False
    attempt, recorder = begin(run, dead=2)
    assert committed(run) == [(1, 120), (3, 180)]
    assert find_checkpoint(run, "best").step == 140
    stop(attempt, recorder)


def test_a_machine_without_room_for_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "file"))
    road = Road()
    assert "could not be saved on this machine" in lost_at(run_on(road, tmp_path), road)


def test_a_right_that_was_taken_away_loses_nothing_either(tmp_path: Path) -> None:
    def refuse(path: str) -> bool:
        raise PermissionError(13, "Permission denied")

    run = run_on(Road(), tmp_path)
    attempt, recorder = begin(run)
    backend = run.storage.backend
    assert isinstance(backend, Road)
    recorder.steps(block(1, 50))
    backend.cut = refuse
    recorder.commit(snapshot(50))
    with pytest.raises(StorageError, match=r"no permission .*step 50 is saved in"):
        recorder.finish()
    recorder.close()
    attempt.close()


def test_training_waits_for_nothing_while_storage_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and one snapshot wait, up to a bound; then all are committed."""
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "60")
    monkeypatch.setattr(recorder_module, "MOST_ROWS", 100)
    monkeypatch.setattr(recorder_module, "MOST_WAITING", 300)
    road = Road()
    run = run_on(road, tmp_path)
    attempt, recorder = begin(run)
    road.cut = lambda path: True
    recorder.steps(block(1, 10))
    recorder.commit(snapshot(10))
    assert not recorder.may_commit()
    recorder.steps(block(11, 200))
    assert not recorder.must_commit(), "it would wait"
    recorder.steps(block(201, 320))
    assert recorder.must_commit(), "memory has an end"
    road.cut = lambda path: False
    recorder.finish()
    assert recorder.must_commit()
    recorder.commit(snapshot(320, end=True))
    recorder.finish()
    stop(attempt, recorder)
    assert rows_of(run) == list(range(1, 321))


def test_the_folder_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRAINYARD_SPOOL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert spool.spool_folder() == tmp_path / "trainyard" / "spool"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert spool.spool_folder() == tmp_path / ".cache" / "trainyard" / "spool"


def test_the_true_journal_knows_nothing_of_it(tmp_path: Path, folder: Path) -> None:
    road = Road()
    run = run_on(road, tmp_path)
    lost_at(run, road)
    kinds = [type(entry) for entry in read_entries(run.journal)]
    assert kinds == [Claim, Commit]
    assert all("170" not in name for name in run.storage.list("checkpoints"))
