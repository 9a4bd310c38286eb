"""What identifies the content of the files of a data set: a digest of it, or what the store that holds them says of it.

- A file of this machine is hashed whole, whatever its size. The digest is remembered beside the cache of decoded data,
  by (device, inode, size, modification time, change time), as git's index does it. No program can set the change time
  (ctime), so an edit that keeps size and modification time is seen. (Where a file system has none of its own, as some
  mounts of object stores and FAT, the modification time stands for it.) An entry whose change time is not clearly older
  than its digest is not kept: a later edit might carry the same time.
- The files of a store, up to `HASHED_WHOLE` bytes in all, are hashed whole too: moving them between this machine and
  stores changes nothing. Beyond that the checksum or version in the store's listing stands for the content, and the
  same files elsewhere are other data.
- Where a store says nothing of that kind, blocks at fixed places are hashed, and a warning says what that may miss.

No modification time and no place is part of what identifies.
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
from pipeline.watchdog import note_progress

MAX_FULL_HASH_BYTES = 1 << 30
"""Up to so many bytes of files in all, those of a store are read and hashed as those of this machine always are."""

MIN_CACHED_DIGEST_BYTES = 64 << 20
"""From so many bytes of files in all, digests are remembered: to hash fewer again takes less than 50 ms."""

MIN_CTIME_AGE_NS = 2 * 10**9
"""A change time must be so much older than a digest: file systems count time in steps, of up to two seconds."""

DIGEST_CACHE_PREFIX = ".digests-"
"""How the files begin that hold them, in the folder of the cache."""

DIGEST_CACHE_TTL_S = 180 * 86_400
"""Digests of a data set that was not opened for so long are deleted."""

READ_BYTES = 1 << 20
"""Bytes of a file of this machine that are hashed at once."""

SAMPLES_PER_FILE = 4
SAMPLE_BYTES = 64 << 10
"""Where a store has no checksums: so many blocks of so many bytes of each file, the first and the last among them."""

MAX_CONCURRENT_REQUESTS = 16
"""Threads that read where each file takes a request over the network."""

PROGRESS_INTERVAL_S = 1.0

FileStamp = bytes
"""A digest of device, inode, size, modification time and change time of a file."""

ProgressFn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a data set.

    where: for messages, behind what is said of the data set. size: bytes, as listed.
    local: its path, where it is a file of this machine; else empty.
    checksum: what its store says of the content, see `storage.read_files.store_checksum`; else empty.
    """

    where: str
    size_bytes: int
    local_path: str = ""
    checksum: str = ""


class FileAccess(Protocol):
    """How the files of a data set are reached; each is known by its number."""

    def call(self, number: int, action: Callable[[], Any]) -> Any:
        """The action's result; the system's errors as errors of that file."""

    def read(self, number: int, first: int, end: int) -> bytes:
        """Some bytes of a file in a store, of which all may be asked for."""

    def sample_ranges(self, number: int) -> list[tuple[int, int]]:
        """Which bytes stand for the content of a file in a store that has no checksums."""

    def list_checksums(self) -> list[str]:
        """What the stores say now of every file, as in `DataFile`."""


def evenly_spaced_ranges(size: int) -> list[tuple[int, int]]:
    """Blocks of a file of so many bytes, first and last among them; all of a small one."""
    if size <= SAMPLES_PER_FILE * SAMPLE_BYTES:
        return [(0, size)]
    starts = [index * (size - SAMPLE_BYTES) // (SAMPLES_PER_FILE - 1) for index in range(SAMPLES_PER_FILE)]
    return [(first, first + SAMPLE_BYTES) for first in starts]


def select_num_read_threads(is_remote: bool) -> int:
    """How many threads are worth while to read and hash.

    is_far: whether a read takes a request over the network.
    """
    cores = available_cpus()
    return max(MAX_CONCURRENT_REQUESTS, cores) if is_remote else cores


class FileDigests:
    """What identifies the content of some files, found at once and side by side.

    tokens: for each file the SHA-256 of its content in hex, the store's checksum, or the digest of a sample.
    are_content: whether all tokens are of the first kind.
    warnings: what was assumed, and what cannot be kept.

    Parameters
    ----------
    url: of the data set; what is remembered of it lies under a digest of this.
    cache: beside which digests are remembered.
    threads: that read and hash.
    stamps: of the files of this machine as they were when first looked at; None for the others.
    where: of the data set, for messages.

    Raises
    ------
    DataError: a file changed while it was read. What `access` raises.
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
                f"the store tells no checksums, and there are {self._total_bytes / 1e9:,.1f} GB: blocks of each of "
                f"{len(sampled):,} files, such as {where}{files[sampled[0]].where}, stand for its content. A change "
                "between them that leaves its size as it was would not be seen: give changed data another URL",
            )

    def verify(self) -> None:
        """Raise DataError if a file is no longer what was identified: whatever was read of it since may be either."""
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
        """Digests of whole files: those that are remembered, and the others."""
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
                self._load_cached(cache_file, keys)  # another process may have been at it
                self._run_in_threads(self._hash_file, [number for number in numbers if not self.tokens[number]])
                try:
                    cache_file.write(
                        {key: self.tokens[number] for number, key in keys.items() if self._is_settled[number]}
                    )
                except OSError as error:
                    self._warn_not_cached(str(error))

    def _load_cached(self, remembered: _DigestCache, keys: Mapping[int, bytes]) -> None:
        known = remembered.read()
        for number, key in keys.items():
            self.tokens[number] = known.get(key, "")

    def _warn_not_cached(self, why: str) -> None:
        self.warnings = (f"digests of the data cannot be kept, so that every start hashes it again: {why}",)

    def _cache_key(self, number: int) -> bytes:
        """What tells that a file has not changed since it was hashed; empty where nothing does."""
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
        """Do some work on files by threads, which tell how many bytes they have moved."""
        total = sum(self._files[number].size_bytes for number in numbers)
        waiting, over, lock = iter(numbers), threading.Event(), threading.Lock()
        done = 0

        def moved(count: int) -> None:
            nonlocal done
            if over.is_set():
                raise _StoppedError
            with lock:
                done += count

        def run() -> None:
            for number in waiting:  # one iterator: each takes the next
                work(number, moved)
                moved(0)

        if not numbers:
            return
        seen, last_report_s = -1, time.monotonic()
        with ThreadPoolExecutor(min(self._num_threads, len(numbers))) as pool:
            running = {pool.submit(run) for _ in range(min(self._num_threads, len(numbers)))}
            try:
                while running:
                    ended, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in ended:
                        future.result()
                    if done != seen:
                        seen = done
                        note_progress()
                    if time.monotonic() - last_report_s >= PROGRESS_INTERVAL_S:
                        last_report_s = time.monotonic()
                        self._on_progress(f"hashing {done / 1e9:.1f} of {total / 1e9:.1f} GB")
            finally:
                over.set()


def read_stamps(files: Iterable[DataFile], access: FileAccess) -> list[FileStamp | None]:
    """Of the files of this machine; None for the others."""
    stamps: list[FileStamp | None] = []
    for number, file in enumerate(files):
        stamps.append(access.call(number, partial(_read_stamp, file.local_path)) if file.local_path else None)
        note_progress()
    return stamps


def hash_file(path: str, on_bytes: Callable[[int], None]) -> tuple[os.stat_result, os.stat_result, str]:
    """The status of a file of this machine before and after reading it, and the SHA-256 of its content in hex."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with io.FileIO(path) as file:
        before = os.fstat(file.fileno())
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
        return before, os.fstat(file.fileno()), digest.hexdigest()


def changed_file_error(where: str) -> DataError:
    """What to say of a file that did not stay as it was."""
    return DataError(
        "changed while it was being read",
        where=where,
        fix="wait until whatever writes it is done, and run the same command again",
    )


class _StoppedError(Exception):
    """Another thread has failed, or the user has had enough."""


class _DigestCache:
    """Digests of an earlier start, for one data set: a table of two columns, replaced as a whole."""

    KEY, ROW = 16, 48
    """Bytes of a key, and of a key with its digest."""

    def __init__(self, cache: CacheConfig, url: str) -> None:
        self.name = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._folder = Path(cache.folder).expanduser().absolute()
        self._path = self._folder / f"{DIGEST_CACHE_PREFIX}{self.name}.npy"

    def read(self) -> dict[bytes, str]:
        """Digests in hex by key; none where there are none, or the file is damaged."""
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
        """Keep these, and no others."""
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
    """Opened for it: a network file system asks its server then, and may else answer from memory."""
    with io.FileIO(path) as file:
        return _make_stamp(os.fstat(file.fileno()))
