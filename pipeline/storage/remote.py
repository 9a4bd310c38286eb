"""Storage in anything that fsspec reaches: object stores above all."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

_MEMORY_LOCK = threading.RLock()
"""fsspec's memory file system is a plain dictionary: two threads of one process need a lock."""
_CONDITIONAL: dict[tuple[str, str], bool] = {}
"""What was found out of each store in this process, by protocol and bucket."""
_NO_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist|ContainerNotFound")


class RemoteBackend:
    """One fsspec file system.

    Parameters
    ----------
    fs: the file system, its listings not cached.
    protocol: such as "s3".
    """

    def __init__(self, fs: Any, protocol: str) -> None:
        self.fs = fs
        self.protocol = protocol
        self.far = protocol != "memory"

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Around every request: a missing bucket is no missing name, for a person must make it.

        Raises
        ------
        ValueError: there is no such bucket.
        """
        lock: AbstractContextManager[Any] = _MEMORY_LOCK if self.protocol == "memory" else nullcontext()
        try:
            with lock:
                yield
        except FileNotFoundError as error:
            if _NO_BUCKET.search(f"{error} {error.__cause__}"):
                raise ValueError("there is no such bucket") from None
            raise

    def read(self, path: str) -> bytes:
        with self._request():
            return bytes(self.fs.cat_file(path))

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        with self._request():
            self._put(path, data)

    def create(self, path: str, data: bytes, temporary: str) -> None:
        with self._request():
            self._put(path, data, mode="create")

    def list(self, path: str) -> list[str]:
        with self._request():
            self.fs.invalidate_cache()
            children = self.fs.ls(path, detail=False)
        prefix = f"{path.strip('/')}/".lstrip("/")
        names = (str(child).strip("/") for child in children)
        return [name[len(prefix) :] for name in names if name.startswith(prefix)]

    def exists(self, path: str) -> bool:
        with self._request():
            self.fs.invalidate_cache()
            try:
                self.fs.info(path)
            except FileNotFoundError as error:
                if _NO_BUCKET.search(f"{error} {error.__cause__}"):
                    raise
                return False
        return True

    def delete(self, path: str) -> None:
        with self._request():
            self.fs.rm_file(path)

    def delete_folder(self, path: str) -> None:
        with self._request():
            self.fs.invalidate_cache()
            for file in self.fs.find(path):
                with suppress(FileNotFoundError):
                    self.fs.rm_file(file)
            if self.protocol == "memory":  # object stores have no folders to remove
                with suppress(FileNotFoundError):
                    self.fs.rm(path, recursive=True)

    def sweep(self, temporary: str) -> None:
        return

    def conditional_writes(self, folder: str) -> bool:
        store = (self.protocol, folder.strip("/").partition("/")[0])
        if store not in _CONDITIONAL:
            _CONDITIONAL[store] = self._excludes(f"{folder.rstrip('/')}/.probe-{secrets.token_hex(8)}")
        return _CONDITIONAL[store]

    def _excludes(self, path: str) -> bool:
        """Create a random key twice; a store that lets the second pass does not exclude."""
        try:
            with self._request():
                self._put(path, b"first", mode="create")
                try:
                    self._put(path, b"second", mode="create")
                except FileExistsError:
                    return True
                return False
        except (NotImplementedError, TypeError):  # the library cannot even ask for it
            return False
        finally:
            with suppress(FileNotFoundError):
                self.fs.rm_file(path)

    def _put(self, path: str, data: bytes, **mode: str) -> None:
        try:
            self.fs.pipe_file(path, data, **mode)
        except FileNotFoundError as error:
            if _NO_BUCKET.search(f"{error} {error.__cause__}"):
                raise
            # File systems with real folders (sftp, smb) want them made first.
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                self.fs.pipe_file(path, data, **mode)
            except FileNotFoundError as again:  # no answer to a write
                raise ValueError(f"nothing can be written there ({again})") from again
