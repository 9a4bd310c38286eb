"""Errors in URLs, and how storage errors are reported, retried and given up."""

from __future__ import annotations

import pickle
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.errors import StorageError, StorageLostError
from pipeline.redaction import redact
from pipeline.storage import Storage
from pipeline.storage.local import LocalBackend
from pipeline.storage.retry import RetryPolicy, summarize_error


@pytest.fixture
def short_retry_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry limit of one second."""
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "1")


@pytest.fixture
def new_s3_client() -> Iterator[None]:
    """Clear fsspec's cache of clients, because other tests opened the same URLs at another endpoint."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "not a folder"),
        ("  ", "not a folder"),
        ("s3://", "has no bucket"),
        ("s3a:///", "has no bucket"),
        ("nosuch://x", "Protocol not known"),
        ("gs://bucket/x", "not installed"),
        ("simplecache::s3://bucket/x", "not a folder"),
        ("file://relative", "absolute"),
    ],
)
def test_unusable_url(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        Storage.open(url)
    assert caught.value.exit_code == 2
    assert caught.value.fix


def test_missing_library_names_the_extra() -> None:
    with pytest.raises(StorageError) as caught:
        Storage.open("abfs://container/x")
    assert caught.value.fix == "pip install 'trainyard[azure]'"


def test_a_missing_bucket_is_bad_input_at_once(s3_endpoint: str, backoff_pauses: list[float]) -> None:
    storage = Storage.open("s3://no-such-bucket/runs")
    actions: list[Callable[[], object]] = [
        lambda: storage.list(),
        lambda: storage.read("a"),
        lambda: storage.exists("a"),
        lambda: storage.replace("a", b""),
        lambda: storage.create("a", b""),
    ]
    for action in actions:
        with pytest.raises(StorageError, match="no such bucket"):
            action()
    assert backoff_pauses == []


def test_unreachable_endpoint_is_reported(
    short_retry_limit: None, new_s3_client: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-key")
    with pytest.raises(StorageError, match="no answer within 1 s") as caught:
        Storage.open("s3://bucket-away/runs").read("a")
    assert "a-very-secret-key" not in str(caught.value)


def test_missing_credentials_are_reported(
    short_retry_limit: None, new_s3_client: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="no permission"):
        Storage.open("s3://bucket-of-others/runs").replace("a", b"")


class FlakyBackend(LocalBackend):
    """Local files whose first requests fail, before or after they take effect."""

    def __init__(self, failures: int, error: Exception, *, after: bool = False) -> None:
        self.failures = failures
        self.error = error
        self.after = after
        self.tries = 0

    def _fail(self) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise self.error

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        if self.after:
            super().replace(path, data, temporary, sync)
        self._fail()
        if not self.after:
            super().replace(path, data, temporary, sync)

    def create(self, path: str, data: bytes, temporary: str) -> None:
        if self.after:
            super().create(path, data, temporary)
        self._fail()
        if not self.after:
            super().create(path, data, temporary)

    def read(self, path: str) -> bytes:
        return super().read(path)


class UnavailableError(Exception):
    """An error of a storage library that is not an OSError."""


UnavailableError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    "error", [OSError(5, "I/O error"), TimeoutError(), ConnectionResetError(), UnavailableError("503")]
)
def test_transient_fault_is_retried(tmp_path: Path, error: Exception) -> None:
    backend = FlakyBackend(2, error)
    Storage(backend, str(tmp_path), str(tmp_path)).replace("a", b"1")
    assert backend.tries == 3
    assert (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize("after", [False, True])
def test_create_after_a_failed_request_reports_the_winner(tmp_path: Path, after: bool) -> None:
    storage = Storage(FlakyBackend(1, TimeoutError(), after=after), str(tmp_path), str(tmp_path))
    assert storage.create("a", b"mine")
    storage = Storage(FlakyBackend(1, TimeoutError()), str(tmp_path), str(tmp_path))
    assert not storage.create("a", b"another")
    assert storage.read("a") == b"mine"


def test_unavailable_storage_raises_after_the_limit(tmp_path: Path, short_retry_limit: None) -> None:
    backend = FlakyBackend(10**9, TimeoutError("no reply"))
    storage = Storage(backend, str(tmp_path), "s3://bucket/runs")
    assert storage.list() == []
    started = time.monotonic()
    with pytest.raises(StorageLostError, match=r"1 s .TimeoutError: no reply") as caught:
        storage.replace("a", b"")
    assert time.monotonic() - started >= 1.0
    assert backend.tries >= 2
    assert caught.value.exit_code == 1
    assert caught.value.where == "s3://bucket/runs"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_shorter_limit_is_respected(tmp_path: Path) -> None:
    storage = Storage(FlakyBackend(10**9, TimeoutError()), str(tmp_path), str(tmp_path))
    storage.list()
    with pytest.raises(StorageLostError, match="was unavailable for 3 s"):
        storage.with_timeout(3.0).replace("a", b"")


def test_programming_errors_are_not_retried(tmp_path: Path) -> None:
    backend = FlakyBackend(10**9, AttributeError("a bug"))
    with pytest.raises(AttributeError, match="a bug"):
        Storage(backend, str(tmp_path), str(tmp_path)).replace("a", b"")
    assert backend.tries == 1


def test_invalid_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_STORAGE_LIMIT_S", "soon")
    with pytest.raises(StorageError, match="soon"):
        RetryPolicy("x")


class UnconditionalBackend(LocalBackend):
    """A store without conditional writes, where a second create of a name succeeds like the first."""

    def create(self, path: str, data: bytes, temporary: str) -> None:
        self.replace(path, data, temporary, sync=True)

    def has_conditional_writes(self, folder: str) -> bool:
        return False


def test_store_without_conditional_writes_is_reported(tmp_path: Path) -> None:
    storage = Storage(UnconditionalBackend(), str(tmp_path), str(tmp_path))
    assert not storage.has_conditional_writes()
    assert storage.create("a", b"1")
    assert storage.create("a", b"1")
    assert not storage.create("a", b"2")
    assert storage.read("a") == b"1"


def test_store_that_ignores_conditions_is_detected() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    from pipeline.storage.remote import RemoteBackend

    class IgnoringFileSystem(MemoryFileSystem):  # type: ignore[misc]
        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
            super().pipe_file(path, value, mode="overwrite")

    class RefusingFileSystem(MemoryFileSystem):  # type: ignore[misc]
        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
            if mode == "create":
                raise NotImplementedError
            super().pipe_file(path, value)

    for kind in (IgnoringFileSystem, RefusingFileSystem):
        fs = kind(global_store=False, skip_instance_cache=True)
        storage = Storage(RemoteBackend(fs, kind.__name__.lower()), "/x", "x://")
        assert not storage.has_conditional_writes()
        assert storage.list() == []
        assert storage.create("a", b"1")
        assert not storage.create("a", b"2")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("sftp://user:pass@host/x", "sftp://user:***@host/x"),
        ("https://host/x?X-Amz-Signature=abc&y", "https://host/x?***"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_urls_are_printed_without_secrets(text: str, clean: str) -> None:
    assert redact(f"see {text}") == f"see {clean}"


def test_secrets_of_the_environment_are_not_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert summarize_error(OSError("signed with wJalrXUtnFEMI\nand more")) == "OSError: signed with ***"


@pytest.fixture
def cut_off_s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Put a proxy in front of the S3 server, whose connections can be cut off; the environment points to the proxy."""
    target = s3_endpoint.rpartition("/")[2].rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    cut = threading.Event()
    connections: list[socket.socket] = []

    def forward(source: socket.socket, sink: socket.socket) -> None:
        try:
            while (data := source.recv(65536)) and not cut.is_set():
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if cut.is_set():
                client.close()
                continue
            server = socket.create_connection((target[0], int(target[2])))
            connections.extend((client, server))
            for ends in ((client, server), (server, client)):
                threading.Thread(target=forward, args=ends, daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")

    def set_cut(is_cut: bool) -> None:
        (cut.set if is_cut else cut.clear)()
        for connection in connections if is_cut else ():
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    yield set_cut
    set_cut(True)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_short_s3_outage_is_retried(cut_off_s3: Callable[[bool], None], s3_url: str, new_s3_client: None) -> None:
    storage = Storage.open(s3_url)
    assert storage.create("a", b"1")
    cut_off_s3(True)
    timer = threading.Timer(1.5, cut_off_s3, [False])
    timer.start()
    assert not storage.create("a", b"2")
    assert storage.create("b", b"3")
    timer.join()
    cut_off_s3(True)
    with pytest.raises(StorageLostError, match="was unavailable for 1 s"):
        storage.with_timeout(1.0).replace("c", b"")
    cut_off_s3(False)
    assert storage.list() == ["a", "b"]


def test_backoff_does_not_use_the_global_rng() -> None:
    errors = iter([ConnectionResetError("unavailable"), None])

    def fail_once() -> None:
        if error := next(errors):
            raise error

    before = random.getstate()
    RetryPolicy("here").call(fail_once)
    assert random.getstate() == before
