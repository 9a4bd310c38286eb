"""A full disk or quota: it is reported at once, with the number of bytes needed, and no partial file is left."""

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
from pipeline.runs.async_writer import AsyncRunWriter
from pipeline.runs.journal.entries import Commit
from pipeline.runs.lease.attempt import acquire_lease
from pipeline.runs.run import Run
from pipeline.storage import Storage
from tests.runs.factories import create_run, make_block, make_snapshot, read_entries

DISK_BYTES = 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte in memory."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(mount_point)]
    try:
        message = subprocess.run(command, capture_output=True, text=True).stderr.strip()
    except OSError as error:
        message = str(error)
    if not os.path.ismount(mount_point):
        pytest.skip(f"cannot mount a tmpfs on this machine: {message}")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fill_disk(disk: Path, free_bytes: int) -> Path:
    (disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(disk).free - free_bytes))
    return disk / "filler"


def test_full_disk_is_reported_with_sizes_and_leaves_nothing(small_disk: Path) -> None:
    storage = Storage.open(str(small_disk / "runs"))
    storage.replace("run/a", b"old")
    fill_disk(small_disk, 20_000)
    before = list_files(small_disk)
    for action in (storage.replace, storage.create):
        with pytest.raises(
            StorageFullError, match=r"disk is full: 300,000 bytes are needed, [\d,]+ are free"
        ) as caught:
            action("run/a" if action == storage.replace else "run/b", b"x" * 300_000)
        assert caught.value.where.startswith(str(small_disk / "runs" / "run"))
        assert "free some space" in caught.value.fix
        assert caught.value.exit_code == 1
    assert list_files(small_disk) == before
    assert storage.read("run/a") == b"old"


def test_run_on_a_full_disk_is_saved_elsewhere_and_resumes(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_SPOOL", str(tmp_path / "spool"))
    run = create_run(str(small_disk / "runs"))
    attempt = acquire_lease(run, driver="d", metadata={})
    writer = AsyncRunWriter(attempt, keep=2)
    writer.log_steps(make_block(1, 120))
    writer.commit(make_snapshot(120))
    writer.finish()
    filler = fill_disk(small_disk, 16_384)
    before = {name for name in list_files(small_disk / "runs") if "checkpoints" in name}
    writer.log_steps(make_block(121, 150))
    writer.commit(make_snapshot(150, state={"momentum": torch.zeros(10_000)}))
    with pytest.raises(StorageFullError, match=r"disk is full: .* step 150 is saved in") as caught:
        writer.finish()
    assert {name for name in list_files(small_disk / "runs") if "checkpoints" in name} == before, (
        "no partial file is left"
    )
    writer.write_exit("failed", caught.value, 150)
    writer.close()
    attempt.close()

    filler.unlink()
    run = Run(Storage.open(str(small_disk / "runs")), "run")
    attempt = acquire_lease(run, driver="d", metadata={}, known_dead_attempt=1)
    assert attempt.local_checkpoint is not None
    writer = AsyncRunWriter(attempt, keep=2)
    writer.log_steps(make_block(151, 200))
    writer.commit(make_snapshot(200, is_final=True))
    writer.finish()
    writer.close()
    attempt.close()
    assert [entry.step for entry in read_entries(run.journal) if isinstance(entry, Commit)] == [120, 150, 200]


def test_exhausted_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    storage = Storage.open(str(tmp_path))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageFullError, match="quota is used up: 3 bytes are needed"):
        storage.replace("a", b"123")
    assert list_files(tmp_path) == set()
