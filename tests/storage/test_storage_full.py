"""A disk or a quota that is full: said at once, with how much is needed, and nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.errors import StorageFullError
from pipeline.record.attempt import claim
from pipeline.record.entries import Commit
from pipeline.record.recorder import Recorder
from pipeline.record.run import Run
from pipeline.storage import Storage
from tests.record.record_parts import block, born, read_entries, snapshot

DISK_BYTES = 1_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte in memory."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(mount_point)]
    try:
        refusal = subprocess.run(words, capture_output=True, text=True).stderr.strip()
    except OSError as error:
        refusal = str(error)
    if not os.path.ismount(mount_point):
        pytest.skip(f"this machine mounts no tmpfs for a test: {refusal}")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fill(disk: Path, leave: int) -> Path:
    (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - leave))
    return disk / "ballast"


def test_a_full_disk_is_told_with_numbers_and_leaves_nothing(disk: Path) -> None:
    storage = Storage.open(str(disk / "runs"))
    storage.replace("run/a", b"old")
    fill(disk, 20_000)
    before = files(disk)
    for action in (storage.replace, storage.create):
        with pytest.raises(
            StorageFullError, match=r"disk is full: 300,000 bytes are needed, [\d,]+ are free"
        ) as caught:
            action("run/a" if action == storage.replace else "run/b", b"x" * 300_000)
        assert caught.value.where.startswith(str(disk / "runs" / "run"))
        assert "make room" in caught.value.fix
        assert caught.value.exit_code == 1
    assert files(disk) == before
    assert storage.read("run/a") == b"old"


def test_a_run_on_a_full_disk_is_saved_elsewhere_and_goes_on_when_there_is_room(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "spool"))
    run = born(str(disk / "runs"))
    attempt = claim(run, driver="d", facts={})
    recorder = Recorder(attempt, keep=2)
    recorder.steps(block(1, 120))
    recorder.commit(snapshot(120))
    recorder.finish()
    ballast = fill(disk, 16_384)
    before = {name for name in files(disk / "runs") if "checkpoints" in name}
    recorder.steps(block(121, 150))
    recorder.commit(snapshot(150, state={"momentum": torch.zeros(10_000)}))
    with pytest.raises(StorageFullError, match=r"disk is full: .* step 150 is saved in") as caught:
        recorder.finish()
    assert {name for name in files(disk / "runs") if "checkpoints" in name} == before, "nothing half-written stays"
    recorder.leave("failed", caught.value, 150)
    recorder.close()
    attempt.close()

    ballast.unlink()
    run = Run(Storage.open(str(disk / "runs")), "run")
    attempt = claim(run, driver="d", facts={}, dead=1)
    assert attempt.spooled is not None
    recorder = Recorder(attempt, keep=2)
    recorder.steps(block(151, 200))
    recorder.commit(snapshot(200, end=True))
    recorder.finish()
    recorder.close()
    attempt.close()
    assert [entry.step for entry in read_entries(run.journal) if isinstance(entry, Commit)] == [120, 150, 200]


def test_a_quota_that_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    storage = Storage.open(str(tmp_path))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageFullError, match="quota is used up: 3 bytes are needed"):
        storage.replace("a", b"123")
    assert files(tmp_path) == set()
