"""Decoded data on this machine, made once, memory-mapped by all.

An entry is a folder named by its key. It is filled under another name and then renamed, so it is whole or absent.
Two lock files in it move along: whoever fills it holds the one exclusively, whoever reads it holds the other shared
for as long as it uses the entry. The kernel ends both with the process, however that ends, so a dead builder's
leftovers are known by a lock that is free. (With one file for both, who waits for the builder would wait for the
readers too.) Whoever holds the builder's lock sets its modification time again and again while its work moves, and who
waits for the lock takes each such change for progress of its own: see `pipeline.watchdog`.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.config import CacheConfig
from pipeline.errors import DataError
from pipeline.watchdog import blocking_on, listening_to_progress, note_progress
from pipeline.watchdog.progress import get_progress_listeners

WHERE = "data.cache.folder"
FIX = "--set data.cache.folder=DIR names another"

READERS_LOCK = ".readers"
BUILDER_LOCK = ".builder"
SPACE_LOCK = ".lock"
BUILDING_PREFIX = ".building-"
REMOVED_PREFIX = ".removed-"

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

MAX_PAUSE_S = 0.25
"""Between two looks at a lock that another process holds, or at a file that grows."""

LOCK_PROGRESS_INTERVAL_S = 0.1
"""Between two signs of progress to those who wait."""

SYNC_BYTES = 64 << 20
"""What is written to the disk at once at the end: each such piece is progress."""


class CacheEntry:
    """An entry that is in use: it stays as long as this object or an array that it has mapped, or a view of one.

    folder: where its files are.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        """descriptor: of the readers' lock, which is held."""
        self.folder = folder
        weakref.finalize(self, os.close, descriptor)

    def map_array(self, name: str) -> np.ndarray:
        """An array of the entry in `.npy` format, memory-mapped."""
        array: np.ndarray = np.load(self.folder / name, mmap_mode="r")
        weakref.finalize(array.base, _release, self)  # the map itself, which all views of the array keep
        return array


def _release(entry: CacheEntry) -> None:
    """Until it is called, a finalizer refers to the entry."""


def has_room_for(cache: CacheConfig, size_bytes: int) -> bool:
    """Whether an entry of so many bytes may be kept: within `max_gb`, and on the disk once older ones are gone."""
    folder = Path(cache.folder).expanduser().absolute()
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return size_bytes <= min(_max_bytes(cache), shutil.disk_usage(present).free + _folder_bytes(folder))


def get_or_build(cache: CacheConfig, key: str, build: Callable[[Path], None], *, size_bytes: int) -> CacheEntry:
    """An entry, complete.

    Where it is absent, one process builds it while others that want it wait; if the builder dies, the next one builds.
    Before that, entries that nobody uses are deleted, those not used for longest first, until `size` more bytes stay
    within `max_gb`.

    Parameters
    ----------
    key: names the content, such as a digest in hex.
    build: fills the empty folder that it is given, and notes its progress. What it raises leaves no entry behind and
        is passed on.
    size: bytes that the entry will take at most.

    Raises
    ------
    DataError: `size` is beyond `max_gb`, alone or beside what is in use; the folder cannot be written or is full.
    """
    folder = Path(cache.folder).expanduser().absolute()
    path = folder / key
    if size_bytes > _max_bytes(cache):
        raise DataError(
            f"the decoded data takes {_format_gb(size_bytes)}, but max_gb allows {_format_gb(_max_bytes(cache))}",
            where="data.cache.max_gb",
            fix=f"--set data.cache.max_gb={-(-size_bytes // 10**9)}, on a disk with that much room",
        )
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while (entry := _open_entry(path)) is None:
            lock = _lock_folder(folder / f"{BUILDING_PREFIX}{key}")
            if lock is None:
                continue  # another process has just finished or given up
            with lock, listening_to_progress(_make_progress_marker(lock)):
                if not (path / READERS_LOCK).exists():
                    _build_entry(cache, path, build, size_bytes, lock)
    return entry


def _build_entry(
    cache: CacheConfig, entry: Path, build: Callable[[Path], None], size_bytes: int, lock: IO[str]
) -> None:
    """Fill the temporary folder, whose lock is held, and put it in place."""
    note_progress()
    folder, temporary = entry.parent, entry.with_name(f"{BUILDING_PREFIX}{entry.name}")
    _empty_folder(temporary)  # a dead builder's
    try:
        _reserve(cache, folder, size_bytes, lock)
        build(temporary)
        (temporary / READERS_LOCK).touch()
        _sync_folder(temporary)
        if entry.exists():
            _remove_folder(entry)  # without a lock it is no entry, but in the way
        temporary.rename(entry)
    except BaseException:
        with suppress(OSError):
            _remove_folder(temporary)
        raise


@contextmanager
def scratch_folder(cache: CacheConfig, size_bytes: int) -> Iterator[Path]:
    """A folder for temporary files of `size` bytes in all, which counts as part of the cache while it is there.

    Raises
    ------
    DataError: as in `cached`.
    """
    with _locked_temporary(cache, secrets.token_hex(8)) as (temporary, lock):
        with _cache_errors(temporary.parent):
            _reserve(cache, temporary.parent, size_bytes, lock)
        yield temporary


@contextmanager
def exclusive_lock(cache: CacheConfig, key: str) -> Iterator[None]:
    """While entered, no other process is in here with the same key. Who waits sees the progress that is noted.

    Raises
    ------
    DataError: the folder cannot be written or is full.
    """
    with _locked_temporary(cache, key) as (_, lock), listening_to_progress(_make_progress_marker(lock)):
        yield


@contextmanager
def _locked_temporary(cache: CacheConfig, name: str) -> Iterator[tuple[Path, IO[str]]]:
    """The path of a temporary folder, which nobody else uses, and its lock. What is written there is removed."""
    folder = Path(cache.folder).expanduser().absolute()
    temporary = folder / f"{BUILDING_PREFIX}{name}"
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while (lock := _lock_folder(temporary)) is None:
            pass
    with lock:
        try:
            yield temporary, lock
        finally:
            with suppress(OSError):
                _remove_folder(temporary)


@blocking_on("cache")
def acquire_lock(lock: IO[Any]) -> None:
    """Lock a file exclusively. While another process holds the lock, its signs of progress count as this thread's."""
    last_mtime_ns, pause_s = -1, 1e-3
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        mtime_ns = os.fstat(lock.fileno()).st_mtime_ns
        if mtime_ns != last_mtime_ns:
            last_mtime_ns = mtime_ns
            note_progress()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


@contextmanager
def track_folder_growth(folder: Path, lock: IO[Any] | None = None) -> Iterator[None]:
    """While entered, what is added to the files in a folder counts as progress of this thread: for calls of libraries
    that take long and say nothing.

    Parameters
    ----------
    lock: one that is held; who waits for it sees the progress too.
    """
    listeners = (*get_progress_listeners(), *([_make_progress_marker(lock)] if lock is not None else []))
    stopped = threading.Event()

    def watch() -> None:
        seen = -1
        while not stopped.wait(MAX_PAUSE_S):
            size = _folder_bytes(folder)
            if size != seen:
                seen = size
                for listener in listeners:
                    listener()

    thread = threading.Thread(target=watch, name="trainyard-growing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _reserve(cache: CacheConfig, folder: Path, size_bytes: int, lock: IO[str]) -> None:
    """Make room for what is about to be put beside a lock that is held."""
    lock.truncate(0)
    with (folder / SPACE_LOCK).open("a") as room:
        acquire_lock(room)
        _make_room(cache, folder, size_bytes)
        lock.write(str(size_bytes))  # counts as taken from now on
        lock.flush()


def _open_entry(path: Path) -> CacheEntry | None:
    """The entry, held shared; None if it is not there."""
    try:
        descriptor = os.open(path / READERS_LOCK, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not _is_same_file(descriptor, path / READERS_LOCK):  # deleted meanwhile
        os.close(descriptor)
        return None
    os.utime(path)
    return CacheEntry(path, descriptor)


def _lock_folder(temporary: Path) -> IO[str] | None:
    """The temporary folder's lock, waited for; None if the folder went away or into its place meanwhile."""
    temporary.mkdir(exist_ok=True)
    try:
        lock = (temporary / BUILDER_LOCK).open("a+")
    except FileNotFoundError:
        return None
    acquire_lock(lock)
    if _is_same_file(lock.fileno(), temporary / BUILDER_LOCK):
        return lock
    lock.close()
    return None


def _make_progress_marker(lock: IO[Any]) -> Callable[[], None]:
    """Takes progress, and shows it to those who wait for the lock."""
    last_shown_s = 0.0

    def sign() -> None:
        nonlocal last_shown_s
        if time.monotonic() - last_shown_s >= LOCK_PROGRESS_INTERVAL_S:
            last_shown_s = time.monotonic()
            with suppress(OSError, ValueError):  # closed: the last sign of a thread that saw it from outside
                os.utime(lock.fileno())

    return sign


def _make_room(cache: CacheConfig, folder: Path, size_bytes: int) -> None:
    """Delete leftovers, and the entries not used for longest, until `size` bytes fit."""
    excess, short = _evict(cache, folder, size_bytes)
    if excess > 0 or short > 0:  # what is no longer used may still be held by objects that refer to each other
        gc.collect()
        excess, short = _evict(cache, folder, size_bytes)
    if excess > 0:
        raise DataError(
            f"{_format_gb(size_bytes)} more would pass max_gb, {_format_gb(_max_bytes(cache))}: the rest is in use",
            where="data.cache.max_gb",
            fix="raise it, or wait until whatever uses it ends",
        )
    if short > 0:
        raise DataError(f"the disk of {folder} is full: {_format_gb(short)} more are needed", where=WHERE, fix=FIX)


def _evict(cache: CacheConfig, folder: Path, size_bytes: int) -> tuple[int, int]:
    """Delete what may be deleted and must be; returns how many bytes too many there are still, by `max_gb` and on the
    disk."""
    entries: dict[Path, int] = {}
    building_bytes = 0
    for path in list(folder.iterdir()):
        if path.name.startswith(REMOVED_PREFIX):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(BUILDING_PREFIX):
            if _remove_if_unlocked(path, BUILDER_LOCK):
                continue
            with suppress(FileNotFoundError):  # just finished
                building_bytes += max(_folder_bytes(path), int((path / BUILDER_LOCK).read_text() or 0))
        elif (path / READERS_LOCK).exists():
            entries[path] = _folder_bytes(path)
    excess_bytes = sum(entries.values()) + building_bytes + size_bytes - _max_bytes(cache)
    missing_bytes = size_bytes - shutil.disk_usage(folder).free
    for path in sorted(entries, key=lambda place: place.stat().st_mtime):
        if excess_bytes <= 0 and missing_bytes <= 0:
            break
        if _remove_if_unlocked(path, READERS_LOCK):
            excess_bytes -= entries[path]
            missing_bytes -= entries[path]
            note_progress()
    return excess_bytes, missing_bytes


def _remove_if_unlocked(folder: Path, name: str) -> bool:
    """Delete a folder whose lock of this name no process holds."""
    try:
        with (folder / name).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(lock.fileno(), folder / name):
                _remove_folder(folder)
                return True
    except (FileNotFoundError, BlockingIOError):
        pass
    return False


def _remove_folder(folder: Path) -> None:
    """Take it out of sight in one step, then delete it."""
    removed = folder.with_name(REMOVED_PREFIX + secrets.token_hex(8))
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _empty_folder(folder: Path) -> None:
    """Delete all but the lock that is held."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != BUILDER_LOCK:
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the disk hold the content before its final name."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent) / name for name in names), Path(parent)):
            if path.is_file():
                _write_back(path)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _write_back(path: Path) -> None:
    """Have the disk hold a file's bytes, piece by piece: all at once may take minutes without any progress."""
    size = path.stat().st_size
    if size <= SYNC_BYTES:
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for first in range(0, size, SYNC_BYTES):
            mapped.flush(first, min(SYNC_BYTES, size - first))
            note_progress()


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def _max_bytes(cache: CacheConfig) -> int:
    return int(cache.max_gb * 10**9)


def _format_gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Errors of the cache's own files as errors of its field; those of what is being decoded are not touched."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)
        above = error.filename is not None and folder.is_relative_to(os.fsdecode(error.filename))
        if not (inside or above or error.errno in NO_SPACE_ERRNOS):
            raise
        problem = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{folder} cannot be written: {problem}", where=WHERE, fix=FIX) from error
