"""`Storage`: all reads and writes of runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StorageError, TrainyardError
from pipeline.redaction import redact
from pipeline.storage.backend import Backend, Upload
from pipeline.storage.filesystems import PROTOCOL_EXTRAS, open_filesystem
from pipeline.storage.local import LocalBackend
from pipeline.storage.retry import RetryPolicy
from pipeline.watchdog import blocking_on

S = TypeVar("S")
T = TypeVar("T")

TEMPORARY_FOLDER = ".tmp"
"""Folder of unfinished files, never listed. Each run has its own, so that a run may be a separate mount."""
MAX_CONCURRENT_REQUESTS = 32
MAX_CONCURRENT_PARTS = 4
ABORT_LIMIT_S = 1.0
"""How long to try to abort an upload. Stores are configured to remove aborted parts."""


class Storage:
    """A folder, local or of any fsspec file system. Paths are relative to it and "/"-separated.

    Every method retries transient errors up to a time limit (see `pipeline.storage.retry`).

    Raises
    ------
    StorageError: a path, URL, bucket or permission that the user must correct.
    StorageLostError: storage was unavailable for longer than the limit.
    """

    def __init__(self, backend: Backend, root: str, url: str, *, open_url: str = "") -> None:
        self.backend = backend
        self.url = redact(url)
        self._root = root.rstrip("/")
        self._opened_root = self._root
        self._temporary = f"{self._root}/{TEMPORARY_FOLDER}"
        self._retry_policy = RetryPolicy(self.url)
        self._limit_s: float | None = None
        self._open_url = open_url

    @classmethod
    def open(cls, url: str) -> Storage:
        """Open a folder by URL: "./runs", "file:///x", "memory://x", "s3://bucket/x". No server is contacted yet.

        Raises
        ------
        StorageError: an invalid URL, an unknown protocol, or one whose library is not installed.
        """
        protocol, separator, rest = url.partition("://")
        if not url.strip() or "\0" in url or "::" in url:
            raise StorageError(f"{url!r} is not a folder", where="storage", fix="use a folder, or s3://bucket/folder")
        if not separator or protocol in ("file", "local"):
            path = rest if separator else url
            if separator and not path.startswith("/"):
                raise StorageError(f"{url!r} is not an absolute path", where="storage", fix="use file:///folder")
            root = os.path.abspath(os.path.expanduser(path))
            return cls(LocalBackend(root), root, root, open_url=root)
        return cls._open_remote(url, protocol, rest)

    @classmethod
    def _open_remote(cls, url: str, protocol: str, path: str) -> Storage:
        from pipeline.storage.remote import RemoteBackend

        fs, root = open_filesystem(url)
        protocol = getattr(fs, "store_protocol", protocol)  # that of the wrapped file system, if it wraps one
        if protocol in PROTOCOL_EXTRAS and not root.strip("/"):
            raise StorageError("the URL has no bucket", where=redact(url), fix=f"use {protocol}://bucket/folder")
        return cls(RemoteBackend(fs, protocol), root, url.rstrip("/") if path else url, open_url=url)

    def __reduce__(self) -> tuple[object, ...]:
        state = (self.url, self._root, self._opened_root, self._temporary, self._limit_s)
        return _reopen, (self._open_url, *state)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def open_url(self) -> str:
        """The argument of `open` (a local path is absolute). It may contain a password: pass it to `open` only."""
        return self._open_url

    @property
    def local_path(self) -> Path | None:
        """The folder as a local path; None if it is remote."""
        return Path(self._root) if isinstance(self.backend, LocalBackend) else None

    @property
    def response_count(self) -> int:
        """Number of successful calls so far, without heartbeats and other calls with a shorter limit."""
        return self._retry_policy.response_count

    def subfolder(self, path: str, *, own_temporary_folder: bool = False) -> Storage:
        """Return a folder in this one.

        Parameters
        ----------
        own_temporary_folder: whether its unfinished files are stored in it, not in the folder that was opened.
        """
        inner = self._copy()
        inner._root = self._resolve_path(path)
        inner.url = f"{self.url.rstrip('/')}/{path}"
        if own_temporary_folder:
            inner._temporary = f"{inner._root}/{TEMPORARY_FOLDER}"
        return inner

    def with_timeout(self, limit_s: float) -> Storage:
        """Return the same folder with a shorter time limit for retries."""
        inner = self._copy()
        inner._limit_s = limit_s
        return inner

    def read(self, path: str) -> bytes:
        """Return the whole content of a file, never from a cache.

        Raises
        ------
        FileNotFoundError: there is no such file.
        """
        where = self._resolve_path(path)
        return self._call(lambda: self.backend.read(where))

    def replace(self, path: str, data: bytes, *, sync: bool = False) -> None:
        """Write `data` to `path` in one step: readers get the old or the new content. `sync`: survives a power loss."""
        where = self._resolve_path(path)
        self._call(lambda: self._replace(where, data, sync))

    def _replace(self, full_path: str, data: bytes, sync: bool) -> None:
        upload = self.backend.upload(full_path, len(data))
        if upload is None:
            self.backend.replace(full_path, data, self._temporary, sync)
        else:
            self._upload_parts(upload, full_path, data)

    def _upload_parts(self, upload: Upload, full_path: str, data: bytes) -> None:
        """Send the parts concurrently. Only a part that fails is sent again."""
        size = upload.part_bytes

        def send(start: int) -> str:
            return self._call(lambda: upload.put(start // size + 1, data[start : start + size]))

        try:
            tags = self.map_concurrent(send, range(0, len(data), size), max_concurrent=MAX_CONCURRENT_PARTS)
            self._call(lambda: upload.complete(tags))
        except FileNotFoundError:
            # It was completed and the reply was lost, or the store dropped it. Either way a new upload is safe.
            raise BlockingIOError(f"the upload of {full_path} no longer exists") from None
        except BaseException:
            with suppress(TrainyardError, FileNotFoundError):
                self._retry_policy.call(upload.abort, ABORT_LIMIT_S)
            raise

    def create(self, path: str, data: bytes) -> bool:
        """Write `data` to `path` if it does not exist, whole and durable: of several concurrent calls, one succeeds.

        `data` must contain a nonce, because after an error the content decides which call succeeded. Paths must never
        be deleted.

        Returns
        -------
        True if the content of `path` is `data`.
        """
        where = self._resolve_path(path)
        excludes = self.has_conditional_writes()
        return self._call(lambda: self._create(where, data, excludes))

    def _create(self, full_path: str, data: bytes, is_exclusive: bool) -> bool:
        failure: Exception | None = None
        try:
            if is_exclusive:
                self.backend.create(full_path, data, self._temporary)
                return True
            if not self.backend.exists(full_path):  # the closest that such a store allows
                self.backend.replace(full_path, data, self._temporary, sync=True)
        except Exception as error:
            failure = error  # perhaps only the reply was lost, so the stored content decides
        try:
            return self.backend.read(full_path) == data
        except FileNotFoundError:
            if failure is not None and not isinstance(failure, FileExistsError):
                raise failure from None
            raise BlockingIOError(f"{full_path} exists, but cannot be read") from failure

    def list(self, path: str = "") -> list[str]:
        """Return the sorted names of the files and folders in a folder, never from a cache; [] if it is absent."""
        where = self._resolve_path(path) if path else self._root
        try:
            names = self._call(lambda: self.backend.list(where))
        except FileNotFoundError:
            return []
        return sorted({name for name in names if name and name != TEMPORARY_FOLDER})

    def exists(self, path: str) -> bool:
        """Return whether there is a file or a folder."""
        where = self._resolve_path(path)
        return self._call(lambda: self.backend.exists(where))

    def delete(self, path: str) -> None:
        """Remove a file, if it exists."""
        where = self._resolve_path(path)
        with suppress(FileNotFoundError):
            self._call(lambda: self.backend.delete(where))

    def delete_folder(self, path: str) -> None:
        """Remove a folder with all its content, in no particular order, if it exists."""
        where = self._resolve_path(path)
        with suppress(FileNotFoundError):
            self._call(lambda: self.backend.delete_folder(where))

    def remove_temporary(self) -> None:
        """Remove unfinished files of killed writers. A live writer whose file is removed writes it again."""
        self._call(lambda: self.backend.remove_temporary(self._temporary))

    def has_conditional_writes(self) -> bool:
        """Return whether `create` is exclusive. The trial happens once per store and process."""
        return self._call(lambda: self.backend.has_conditional_writes(self._opened_root))

    def map_concurrent(
        self, action: Callable[[S], T], items: Iterable[S], *, max_concurrent: int = MAX_CONCURRENT_REQUESTS
    ) -> Sequence[T]:
        """Return the results of `action` for all items, in order; computed concurrently on remote storage."""
        pending = list(items)
        if not self.backend.is_remote or len(pending) < 2:
            return [action(item) for item in pending]
        with ThreadPoolExecutor(min(max_concurrent, len(pending))) as pool:
            return list(pool.map(action, pending))

    @blocking_on("storage")
    def _call(self, action: Callable[[], T]) -> T:
        return self._retry_policy.call(action, self._limit_s, self.backend.renew_credentials)

    def _copy(self) -> Storage:
        inner = Storage.__new__(Storage)
        inner.__dict__.update(self.__dict__)
        return inner

    def _resolve_path(self, path: str) -> str:
        parts = path.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise StorageError(f"{path!r} is not a path inside the folder", where=self.url, fix="use plain names")
        return f"{self._root}/{path}"


def _reopen(open_url: str, url: str, root: str, opened_root: str, temporary: str, limit_s: float | None) -> Storage:
    storage = Storage.open(open_url)
    storage.url, storage._root, storage._opened_root = url, root, opened_root
    storage._temporary, storage._limit_s = temporary, limit_s
    return storage
