"""Files of any fsspec URL: listed, and read from any thread and any forked process."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from pipeline.device import available_cpus
from pipeline.errors import DataError
from pipeline.storage.faults import Patience, scrub
from pipeline.storage.filesystems import open_filesystem

T = TypeVar("T")
R = TypeVar("R")

REQUESTS_AT_ONCE = 16
"""Threads that read where each file takes a request over the network."""

Opened = tuple[Any, str]
"""A file system of fsspec, and a path in it."""


class Files:
    """The files below a folder, and others by whole URL.

    Passing faults of storage are repeated, see `pipeline.storage`; what does not pass is a StorageError.

    Parameters
    ----------
    url: of the folder: any fsspec URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.printable = scrub(url)
        self._patience = Patience(self.printable)
        self._opened: dict[tuple[int, str], Opened] = {}

    @property
    def is_far(self) -> bool:
        """Whether a read takes a request over the network."""
        protocol = self._open(self.url)[0].protocol
        return not {"file", "local", "memory"} & set([protocol] if isinstance(protocol, str) else protocol)

    @property
    def threads(self) -> int:
        """How many threads are worth while to read and decode."""
        return max(REQUESTS_AT_ONCE, available_cpus()) if self.is_far else available_cpus()

    def list(self) -> dict[str, int]:
        """Paths of all files below the folder, relative and "/"-separated, to their sizes in bytes, sorted.

        What begins with a dot is left out, file or folder.

        Raises
        ------
        DataError: there is no such folder. StorageError: it cannot be listed.
        """
        fs, root = self._open(self.url)
        is_local = "file" in fs.protocol
        try:
            found = self._patience.call(lambda: dict(_walk(root) if is_local else _find(fs, root)))
        except FileNotFoundError:
            found = {}
        if not found and not (is_local and os.path.isdir(root)):
            raise DataError(
                "no such folder or bucket, or it is empty", where=f"data.url: {self.printable}", fix="check the URL"
            )
        visible = (path for path in found if not any(part.startswith(".") for part in path.split("/")))
        return {path: found[path] for path in sorted(visible)}

    def size(self, path: str) -> int:
        """Bytes of a file, -1 where there is none."""
        fs, full = self._at(path)
        try:
            return int(self._patience.call(lambda: fs.info(full))["size"])
        except FileNotFoundError:
            return -1

    def read(self, path: str) -> bytes:
        """The whole content.

        Raises
        ------
        FileNotFoundError: there is no such file.
        """
        fs, full = self._at(path)
        return bytes(self._patience.call(lambda: fs.cat_file(full)))

    def ends(self, path: str, size: int, length: int) -> bytes:
        """The first and the last `length` bytes of a file of a known size."""
        fs, full = self._at(path)
        first = self._patience.call(lambda: fs.cat_file(full, start=0, end=min(length, size)))
        last = self._patience.call(lambda: fs.cat_file(full, start=max(0, size - length), end=size))
        return bytes(first) + bytes(last)

    def _at(self, path: str) -> Opened:
        if "://" in path:
            return self._open(path)
        fs, root = self._open(self.url)
        return fs, posixpath.normpath(posixpath.join(root, path))

    def _open(self, url: str) -> Opened:
        """Clients of a store do not survive a fork, so that each process opens its own."""
        place = (os.getpid(), url)
        if url != self.url:
            return open_filesystem(url)
        if place not in self._opened:
            self._opened[place] = open_filesystem(url)
        return self._opened[place]


def in_threads(make: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`make` of every item, in order, by threads that work a little ahead."""
    if threads == 1:
        yield from map(make, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(make, item) for item in islice(left, 2 * threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [pool.submit(make, item) for item in islice(left, 1)]
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _walk(root: str) -> Iterator[tuple[str, int]]:
    """Files below a local folder, links followed; -1 for a link that leads nowhere."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, onerror=fail, followlinks=True):
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            try:
                size = os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                size = -1
            yield name if inside == "." else f"{inside}/{name}", size


def _find(fs: Any, root: str) -> Iterator[tuple[str, int]]:
    """Files below any other folder, in one listing where the store has such."""
    fs.invalidate_cache()
    prefix = root.strip("/")
    for name, facts in fs.find(root, detail=True).items():
        path = name.strip("/")[len(prefix) :].strip("/")
        if facts["type"] == "file" and path and not name.endswith("/"):
            yield path, int(facts["size"])
