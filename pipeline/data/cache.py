"""Cache of decoded data on this machine: an entry is built once, and memory-mapped by all processes.

An entry is a folder named by its key. It is filled under a temporary name and then renamed, so it is complete or
absent. It contains two lock files: its builder holds one exclusively, each reader holds the other shared while it uses
the entry. The kernel releases locks when a process ends for any reason, so a temporary folder whose lock is free was
abandoned. (With one file for both, a process waiting for the builder would also wait for the readers.) The process that
holds the builder's lock updates its modification time while it makes progress, and processes that wait for the lock
count each update as their own progress: see `pipeline.watchdog`.
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
FIX = "choose another folder with --set data.cache.folder=DIR"

READERS_LOCK = ".readers"
BUILDER_LOCK = ".builder"
SPACE_LOCK = ".lock"
BUILDING_PREFIX = ".building-"
REMOVED_PREFIX = ".removed-"

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

MAX_PAUSE_S = 0.25
"""Between two checks of a lock that another process holds, or of a folder that grows."""

LOCK_PROGRESS_INTERVAL_S = 0.1
"""Minimum interval between two progress marks for waiting processes."""

SYNC_BYTES = 64 << 20
"""Bytes that are synced to disk at once; each such block counts as progress."""


class CacheEntry:
    """An entry that is in use: it is not deleted while this object, an array mapped by it, or a view of one exists.

    folder: where its files are.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        """descriptor: of the readers' lock file, which is locked."""
        self.folder = folder
        weakref.finalize(self, os.close, descriptor)

    def map_array(self, name: str) -> np.ndarray:
        """Return an array of the entry in `.npy` format, memory-mapped."""
        array: np.ndarray = np.load(self.folder / name, mmap_mode="r")
        weakref.finalize(array.base, _release, self)  # the map, to which all views of the array refer
        return array


def _release(entry: CacheEntry) -> None:
    """Do nothing: a finalizer with this function keeps a reference to the entry until it is called."""


def has_room_for(cache: CacheConfig, size_bytes: int) -> bool:
    """Return whether an entry of this size fits: in `max_gb`, and on the disk after older entries are deleted."""
    folder = Path(cache.folder).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return size_bytes <= min(_max_bytes(cache), shutil.disk_usage(existing).free + _folder_bytes(folder))


def get_or_build(cache: CacheConfig, key: str, build: Callable[[Path], None], *, size_bytes: int) -> CacheEntry:
    """Return a complete entry; build it first if it is absent.

    One process builds it while others that need it wait; if the builder ends without completing it, the next one
    builds. Before that, unused entries are deleted, the least recently used first, until `size_bytes` more bytes fit in
    `max_gb`.

    Parameters
    ----------
    key: identifies the content, such as a digest in hex.
    build: fills the empty folder that it receives, and notes its progress. If it raises, no entry is left, and the
        exception is passed on.
    size_bytes: upper bound of the entry's size.

    Raises
    ------
    DataError: `size_bytes` exceeds `max_gb`, alone or together with what is in use; or the folder cannot be written or
        is full.
    """
    folder = Path(cache.folder).expanduser().absolute()
    path = folder / key
    if size_bytes > _max_bytes(cache):
        raise DataError(
            f"the decoded data takes {_format_gb(size_bytes)}, but max_gb allows {_format_gb(_max_bytes(cache))}",
            where="data.cache.max_gb",
            fix=f"--set data.cache.max_gb={-(-size_bytes // 10**9)}, on a disk with enough space",
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
    """Fill the temporary folder, whose lock is held, and rename it to the entry."""
    note_progress()
    folder, temporary = entry.parent, entry.with_name(f"{BUILDING_PREFIX}{entry.name}")
    _empty_folder(temporary)  # files of an earlier builder that did not complete
    try:
        _reserve(cache, folder, size_bytes, lock)
        build(temporary)
        (temporary / READERS_LOCK).touch()
        _sync_folder(temporary)
        if entry.exists():
            _remove_folder(entry)  # without a lock file it is not an entry, but blocks the name
        temporary.rename(entry)
    except BaseException:
        with suppress(OSError):
            _remove_folder(temporary)
        raise


@contextmanager
def scratch_folder(cache: CacheConfig, size_bytes: int) -> Iterator[Path]:
    """Provide a folder for temporary files of `size_bytes` in total; while it exists, it counts as part of the cache.

    Raises
    ------
    DataError: as in `get_or_build`.
    """
    with _locked_temporary(cache, secrets.token_hex(8)) as (temporary, lock):
        with _cache_errors(temporary.parent):
            _reserve(cache, temporary.parent, size_bytes, lock)
        yield temporary


@contextmanager
def exclusive_lock(cache: CacheConfig, key: str) -> Iterator[None]:
    """Hold a lock that no other process holds with the same key. Waiting processes receive the progress noted inside.

    Raises
    ------
    DataError: the folder cannot be written or is full.
    """
    with _locked_temporary(cache, key) as (_, lock), listening_to_progress(_make_progress_marker(lock)):
        yield


@contextmanager
def _locked_temporary(cache: CacheConfig, name: str) -> Iterator[tuple[Path, IO[str]]]:
    """Provide the path of a temporary folder that no other process uses, and its lock. It is deleted at the end."""
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
    """Lock a file exclusively. While another process holds the lock, its progress counts as this thread's."""
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
    """Count changes of a folder's size as progress of this thread: for long library calls that report no progress.

    Parameters
    ----------
    lock: a lock that is held; processes that wait for it receive the progress too.
    """
    listeners = (*get_progress_listeners(), *([_make_progress_marker(lock)] if lock is not None else []))
    stopped = threading.Event()

    def watch() -> None:
        last_size = -1
        while not stopped.wait(MAX_PAUSE_S):
            size = _folder_bytes(folder)
            if size != last_size:
                last_size = size
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
    """Reserve space for the temporary folder whose lock is held."""
    lock.truncate(0)
    with (folder / SPACE_LOCK).open("a") as space_lock:
        acquire_lock(space_lock)
        _make_room(cache, folder, size_bytes)
        lock.write(str(size_bytes))  # counts as used from now on
        lock.flush()


def _open_entry(path: Path) -> CacheEntry | None:
    """Return the entry, locked shared; None if it is absent."""
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
    """Wait for the temporary folder's lock and return it; None if the folder was deleted or renamed meanwhile."""
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
    """Return a progress listener that makes progress visible to processes waiting for the lock."""
    last_marked_s = 0.0

    def mark() -> None:
        nonlocal last_marked_s
        if time.monotonic() - last_marked_s >= LOCK_PROGRESS_INTERVAL_S:
            last_marked_s = time.monotonic()
            with suppress(OSError, ValueError):  # closed: another thread may call this once more after the end
                os.utime(lock.fileno())

    return mark


def _make_room(cache: CacheConfig, folder: Path, size_bytes: int) -> None:
    """Delete abandoned folders, and the least recently used entries, until `size_bytes` more fit."""
    excess_bytes, missing_bytes = _evict(cache, folder, size_bytes)
    if excess_bytes > 0 or missing_bytes > 0:  # unused entries may still be locked by objects in reference cycles
        gc.collect()
        excess_bytes, missing_bytes = _evict(cache, folder, size_bytes)
    if excess_bytes > 0:
        raise DataError(
            f"{_format_gb(size_bytes)} more would exceed max_gb, {_format_gb(_max_bytes(cache))}: the rest is in use",
            where="data.cache.max_gb",
            fix="raise it, or wait until the processes that use the cache end",
        )
    if missing_bytes > 0:
        raise DataError(
            f"the disk of {folder} is full: {_format_gb(missing_bytes)} more are needed", where=WHERE, fix=FIX
        )


def _evict(cache: CacheConfig, folder: Path, size_bytes: int) -> tuple[int, int]:
    """Delete as many unused folders as necessary; return by how many bytes `max_gb` and the disk are still exceeded."""
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
    for path in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if excess_bytes <= 0 and missing_bytes <= 0:
            break
        if _remove_if_unlocked(path, READERS_LOCK):
            excess_bytes -= entries[path]
            missing_bytes -= entries[path]
            note_progress()
    return excess_bytes, missing_bytes


def _remove_if_unlocked(folder: Path, name: str) -> bool:
    """Delete a folder if no process holds its lock file of this name; return whether it was deleted."""
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
    """Rename a folder, which is atomic, then delete it."""
    removed = folder.with_name(REMOVED_PREFIX + secrets.token_hex(8))
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _empty_folder(folder: Path) -> None:
    """Delete everything in a folder but the builder's lock file, which is locked."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != BUILDER_LOCK:
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Sync a folder and its files to disk, so that the content is there before the final name."""
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
    """Sync a large file to disk in blocks: all at once may take minutes without any progress."""
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
    """Translate errors of the cache's files to errors of `data.cache`; errors of the decoded data pass unchanged."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)
        above = error.filename is not None and folder.is_relative_to(os.fsdecode(error.filename))
        if not (inside or above or error.errno in NO_SPACE_ERRNOS):
            raise
        problem = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{folder} cannot be written: {problem}", where=WHERE, fix=FIX) from error
