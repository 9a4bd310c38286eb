"""The one door to storage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StorageError, TrainyardError
from pipeline.storage.backend import Backend, Upload
from pipeline.storage.filesystems import PROTOCOL_EXTRAS, open_filesystem
from pipeline.storage.local import LocalBackend
from pipeline.storage.retry import RetryPolicy, redact
from pipeline.watchdog import blocking_on

S = TypeVar("S")
T = TypeVar("T")

TEMPORARY_FOLDER = ".tmp"
"""Folder of unfinished files, never listed. Each run has its own, so that it may be a mount of its own."""
MAX_CONCURRENT_REQUESTS = 32
MAX_CONCURRENT_PARTS = 4
ABORT_LIMIT_S = 1.0
"""How long giving an upload up may take; stores are set up to forget what is left."""


class Storage:
    """A folder, local or of any fsspec file system. Paths are relative to it and "/"-separated.

    Passing faults are repeated until they have lasted for a limit (see `pipeline.storage.retry`), in every method:

    Raises
    ------
    StorageError: a path, URL, bucket or permission that a person must put right.
    StorageLostError: storage stayed away for longer than the limit.
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
        """A folder by URL: "./runs", "file:///x", "memory://x", "s3://bucket/x". Nothing is contacted yet.

        Raises
        ------
        StorageError: no URL, an unknown protocol, or one whose library is not installed.
        """
        protocol, separator, rest = url.partition("://")
        if not url.strip() or "\0" in url or "::" in url:
            raise StorageError(f"{url!r} is no folder", where="storage", fix="use a folder, or s3://bucket/folder")
        if not separator or protocol in ("file", "local"):
            path = rest if separator else url
            if separator and not path.startswith("/"):
                raise StorageError(f"{url!r} names no absolute folder", where="storage", fix="use file:///folder")
            root = os.path.abspath(os.path.expanduser(path))
            return cls(LocalBackend(root), root, root, open_url=root)
        return cls._open_remote(url, protocol, rest)

    @classmethod
    def _open_remote(cls, url: str, protocol: str, path: str) -> Storage:
        from pipeline.storage.remote import RemoteBackend

        fs, root = open_filesystem(url)
        protocol = getattr(fs, "store_protocol", protocol)  # of what lies beneath a file system that wraps another
        if protocol in PROTOCOL_EXTRAS and not root.strip("/"):
            raise StorageError("the URL names no bucket", where=redact(url), fix=f"use {protocol}://bucket/folder")
        return cls(RemoteBackend(fs, protocol), root, url.rstrip("/") if path else url, open_url=url)

    def __reduce__(self) -> tuple[object, ...]:
        state = (self.url, self._root, self._opened_root, self._temporary, self._limit_s)
        return _reopen, (self._open_url, *state)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def open_url(self) -> str:
        """What `open` was given (a local path from the root). It may hold a password: for no eye but `open`'s."""
        return self._open_url

    @property
    def local_path(self) -> Path | None:
        """The folder as a path of this machine, where it is one."""
        return Path(self._root) if isinstance(self.backend, LocalBackend) else None

    @property
    def response_count(self) -> int:
        """How often it has answered so far, heartbeats and other calls with a shorter limit aside."""
        return self._retry_policy.response_count

    def subfolder(self, path: str, *, own_temporary_folder: bool = False) -> Storage:
        """A folder in this one. `own_temporaries`: unfinished files lie there, not further up."""
        inner = self._copy()
        inner._root = self._resolve_path(path)
        inner.url = f"{self.url.rstrip('/')}/{path}"
        if own_temporary_folder:
            inner._temporary = f"{inner._root}/{TEMPORARY_FOLDER}"
        return inner

    def with_timeout(self, limit_s: float) -> Storage:
        """The same folder, with a shorter limit for faults."""
        inner = self._copy()
        inner._limit_s = limit_s
        return inner

    def read(self, path: str) -> bytes:
        """The whole content of a file, never from a cache.

        Raises
        ------
        FileNotFoundError: there is none.
        """
        where = self._resolve_path(path)
        return self._call(lambda: self.backend.read(where))

    def replace(self, path: str, data: bytes, *, sync: bool = False) -> None:
        """Put `data` at `path` in one step: readers see the old content or the new. `sync`: survives a power loss."""
        where = self._resolve_path(path)
        self._call(lambda: self._replace(where, data, sync))

    def _replace(self, full_path: str, data: bytes, sync: bool) -> None:
        upload = self.backend.upload(full_path, len(data))
        if upload is None:
            self.backend.replace(full_path, data, self._temporary, sync)
        else:
            self._upload_parts(upload, full_path, data)

    def _upload_parts(self, upload: Upload, full_path: str, data: bytes) -> None:
        """Send the parts, several at once; a fault repeats only its own."""
        size = upload.part_bytes

        def send(start: int) -> str:
            return self._call(lambda: upload.put(start // size + 1, data[start : start + size]))

        try:
            tags = self.map_concurrent(send, range(0, len(data), size), max_concurrent=MAX_CONCURRENT_PARTS)
            self._call(lambda: upload.complete(tags))
        except FileNotFoundError:
            # It was completed and only the reply got lost, or the store gave it up: the whole once more is safe.
            raise BlockingIOError(f"the upload of {full_path} is gone") from None
        except BaseException:
            with suppress(TrainyardError, FileNotFoundError):
                self._retry_policy.call(upload.abort, ABORT_LIMIT_S)
            raise

    def create(self, path: str, data: bytes) -> bool:
        """Put `data` at `path` if nothing is there, whole and durable: of several who try, one wins.

        `data` must hold a nonce, for after an error the content tells who won; names must never be deleted.

        Returns
        -------
        True if the content of `path` is this.
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
            if not self.backend.exists(full_path):  # the most that such a store allows
                self.backend.replace(full_path, data, self._temporary, sync=True)
        except Exception as error:
            failure = error  # perhaps only the reply was lost: what lies there decides
        try:
            return self.backend.read(full_path) == data
        except FileNotFoundError:
            if failure is not None and not isinstance(failure, FileExistsError):
                raise failure from None
            raise BlockingIOError(f"{full_path} is there and is not") from failure

    def list(self, path: str = "") -> list[str]:
        """Names of the files and folders in a folder, sorted, never from a cache; [] where there is none."""
        where = self._resolve_path(path) if path else self._root
        try:
            names = self._call(lambda: self.backend.list(where))
        except FileNotFoundError:
            return []
        return sorted({name for name in names if name and name != TEMPORARY_FOLDER})

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder."""
        where = self._resolve_path(path)
        return self._call(lambda: self.backend.exists(where))

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is fine."""
        where = self._resolve_path(path)
        with suppress(FileNotFoundError):
            self._call(lambda: self.backend.delete(where))

    def delete_folder(self, path: str) -> None:
        """Remove a folder and all in it, in no particular order; one that is not there is fine."""
        where = self._resolve_path(path)
        with suppress(FileNotFoundError):
            self._call(lambda: self.backend.delete_folder(where))

    def remove_temporary(self) -> None:
        """Remove unfinished files that killed writers left; a live writer that loses one writes it again."""
        self._call(lambda: self.backend.remove_temporary(self._temporary))

    def has_conditional_writes(self) -> bool:
        """Whether `create` is exclusive here, tried out once per store and process."""
        return self._call(lambda: self.backend.has_conditional_writes(self._opened_root))

    def map_concurrent(
        self, action: Callable[[S], T], items: Iterable[S], *, max_concurrent: int = MAX_CONCURRENT_REQUESTS
    ) -> Sequence[T]:
        """`action` of every item, in order; several at once where storage is far away."""
        todo = list(items)
        if not self.backend.is_remote or len(todo) < 2:
            return [action(item) for item in todo]
        with ThreadPoolExecutor(min(max_concurrent, len(todo))) as pool:
            return list(pool.map(action, todo))

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
            raise StorageError(f"{path!r} is no path inside the folder", where=self.url, fix="use plain names")
        return f"{self._root}/{path}"


def _reopen(open_url: str, url: str, root: str, opened_root: str, temporary: str, limit_s: float | None) -> Storage:
    storage = Storage.open(open_url)
    storage.url, storage._root, storage._opened_root = url, root, opened_root
    storage._temporary, storage._limit_s = temporary, limit_s
    return storage
