"""Files of any fsspec URL: listed, and read from any thread and any forked process."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from pipeline.data.sources.digests import reading_threads, store_checksum
from pipeline.errors import DataError
from pipeline.storage.faults import Patience, scrub
from pipeline.storage.filesystems import open_filesystem
from pipeline.watchdog import note_progress, waits_for

T = TypeVar("T")
R = TypeVar("R")

Facts = tuple[int, str]
"""Bytes of a file, -1 where there is none, and its checksum, see `digests.store_checksum`."""

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
        return reading_threads(self.is_far)

    @waits_for("storage")
    def list(self) -> dict[str, Facts]:
        """Paths of all files below the folder, relative and "/"-separated, sorted, to what is known of each.

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

    def facts(self, path: str) -> Facts:
        """What is known of a file."""
        fs, full = self._at(path)
        try:
            info = self._patience.call(lambda: fs.info(full))
        except FileNotFoundError:
            return -1, ""
        return int(info["size"]), store_checksum(info)

    def local(self, path: str) -> str:
        """Where a file of this machine lies; empty for one elsewhere."""
        fs, full = self._at(path)
        return full if "file" in fs.protocol else ""

    def attempt(self, action: Callable[[], T]) -> T:
        """The action's result; passing faults of storage are repeated."""
        return self._patience.call(action)

    def read(self, path: str) -> bytes:
        """The whole content.

        Raises
        ------
        FileNotFoundError: there is no such file.
        """
        fs, full = self._at(path)
        return bytes(self._patience.call(lambda: fs.cat_file(full)))

    def part(self, path: str, first: int, end: int) -> bytes:
        """Some bytes of a file."""
        fs, full = self._at(path)
        return bytes(self._patience.call(lambda: fs.cat_file(full, start=first, end=end)))

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
    """`make` of every item, in order, by threads that work a little ahead; each is progress of this thread."""
    if threads == 1:
        for item in items:
            yield make(item)
            note_progress()
        return
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(make, item) for item in islice(left, 2 * threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [pool.submit(make, item) for item in islice(left, 1)]
                yield result
                note_progress()
        finally:
            pool.shutdown(cancel_futures=True)


def _walk(root: str) -> Iterator[tuple[str, Facts]]:
    """Files below a local folder, links followed; of size -1 where a link leads nowhere."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, onerror=fail, followlinks=True):
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            try:
                size = os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                size = -1
            yield name if inside == "." else f"{inside}/{name}", (size, "")
            note_progress()


def _find(fs: Any, root: str) -> Iterator[tuple[str, Facts]]:
    """Files below any other folder, in one listing where the store has such."""
    fs.invalidate_cache()
    prefix = root.strip("/")
    for name, facts in fs.find(root, detail=True).items():
        path = name.strip("/")[len(prefix) :].strip("/")
        if facts["type"] == "file" and path and not name.endswith("/"):
            yield path, (int(facts["size"]), store_checksum(facts))
