"""Tokens that identify the content of the files of a dataset: digests of the content, or the store's checksums.

- A local file is hashed whole, whatever its size. Its digest is cached beside the decoded data, under (device, inode,
  size, modification time, change time), as in git's index. Programs cannot set the change time (ctime), so an edit that
  keeps size and modification time is detected. (On file systems without change times, such as some mounts of object
  stores and FAT, the modification time takes its place.) A digest is not cached unless the change time is clearly older
  than it, because a later edit could have the same time.
- The files of a store, up to `MAX_FULL_HASH_BYTES` bytes in total, are hashed whole too, so that moving them between
  this machine and stores does not change their tokens. Beyond that size, the token is the checksum or version in the
  store's listing, and copies elsewhere count as other data.
- If a store has no checksums, blocks at fixed offsets are hashed, and a warning states which changes go undetected.

Neither modification times nor locations are part of a token.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config import CacheConfig
from pipeline.cpus import available_cpus
from pipeline.data.cache import exclusive_lock
from pipeline.errors import DataError
from pipeline.events import ProgressFn
from pipeline.watchdog import note_progress

MAX_FULL_HASH_BYTES = 1 << 30
"""Total size of the files up to which remote files are read and hashed, as local files always are."""

MIN_CACHED_DIGEST_BYTES = 64 << 20
"""Total size of the files from which digests are cached. Hashing fewer bytes again takes less than 50 ms."""

MIN_CTIME_AGE_NS = 2 * 10**9
"""How much older than its digest a file's change time must be. The clocks of file systems have steps of up to 2 s."""

DIGEST_CACHE_PREFIX = ".digests-"
"""Prefix of the names of the digest files in the cache folder."""

DIGEST_CACHE_TTL_S = 180 * 86_400
"""Digests of a dataset that was not opened for this long are deleted."""

READ_BYTES = 1 << 20
"""Size of the blocks in which local files are read."""

SAMPLES_PER_FILE = 4
SAMPLE_BYTES = 64 << 10
"""Number and size of the blocks that are hashed of each file whose store has no checksums. They include the first and
the last block."""

MAX_CONCURRENT_REQUESTS = 16
"""Number of threads that read if each file takes a network request."""

PROGRESS_INTERVAL_S = 1.0

FileStamp = bytes
"""A digest of device, inode, size, modification time and change time of a file."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a dataset.

    where: its location for messages, appended to that of the dataset.
    size_bytes: its size as listed.
    local_path: its path if it is local; else empty.
    checksum: the checksum of the content by its store, see `storage.read_files.store_checksum`; else empty.
    """

    where: str
    size_bytes: int
    local_path: str = ""
    checksum: str = ""


class FileAccess(Protocol):
    """Access to the files of a dataset, each identified by its number."""

    def call(self, number: int, action: Callable[[], Any]) -> Any:
        """Return the action's result. Errors of the system become errors with the name of that file."""

    def read(self, number: int, first: int, end: int) -> bytes:
        """Return the bytes `first` to `end` (exclusive) of a remote file, possibly all of them."""

    def sample_ranges(self, number: int) -> list[tuple[int, int]]:
        """Return the byte ranges to hash of a file in a store without checksums."""

    def list_checksums(self) -> list[str]:
        """Return the current checksums of all files, as in `DataFile`."""


def evenly_spaced_ranges(size: int) -> list[tuple[int, int]]:
    """Return byte ranges of a file of `size` bytes, with the first and the last block; the whole of a small file."""
    if size <= SAMPLES_PER_FILE * SAMPLE_BYTES:
        return [(0, size)]
    starts = [index * (size - SAMPLE_BYTES) // (SAMPLES_PER_FILE - 1) for index in range(SAMPLES_PER_FILE)]
    return [(first, first + SAMPLE_BYTES) for first in starts]


def select_num_read_threads(is_remote: bool) -> int:
    """Return the number of threads that read and hash files.

    Parameters
    ----------
    is_remote: whether a read takes a network request.
    """
    cores = available_cpus()
    return max(MAX_CONCURRENT_REQUESTS, cores) if is_remote else cores


class FileDigests:
    """Computes the tokens that identify the content of files, with several threads, when it is created.

    tokens: for each file the SHA-256 of its content in hex, the store's checksum, or the digest of sampled blocks.
    are_content_hashes: whether all tokens are of the first kind.
    warnings: assumptions that were made, and why digests cannot be cached.

    Parameters
    ----------
    url: URL of the dataset. A digest of it is the key of the cached digests.
    cache: the cache whose folder holds the cached digests.
    num_threads: number of threads that read and hash.
    stamps: stamps of the local files from when they were first read, None for remote files.
    where: location of the dataset, for messages.

    Raises
    ------
    DataError: a file changed while it was read. Also errors of `access`.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        access: FileAccess,
        *,
        url: str,
        cache: CacheConfig,
        num_threads: int,
        on_progress: ProgressFn,
        stamps: Sequence[FileStamp | None] = (),
        where: str = "",
    ) -> None:
        self._files, self._access, self._num_threads, self._on_progress = files, access, num_threads, on_progress
        self._where = where
        self._stamps = stamps or read_stamps(files, access)
        self._total_bytes = sum(file.size_bytes for file in files)
        self._is_settled = [True] * len(files)
        self.warnings: tuple[str, ...] = ()
        hashed = [number for number in range(len(files)) if self._is_fully_hashed(number)]
        self.are_content_hashes = len(hashed) == len(files)
        self.tokens = [file.checksum for file in files]
        self._find_digests(hashed, url, cache)
        sampled = [number for number, token in enumerate(self.tokens) if not token]
        self._run_in_threads(self._hash_sample, sampled)
        if sampled:
            self.warnings += (
                f"the store has no checksums, and the data has {self._total_bytes / 1e9:,.1f} GB: only some blocks of "
                f"each of {len(sampled):,} files, such as {where}{files[sampled[0]].where}, identify its content. A "
                "change outside these blocks that keeps the size is not detected: give changed data another URL",
            )

    def verify(self) -> None:
        """Raise DataError if a file has changed since its token was computed: data read since may be of either
        version."""
        remote = [number for number, file in enumerate(self._files) if file.checksum]
        now = self._access.list_checksums() if remote else []
        for number in remote:
            if now[number] != self._files[number].checksum:
                raise self._changed_error(number)
        unsure = []
        for number, stamp in enumerate(self._stamps):
            if stamp is not None:
                if self._access.call(number, partial(_read_stamp, self._files[number].local_path)) != stamp:
                    raise self._changed_error(number)
                if not self._is_settled[number]:
                    unsure.append(number)
        tokens = list(self.tokens)
        self._run_in_threads(self._hash_file, unsure)
        self._run_in_threads(
            self._hash_sample,
            [
                number
                for number, file in enumerate(self._files)
                if not file.checksum and not self._is_fully_hashed(number)
            ],
        )
        for number, (before, after) in enumerate(zip(tokens, self.tokens, strict=True)):
            if before != after:
                raise self._changed_error(number)

    def _changed_error(self, number: int) -> DataError:
        return changed_file_error(f"{self._where}{self._files[number].where}")

    def _is_fully_hashed(self, number: int) -> bool:
        return bool(self._files[number].local_path) or self._total_bytes <= MAX_FULL_HASH_BYTES

    def _find_digests(self, numbers: list[int], url: str, cache: CacheConfig) -> None:
        """Set the tokens of whole files: from the digest cache, or by hashing."""
        if self._total_bytes < MIN_CACHED_DIGEST_BYTES:
            self._run_in_threads(self._hash_file, numbers)
            return
        keys = {number: key for number in numbers if (key := self._cache_key(number))}
        cache_file = _DigestCache(cache, url)
        self.tokens = ["" if self._is_fully_hashed(number) else token for number, token in enumerate(self.tokens)]
        self._load_cached(cache_file, keys)
        if not all(self.tokens[number] for number in numbers):
            with ExitStack() as stack:
                try:
                    stack.enter_context(exclusive_lock(cache, f"digests-{cache_file.name}"))
                except DataError as error:
                    self._warn_not_cached(error.what)
                self._load_cached(cache_file, keys)  # another process may have hashed them meanwhile
                self._run_in_threads(self._hash_file, [number for number in numbers if not self.tokens[number]])
                try:
                    cache_file.write(
                        {key: self.tokens[number] for number, key in keys.items() if self._is_settled[number]}
                    )
                except OSError as error:
                    self._warn_not_cached(str(error))

    def _load_cached(self, cache_file: _DigestCache, keys: Mapping[int, bytes]) -> None:
        digests = cache_file.read()
        for number, key in keys.items():
            self.tokens[number] = digests.get(key, "")

    def _warn_not_cached(self, reason: str) -> None:
        self.warnings = (f"digests of the data cannot be cached, so that every start hashes it again: {reason}",)

    def _cache_key(self, number: int) -> bytes:
        """Return a key that changes whenever the file changes; empty if there is none."""
        file = self._files[number]
        if file.local_path:
            return self._stamps[number] or b""
        return _short(f"{file.where} {file.size_bytes} {file.checksum}") if file.checksum else b""

    def _hash_file(self, number: int, on_bytes: Callable[[int], None]) -> None:
        file = self._files[number]
        if not file.local_path:
            content = self._access.read(number, 0, file.size_bytes)
            if len(content) != file.size_bytes:
                raise self._changed_error(number)
            self.tokens[number] = hashlib.sha256(content).hexdigest()
            on_bytes(file.size_bytes)
            return
        began = time.time_ns()
        before, after, token = self._access.call(number, lambda: hash_file(file.local_path, on_bytes))
        if not self._stamps[number] == _make_stamp(before) == _make_stamp(after) or before.st_size != file.size_bytes:
            raise self._changed_error(number)
        self.tokens[number] = token
        self._is_settled[number] = before.st_ctime_ns + MIN_CTIME_AGE_NS <= began

    def _hash_sample(self, number: int, on_bytes: Callable[[int], None]) -> None:
        digest = hashlib.sha256()
        for first, end in self._access.sample_ranges(number):
            block = self._access.read(number, first, end)
            digest.update(f"{first} {end}\n".encode() + block)
            on_bytes(len(block))
        self.tokens[number] = f"sample:{digest.hexdigest()}"

    def _run_in_threads(self, work: Callable[[int, Callable[[int], None]], None], numbers: Sequence[int]) -> None:
        """Call `work` for files in threads, and report progress. `work` reports the number of bytes that it has read
        with its second argument."""
        total = sum(self._files[number].size_bytes for number in numbers)
        pending, stopped, lock = iter(numbers), threading.Event(), threading.Lock()
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            if stopped.is_set():
                raise _StoppedError
            with lock:
                done += count

        def run() -> None:
            for number in pending:  # all threads share this iterator
                work(number, on_bytes)
                on_bytes(0)

        if not numbers:
            return
        last_done, last_report_s = -1, time.monotonic()
        with ThreadPoolExecutor(min(self._num_threads, len(numbers))) as pool:
            running = {pool.submit(run) for _ in range(min(self._num_threads, len(numbers)))}
            try:
                while running:
                    ended, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in ended:
                        future.result()
                    if done != last_done:
                        last_done = done
                        note_progress()
                    if time.monotonic() - last_report_s >= PROGRESS_INTERVAL_S:
                        last_report_s = time.monotonic()
                        self._on_progress(f"hashing {done / 1e9:.1f} of {total / 1e9:.1f} GB")
            finally:
                stopped.set()


def read_stamps(files: Iterable[DataFile], access: FileAccess) -> list[FileStamp | None]:
    """Return the stamps of the local files, and None for the others."""
    stamps: list[FileStamp | None] = []
    for number, file in enumerate(files):
        stamps.append(access.call(number, partial(_read_stamp, file.local_path)) if file.local_path else None)
        note_progress()
    return stamps


def hash_file(path: str, on_bytes: Callable[[int], None]) -> tuple[os.stat_result, os.stat_result, str]:
    """Return the status of a local file before and after reading it, and the SHA-256 of its content in hex."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with io.FileIO(path) as file:
        before = os.fstat(file.fileno())
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
        return before, os.fstat(file.fileno()), digest.hexdigest()


def changed_file_error(where: str) -> DataError:
    """Return the error for a file that changed."""
    return DataError(
        "changed while it was being read",
        where=where,
        fix="wait until it is completely written, and run the same command again",
    )


class _StoppedError(Exception):
    """Another thread has failed, or the user has interrupted the program."""


class _DigestCache:
    """The digest file of one dataset: a table of keys and digests, replaced as a whole."""

    KEY, ROW = 16, 48
    """Number of bytes of a key, and of a key with its digest."""

    def __init__(self, cache: CacheConfig, url: str) -> None:
        self.name = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._folder = Path(cache.folder).expanduser().absolute()
        self._path = self._folder / f"{DIGEST_CACHE_PREFIX}{self.name}.npy"

    def read(self) -> dict[bytes, str]:
        """Return the digests in hex by key; none if the file is absent or damaged."""
        try:
            table = np.load(self._path, allow_pickle=False)
            os.utime(self._path)
        except (OSError, ValueError, EOFError):
            return {}
        if table.dtype != np.uint8 or table.shape[1:] != (self.ROW,):
            return {}
        rows, key = table.tobytes(), self.KEY
        return {
            rows[first : first + key]: rows[first + key : first + self.ROW].hex()
            for first in range(0, len(rows), self.ROW)
        }

    def write(self, digests: Mapping[bytes, str]) -> None:
        """Write these digests, and drop all others."""
        rows = b"".join(key + bytes.fromhex(digest) for key, digest in digests.items())
        table = np.frombuffer(rows, np.uint8).reshape(-1, self.ROW)
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.save(file, table)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        for path in self._folder.glob(f"{DIGEST_CACHE_PREFIX}*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > DIGEST_CACHE_TTL_S:
                    path.unlink()


def _short(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=_DigestCache.KEY).digest()


def _make_stamp(status: os.stat_result) -> FileStamp:
    return _short(f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")


def _read_stamp(path: str) -> FileStamp:
    """Return the stamp of a local file. It is opened for this, because a network file system may otherwise return a
    cached status."""
    with io.FileIO(path) as file:
        return _make_stamp(os.fstat(file.fileno()))
