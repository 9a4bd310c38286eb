"""Decoded data on this machine, made once, memory-mapped by all.

An entry is a folder named by its key. It is filled under another name and then renamed, so it is whole or absent.
Two lock files in it move along: whoever fills it holds the one exclusively, whoever reads it holds the other shared
for the life of the process. The kernel ends both with the process, however that ends, so a dead builder's leftovers
are known by a lock that is free. (With one file for both, who waits for the builder would wait for the readers too.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.errors import DataError
from pipeline.job import Cache

WHERE = "data.cache.folder"
FIX = "--set data.cache.folder=DIR names another"

READERS = ".readers"
BUILDER = ".builder"
ROOM = ".lock"
BUILDING = ".building-"
REMOVED = ".removed-"

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_READING: dict[Path, int] = {}
"""Descriptors that hold the entries which this process reads; never closed."""


def fits(cache: Cache, size: int) -> bool:
    """Whether an entry of so many bytes may be kept: within `max_gb`, and on the disk once older ones are gone."""
    folder = Path(cache.folder).expanduser().absolute()
    present = next(place for place in (folder, *folder.parents) if place.exists())
    return size <= min(_limit(cache), shutil.disk_usage(present).free + _bytes(folder))


def cached(cache: Cache, key: str, build: Callable[[Path], None], *, size: int) -> Path:
    """The folder of an entry, complete; it stays for the life of this process.

    Where it is absent, one process builds it while others that want it wait; if the builder dies, the next one builds.
    Before that, entries that no process reads are deleted, those not used for longest first, until `size` more bytes
    stay within `max_gb`.

    Parameters
    ----------
    key: names the content, such as a digest in hex.
    build: fills the empty folder that it is given. What it raises leaves no entry behind and is passed on.
    size: bytes that the entry will take at most.

    Raises
    ------
    DataError: `size` is beyond `max_gb`, alone or beside what is in use; the folder cannot be written or is full.
    """
    folder = Path(cache.folder).expanduser().absolute()
    entry = folder / key
    if entry in _READING and entry.exists():
        return entry
    _READING.pop(entry, None)  # somebody deleted it by hand
    if size > _limit(cache):
        raise DataError(
            f"the decoded data takes {_gb(size)}, but max_gb allows {_gb(_limit(cache))}",
            where="data.cache.max_gb",
            fix=f"--set data.cache.max_gb={-(-size // 10**9)}, on a disk with that much room",
        )
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while not _reads(entry):
            lock = _locked(folder / f"{BUILDING}{key}")
            if lock is None:
                continue  # another process has just finished or given up
            with lock:
                if not (entry / READERS).exists():
                    _build(cache, entry, build, size, lock)
    return entry


def _build(cache: Cache, entry: Path, build: Callable[[Path], None], size: int, lock: IO[str]) -> None:
    """Fill the temporary folder, whose lock is held, and put it in place."""
    folder, temporary = entry.parent, entry.with_name(f"{BUILDING}{entry.name}")
    _empty(temporary)  # a dead builder's
    try:
        _reserve(cache, folder, size, lock)
        build(temporary)
        (temporary / READERS).touch()
        _sync(temporary)
        if entry.exists():
            _remove(entry)  # without a lock it is no entry, but in the way
        temporary.rename(entry)
    except BaseException:
        with suppress(OSError):
            _remove(temporary)
        raise


@contextmanager
def scratch(cache: Cache, size: int) -> Iterator[Path]:
    """A folder for temporary files of `size` bytes in all, which counts as part of the cache while it is there.

    Raises
    ------
    DataError: as in `cached`.
    """
    folder = Path(cache.folder).expanduser().absolute()
    temporary = folder / f"{BUILDING}{secrets.token_hex(8)}"
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while (lock := _locked(temporary)) is None:
            pass
    with lock:
        try:
            with _named(folder):
                _reserve(cache, folder, size, lock)
            yield temporary
        finally:
            with suppress(OSError):
                _remove(temporary)


def _reserve(cache: Cache, folder: Path, size: int, lock: IO[str]) -> None:
    """Make room for what is about to be put beside a lock that is held."""
    lock.truncate(0)
    with (folder / ROOM).open("a") as room:
        fcntl.flock(room, fcntl.LOCK_EX)
        _make_room(cache, folder, size)
        lock.write(str(size))  # counts as taken from now on
        lock.flush()


def _reads(entry: Path) -> bool:
    """Hold the entry shared, if it is there."""
    try:
        descriptor = os.open(entry / READERS, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not _is_at(descriptor, entry / READERS):  # deleted meanwhile
        os.close(descriptor)
        return False
    os.utime(entry)
    _READING[entry] = descriptor
    return True


def _locked(temporary: Path) -> IO[str] | None:
    """The temporary folder's lock, waited for; None if the folder went away or into its place meanwhile."""
    temporary.mkdir(exist_ok=True)
    try:
        lock = (temporary / BUILDER).open("a+")
    except FileNotFoundError:
        return None
    fcntl.flock(lock, fcntl.LOCK_EX)
    if _is_at(lock.fileno(), temporary / BUILDER):
        return lock
    lock.close()
    return None


def _make_room(cache: Cache, folder: Path, size: int) -> None:
    """Delete leftovers, and the entries not used for longest, until `size` bytes fit."""
    entries: dict[Path, int] = {}
    building = 0
    for place in list(folder.iterdir()):
        if place.name.startswith(REMOVED):
            shutil.rmtree(place, ignore_errors=True)
        elif place.name.startswith(BUILDING):
            if _remove_if_free(place, BUILDER):
                continue
            with suppress(FileNotFoundError):  # just finished
                building += max(_bytes(place), int((place / BUILDER).read_text() or 0))
        elif (place / READERS).exists():
            entries[place] = _bytes(place)
    excess = sum(entries.values()) + building + size - _limit(cache)
    short = size - shutil.disk_usage(folder).free
    for place in sorted(entries, key=lambda place: place.stat().st_mtime):
        if excess <= 0 and short <= 0:
            return
        if _remove_if_free(place, READERS):
            excess -= entries[place]
            short -= entries[place]
    if excess > 0:
        raise DataError(
            f"{_gb(size)} more would pass max_gb, {_gb(_limit(cache))}: the rest is in use",
            where="data.cache.max_gb",
            fix="raise it, or wait until the processes that use it end",
        )
    if short > 0:
        raise DataError(f"the disk of {folder} is full: {_gb(short)} more are needed", where=WHERE, fix=FIX)


def _remove_if_free(place: Path, name: str) -> bool:
    """Delete a folder whose lock of this name no process holds."""
    try:
        with (place / name).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock.fileno(), place / name):
                _remove(place)
                return True
    except (FileNotFoundError, BlockingIOError):
        pass
    return False


def _remove(place: Path) -> None:
    """Take it out of sight in one step, then delete it."""
    removed = place.with_name(REMOVED + secrets.token_hex(8))
    place.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Delete all but the lock that is held."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != BUILDER:
            path.unlink()


def _sync(folder: Path) -> None:
    """Have the disk hold the content before its final name."""
    for place, _, names in os.walk(folder):
        for path in (*(Path(place) / name for name in names), Path(place)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def _limit(cache: Cache) -> int:
    return int(cache.max_gb * 10**9)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors of the cache's own files as errors of its field; those of what is being decoded are not touched."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)
        above = error.filename is not None and folder.is_relative_to(os.fsdecode(error.filename))
        if not (inside or above or error.errno in NO_ROOM):
            raise
        problem = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{folder} cannot be written: {problem}", where=WHERE, fix=FIX) from error
