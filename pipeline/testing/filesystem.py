"""An fsspec file system that forwards every request to a wrapped store, and injects faults."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StorageError
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.local import LocalBackend
from pipeline.testing.faults import FAULTS_VARIABLE, FaultInjector, FaultKind, RequestGroup, get_injector

T = TypeVar("T")

SLOW_DOWN_MESSAGE = "Please reduce your request rate."
EXPIRED_MESSAGE = "The provided token has expired."
_LISTINGS: dict[tuple[str, str, str], Any] = {}
"""The last listing of each folder in this process, by settings, store and path."""


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """`faulty://STORE/PATH`: a wrapped store with faults. `open` counts as one request.

    Parameters
    ----------
    store: protocol of the wrapped store: s3, memory, file (with atomic writes, as in `pipeline.storage`), or any other
        protocol of fsspec.
    faults: settings, see `FaultSettings.parse`; for a URL, those in TRAINYARD_FAULTS.
    """

    protocol = "faulty"
    cachable = True

    def __init__(self, store: str = "", faults: str = "", **options: Any) -> None:
        super().__init__(**options)
        if not store or store == self.protocol:
            raise StorageError("the URL has no store", where="faulty://", fix="use faulty://s3/bucket/folder")
        self.store_protocol = store
        self.fs: Any = _AtomicLocalFileSystem() if store in ("file", "local") else open_filesystem(f"{store}://")[0]
        self._faults = faults
        get_injector(faults)  # invalid settings are an error here

    @property
    def injector(self) -> FaultInjector:
        """The current injector. fsspec caches file systems, and `inject_faults` may have made a new injector since."""
        return get_injector(self._faults)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        text = os.fspath(path)
        if not text.startswith("faulty://"):
            return text.rstrip("/")
        store, slash, rest = text.removeprefix("faulty://").partition("/")
        return (f"/{rest}" if store in ("file", "local", "memory") else rest).rstrip("/") if slash else ""

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        store = path.removeprefix("faulty://").partition("/")[0]
        return {"store": store, "faults": os.environ.get(FAULTS_VARIABLE, "")}

    def unstrip_protocol(self, name: str) -> str:
        return f"faulty://{self.store_protocol}/{str(name).lstrip('/')}"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data = self._run_request("read", lambda: self.fs.cat_file(path, start=start, end=end, **options))
        self._simulate_transfer(len(data))
        return bytes(data)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> Any:
        self._simulate_transfer(len(value))

        def write_half() -> None:
            if mode != "create":
                self.fs.pipe_file(path, value[: len(value) // 2], mode=mode, **options)

        return self._run_request(
            "write", lambda: self.fs.pipe_file(path, value, mode=mode, **options), write_half=write_half
        )

    def call_s3(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the S3 API, if the wrapped store is S3."""
        body = options.get("Body", b"")
        self._simulate_transfer(len(body))

        def write_half() -> None:
            if body:
                self.fs.call_s3(method, *args, **{**options, "Body": body[: len(body) // 2]})

        group: RequestGroup = (
            "read" if method.startswith(("get", "head")) else "list" if method.startswith("list") else "write"
        )
        return self._run_request(group, lambda: self.fs.call_s3(method, *args, **options), write_half=write_half)

    def split_path(self, path: str) -> Any:
        """Return the bucket, key and version of an S3 path."""
        return self.fs.split_path(path)

    def connect(self, **options: Any) -> None:
        """Connect with new credentials."""
        self.injector.renew_credentials()
        if hasattr(self.fs, "connect"):
            self.fs.connect(**options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._run_request(
            "list", lambda: self.fs.ls(path, detail=detail, **options), listing_key=f"{path} {detail}"
        )

    def info(self, path: str, **options: Any) -> Any:
        return self._run_request("read", lambda: self.fs.info(path, **options))

    def find(self, path: str, *args: Any, **options: Any) -> Any:
        return self._run_request("list", lambda: self.fs.find(path, *args, **options))

    def rm_file(self, path: str) -> None:
        self._run_request("delete", lambda: self.fs.rm_file(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._run_request("delete", lambda: self.fs.rm(path, recursive=recursive, maxdepth=maxdepth))

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        self._run_request("write", lambda: self.fs.mkdir(path, create_parents=create_parents, **options))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._run_request("write", lambda: self.fs.makedirs(path, exist_ok=exist_ok))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        group: RequestGroup = "read" if "r" in mode else "write"
        return self._run_request(group, lambda: self.fs.open(self._strip_protocol(path), mode, **options))

    def invalidate_cache(self, path: str | None = None) -> None:
        self.fs.invalidate_cache(path)

    def _run_request(
        self,
        group: RequestGroup,
        request: Callable[[], T],
        *,
        write_half: Callable[[], None] | None = None,
        listing_key: str = "",
    ) -> T:
        """Make a request, with the fault that the injector returns for it."""
        if group in self.injector.faults.on:
            time.sleep(self.injector.faults.delay_s)
        kind = self.injector.next_fault(group)
        cache_key = (self._faults, self.store_protocol, listing_key)
        if kind == "stale" and listing_key:
            if cache_key in _LISTINGS:
                stale: T = _LISTINGS[cache_key]
                return stale
            kind = None
        if kind is None or kind == "stale":
            answer = request()
            if listing_key:
                _LISTINGS[cache_key] = answer
            return answer
        if kind == "truncated" and write_half is not None:
            write_half()
        if kind == "lost":
            request()
        raise _make_error(kind)

    def _simulate_transfer(self, num_bytes: int) -> None:
        """Sleep for as long as the transfer takes with the configured bandwidth."""
        time.sleep(num_bytes / self.injector.faults.bytes_per_s)


class InjectedS3Error(Exception):
    """An error as of S3's own library, used as the cause of another error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.response = {"Error": {"Code": code, "Message": message}}


def _make_error(kind: FaultKind) -> OSError:
    """Return the error that s3fs would raise."""
    if kind == "lost":
        return TimeoutError(errno.ETIMEDOUT, "injected: no reply")
    if kind not in ("slow_down", "expired"):
        return ConnectionResetError(errno.ECONNRESET, "injected: the connection broke")
    code, text = ("SlowDown", SLOW_DOWN_MESSAGE) if kind == "slow_down" else ("ExpiredToken", EXPIRED_MESSAGE)
    error = OSError(errno.EBUSY, f"injected: {text}") if kind == "slow_down" else PermissionError(f"injected: {text}")
    error.__cause__ = InjectedS3Error(code, text)
    return error


class _AtomicLocalFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Local files, written as in `pipeline.storage`, because fsspec's local "create" is not exclusive."""

    cachable = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        local_path = self._strip_protocol(path)
        temporary = os.path.join(os.path.dirname(local_path), ".tmp")
        if mode == "create":
            LocalBackend().create(local_path, value, temporary)
        else:
            LocalBackend().replace(local_path, value, temporary, sync=False)
