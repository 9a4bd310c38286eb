"""The file system that fails on purpose: what each fault does and when it happens, and how `Storage` copes with it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, StorageError, StorageLostError
from pipeline.storage import Storage
from pipeline.testing import FaultSettings, FaultyFileSystem, inject_faults
from pipeline.testing.faults import FAULT_KINDS, REQUEST_GROUPS, FaultInjector


@pytest.fixture
def url() -> str:
    """A folder in memory, with faults."""
    return f"faulty://memory/{uuid.uuid4().hex}"


def open_filesystem(url: str) -> tuple[Any, str]:
    fs, path = fsspec.core.url_to_fs(url)
    return fs, path


def test_no_faults_match_the_wrapped_store(url: str) -> None:
    fs, path = open_filesystem(url)
    fs.pipe_file(f"{path}/a", b"1")
    with fs.open(f"{path}/b", "wb") as file:
        file.write(b"22")
    wrapped = fsspec.filesystem("memory")
    assert wrapped.cat_file(f"{path}/a") == b"1"
    assert sorted(name.rpartition("/")[2] for name in fs.ls(path, detail=False)) == ["a", "b"]
    assert fs.info(f"{path}/b")["size"] == 2
    assert fsspec.open(f"{url}/b").open().read() == b"22"
    fs.rm(path, recursive=True)
    assert not wrapped.exists(path)


def test_another_process_opens_it_by_url(tmp_path: Path) -> None:
    code = (
        "import sys, fsspec; fs, path = fsspec.core.url_to_fs(sys.argv[1]);"
        "fs.pipe_file(path, b'1'); print(fs.injector.faults.at)"
    )
    with inject_faults("error@7"):
        command = [sys.executable, "-c", code, f"faulty://file{tmp_path}/a"]
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert completed.stdout == "{7: 'error'}\n"
    assert (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("kind", "error", "content"),
    [
        ("error", ConnectionResetError, None),
        ("lost", TimeoutError, b"0123456789"),
        ("slow_down", OSError, None),
        ("truncated", ConnectionResetError, b"01234"),
        ("expired", PermissionError, None),
    ],
)
def test_failed_write_outcomes(url: str, kind: str, error: type[Exception], content: bytes | None) -> None:
    with inject_faults(f"{kind}@1") as injector:
        fs, path = open_filesystem(url)
        with pytest.raises(error, match="injected"):
            fs.pipe_file(path, b"0123456789")
        assert injector.counts == {kind: 1}
        assert (fs.cat_file(path) if fs.exists(path) else None) == content


def test_exclusive_write_is_never_partial(url: str) -> None:
    with inject_faults("truncated@1"):
        fs, path = open_filesystem(url)
        with pytest.raises(ConnectionResetError):
            fs.pipe_file(path, b"0123456789", mode="create")
        assert not fs.exists(path)


def test_stale_listing_repeats_the_last_listing(url: str) -> None:
    with inject_faults("stale@2 on=list"):
        fs, path = open_filesystem(url)
        fs.pipe_file(f"{path}/a", b"")
        assert len(fs.ls(path)) == 1
        fs.pipe_file(f"{path}/b", b"")
        assert len(fs.ls(path)) == 1
        assert len(fs.ls(path)) == 2


def test_slow_connection_takes_time(url: str) -> None:
    with inject_faults("delay_s=0.05 bytes_per_s=1e6"):
        fs, path = open_filesystem(url)
        began = time.monotonic()
        fs.pipe_file(path, b"x" * 100_000)
        assert time.monotonic() - began >= 0.15


def test_credentials_expire_and_are_renewed(url: str) -> None:
    with inject_faults("expires_after=2 renewals=1"):
        fs, path = open_filesystem(url)
        for _ in range(2):
            fs.pipe_file(path, b"")
        for _ in range(2):
            with pytest.raises(PermissionError, match="expired"):
                fs.pipe_file(path, b"")
        fs.connect(refresh=True)
        for _ in range(2):
            fs.pipe_file(path, b"")
        fs.connect(refresh=True)
        with pytest.raises(PermissionError, match="expired"):
            fs.pipe_file(path, b"")


def test_only_selected_groups_of_requests_fail(url: str) -> None:
    with inject_faults("error=1 on=delete") as injector:
        fs, path = open_filesystem(url)
        fs.pipe_file(path, b"1")
        assert fs.cat_file(path) == b"1"
        with pytest.raises(ConnectionResetError):
            fs.rm_file(path)
        assert injector.request_count == 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.dictionaries(st.sampled_from(FAULT_KINDS), st.floats(0, 0.15), max_size=6))
def test_the_same_seed_gives_the_same_faults(seed: int, rates: dict[Any, float]) -> None:
    first, second = (FaultInjector(FaultSettings(seed=seed, rates=rates)) for _ in range(2))
    for number in range(60):
        assert first.next_fault(REQUEST_GROUPS[number % 4]) == second.next_fault(REQUEST_GROUPS[number % 4])


def test_fault_rates() -> None:
    injector = FaultInjector(FaultSettings(seed=1, rates={"error": 0.05, "lost": 0.1}))
    for _ in range(20_000):
        injector.next_fault("read")
    assert injector.counts["error"] == pytest.approx(1000, rel=0.15)
    assert injector.counts["lost"] == pytest.approx(2000, rel=0.15)


def test_parse_fault_settings() -> None:
    read = FaultSettings.parse(
        "seed=7 error=0.05 lost@3 slow_down@12 on=write,list delay_s=0.1 expires_after=9 renewals=2"
    )
    assert read == FaultSettings(
        seed=7,
        rates={"error": 0.05},
        at={3: "lost", 12: "slow_down"},
        on=frozenset({"write", "list"}),
        delay_s=0.1,
        expires_after=9,
        renewals=2,
    )
    assert FaultSettings.parse("") == FaultSettings()


@pytest.mark.parametrize(
    "text",
    ["errors=0.1", "error", "error=often", "error@0", "error@x", "error=0.6 lost=0.6", "error=-1", "on=writes",
     "seed=x", "delay_s=-1", "bytes_per_s=0", "renewals=-1", "0.05"],
)  # fmt: skip
def test_invalid_fault_settings(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        FaultSettings.parse(text)
    assert "TRAINYARD_FAULTS" in str(caught.value)
    monkeypatch.setenv("TRAINYARD_FAULTS", text)
    with pytest.raises(InputError, match="TRAINYARD_FAULTS"):
        Storage.open("faulty://memory/x")


@pytest.mark.parametrize("url", ["faulty://", "faulty://nosuch/x", "faulty://faulty/x", "faulty://s3", "faulty://s3/"])
def test_url_without_a_store(url: str) -> None:
    with pytest.raises(StorageError):
        Storage.open(url)


@pytest.mark.parametrize("store", ["memory", "file", "s3"])
def test_storage_survives_every_fault(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every operation, with one request in six going wrong."""
    if store == "s3":
        storage_url = request.getfixturevalue("s3_url").replace("s3://", "faulty://s3/")
    else:
        storage_url = f"faulty://{store}{tmp_path if store == 'file' else f'/{uuid.uuid4().hex}'}"
    settings = "seed=3 error=0.06 lost=0.06 slow_down=0.005 truncated=0.04 expired=0.01"
    with inject_faults(settings) as injector:
        storage = Storage.open(storage_url)
        storage.list()  # a first response, after which failing credentials count as expired
        assert storage.has_conditional_writes()
        for number in range(8):
            assert storage.create(f"run/{number}", f"own {number}".encode())
            assert not storage.create(f"run/{number}", b"another's")
            storage.replace("run/replaced", f"{number}".encode() * 50)
            assert storage.read("run/replaced") == f"{number}".encode() * 50
        assert storage.list("run") == sorted([*map(str, range(8)), "replaced"])
        storage.delete("run/0")
        assert not storage.exists("run/0")
        storage.delete_folder("run")
        assert storage.list("run") == []
        assert injector.counts.total() > 5


def test_expired_credentials_are_renewed(s3_url: str) -> None:
    with inject_faults("expires_after=5") as injector:
        storage = Storage.open(s3_url.replace("s3://", "faulty://s3/"))
        for number in range(12):
            storage.replace("a", str(number).encode())
        assert storage.read("a") == b"11"
        assert injector.counts["expired"] >= 2


def test_credentials_that_are_never_renewed_are_reported(s3_url: str) -> None:
    with inject_faults("expires_after=2 renewals=0"):
        storage = Storage.open(s3_url.replace("s3://", "faulty://s3/"))
        storage.replace("a", b"1")
        assert storage.list() == ["a"]
        with pytest.raises(StorageLostError, match="credentials have expired") as caught:
            storage.with_timeout(0.5).list()
    assert "renew the credentials" in caught.value.fix
    assert caught.value.exit_code == 1


def test_invalid_credentials_are_bad_input(s3_url: str, backoff_pauses: list[float]) -> None:
    with inject_faults("expired=1"), pytest.raises(StorageError, match=r"no permission .*expired"):
        Storage.open(s3_url.replace("s3://", "faulty://s3/")).list()
    assert backoff_pauses == []


def test_missing_permission_is_not_transient(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(s3_url)
    storage.replace("a", b"1")
    denied = PermissionError("Access Denied")
    denied.__cause__ = S3ResponseError("AccessDenied")
    monkeypatch.setattr(storage.backend, "read", lambda path: _raise(denied))
    with pytest.raises(StorageError, match="no permission"):
        storage.read("a")


def test_slow_down_response_backs_off(url: str, backoff_pauses: list[float]) -> None:
    with inject_faults("slow_down@1 on=write"):
        Storage.open(url).replace("a", b"1")
    (pause,) = backoff_pauses
    assert 0.5 <= pause <= 1.0


class S3ResponseError(Exception):
    """An error of S3, as the cause of another error."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


def _raise(error: Exception) -> None:
    raise error


def test_s3_session_is_renewed(s3_url: str) -> None:
    """s3fs starts a new session with its credentials, and requests still work."""
    storage = Storage.open(s3_url)
    storage.replace("a", b"1")
    storage.backend.renew_credentials()
    assert storage.read("a") == b"1"


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_FAULTS", "seed=5")
    with inject_faults("seed=6"):
        assert os.environ["TRAINYARD_FAULTS"] == "seed=6"
    assert os.environ["TRAINYARD_FAULTS"] == "seed=5"


def test_file_system_with_explicit_faults() -> None:
    with inject_faults("error@1 seed=7") as injector, pytest.raises(ConnectionResetError) as caught:
        FaultyFileSystem(store="memory", faults="error@1 seed=7").pipe_file(f"/{uuid.uuid4().hex}", b"")
    assert caught.value.errno == errno.ECONNRESET
    assert injector.request_count == 1
