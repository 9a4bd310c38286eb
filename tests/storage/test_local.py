"""Local storage: temporary files, permissions, URLs, and folders that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import Storage


def test_temporary_files_are_in_the_folder_of_the_run(tmp_path: Path) -> None:
    root = Storage.open(str(tmp_path))
    run = root.subfolder("run", own_temporary_folder=True)
    run.subfolder("metrics").replace("a", b"1")
    assert (tmp_path / "run" / ".tmp").is_dir()
    assert not (tmp_path / ".tmp").exists()
    assert run.list() == ["metrics"]


def test_write_is_repeated_if_its_temporary_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(str(tmp_path))
    link, replace = os.link, os.replace
    calls: list[str] = []

    def remove_temporary_first(source: str, target: str) -> None:
        if len(calls) in (0, 2):
            calls.append(source)
            storage.remove_temporary()
        calls.append(target)
        (link if target.endswith("created") else replace)(source, target)

    monkeypatch.setattr(os, "link", remove_temporary_first)
    monkeypatch.setattr(os, "replace", remove_temporary_first)
    assert storage.create("created", b"1")
    storage.replace("replaced", b"2")
    assert storage.read("created") == b"1"
    assert storage.read("replaced") == b"2"
    assert len(calls) > 2


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    umask = os.umask(0o022)
    try:
        storage.create("a", b"")
        storage.replace("b", b"")
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "b")} == {0o644}


@pytest.mark.parametrize("url", ["{}/runs", "file://{}/runs", "local://{}/runs"])
def test_local_storage_prints_as_a_path(tmp_path: Path, url: str) -> None:
    storage = Storage.open(url.format(tmp_path))
    assert storage.url == str(tmp_path / "runs")
    assert storage.local_path == tmp_path / "runs"
    assert not (tmp_path / "runs").exists(), "opening creates no folder"


def test_relative_and_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Storage.open("./runs").url == str(tmp_path / "runs")
    assert Storage.open("~/runs").url == str(tmp_path / "home" / "runs")


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    storage = Storage.open(str(tmp_path / "runs"))
    for action in (lambda: storage.create("a/b", b""), lambda: storage.replace("a/b", b""), lambda: storage.list()):
        with pytest.raises(StorageError, match="cannot be used"):
            action()


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that cannot be written, such as /sys")
def test_unwritable_folder(tmp_path: Path, backoff_pauses: list[float]) -> None:
    storage = Storage.open("/sys/trainyard")
    with pytest.raises(StorageError):
        storage.create("a", b"")
    assert backoff_pauses == []
