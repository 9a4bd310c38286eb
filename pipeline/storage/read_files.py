"""Find files by fsspec URL (a folder, a glob or a single file), and read them from any thread or process.

All data is read through this module, tables as well as images, so that the same rules apply to both:

- Ignored files: a file is ignored if its name, or that of a folder between it and the URL, begins with one of the
  reader's ignored prefixes (Arrow's `ignore_prefixes`). The default is that of Arrow and Spark, "." and "_": writers of
  tables use such names for `_SUCCESS`, `_delta_log/` and unfinished files. A Hive partition folder of a column whose
  name begins with an underscore, `_day=2024-01-01`, is not ignored. Image folders ignore only ".", because
  torchvision's ImageFolder includes names that begin with "_": cameras write `_DSC0001.JPG`, and `_background_` is a
  class. Parts of the URL itself, and the file of a single-file URL, are never ignored.
- Local symbolic links are followed, as in Arrow. A broken link is a file of size -1.
- Transient storage errors are retried, see `pipeline.storage.retry`. Others raise a StorageError with the URL, or
  FileNotFoundError; `as_data_errors` turns both into a DataError.
- Credentials come from the environment or the configuration of each store's library; messages never contain them.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.errors import DataError, StorageError
from pipeline.redaction import redact
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.retry import RetryPolicy, summarize_error
from pipeline.watchdog import blocking_on, note_progress

T = TypeVar("T")
R = TypeVar("R")

IGNORED_PREFIXES = (".", "_")
"""Prefixes for tables; see the docstring of this module."""

IGNORED_IMAGE_PREFIXES = (".",)

WILDCARD = re.compile(r"[*?\[]")

CHECKSUM_KEYS = ("md5Hash", "generation", "ETag", "etag", "blob_id", "CRC")
"""Keys of a checksum or version of the content in the listings of fsspec file systems: Google Cloud Storage (the first
two), S3 and HTTP, Azure, Hugging Face, zip archives."""


class FileInfo(NamedTuple):
    """The entry of a file in a listing.

    size: bytes; -1 if there is no such file.
    checksum: that of the content, see `store_checksum`; empty if unknown.
    """

    size: int
    checksum: str = ""


MISSING = FileInfo(-1)


class FileReader:
    """Reads the files below a folder by their "/"-separated paths relative to it, and any other file by its URL.

    It can be used by several threads, and after a fork.

    Parameters
    ----------
    url: URL of the folder, or the URL that was passed to `find_files`.
    folder: path of the folder in the file system of `url`; by default that of `url`.
    printable: URL of the folder for messages, without secrets.
    """

    def __init__(self, url: str, *, folder: str | None = None, printable: str | None = None) -> None:
        self.url = url
        self.printable = redact(url) if printable is None else printable
        self._folder = folder
        self._retry = RetryPolicy(self.printable)
        self._filesystems: dict[int, tuple[Any, str]] = {}
        self._irregular: dict[str, str] = {}

    @property
    def is_local(self) -> bool:
        """Whether the files are local."""
        return is_local(self._open()[0])

    @property
    def is_remote(self) -> bool:
        """Whether a read takes a network request."""
        fs = self._open()[0]
        return not is_local(fs) and "memory" not in fs.protocol

    def kind(self) -> Literal["file", "folder", "missing"]:
        """Return what the URL refers to."""
        fs, folder = self._open()
        try:
            return "folder" if self.retry(lambda: fs.info(folder))["type"] == "directory" else "file"
        except FileNotFoundError:
            return "missing"

    @blocking_on("storage")
    def list_files(self, ignored: Sequence[str] = IGNORED_PREFIXES) -> dict[str, FileInfo]:
        """Return all files below the folder at any depth, sorted by path.

        Raises
        ------
        FileNotFoundError: there is no such folder, or a store has no files below it.
        StorageError: the folder cannot be read.
        """
        fs, folder = self._open()
        files = self.retry(lambda: dict(_list_files(fs, folder, ignored)))
        if not files and not (is_local(fs) and os.path.isdir(folder)):
            raise FileNotFoundError(folder)
        return self._relative(files, ignored)

    @blocking_on("storage")
    def list_directory(self, path: str = "", ignored: Sequence[str] = IGNORED_PREFIXES) -> list[tuple[str, bool]]:
        """Return the sorted paths of the files and folders directly in a folder, each with whether it is a folder."""
        fs, full = self._resolve(path) if path else self._open()

        def list_once() -> list[tuple[str, bool]]:
            entries = []
            for entry in fs.ls(full, detail=True):
                name = str(entry["name"]).rstrip("/")
                base = posixpath.basename(name)
                if name.strip("/") != full.strip("/") and not is_ignored(base, ignored):
                    is_folder = entry["type"] == "directory" or (bool(entry.get("islink")) and fs.isdir(name))
                    entries.append((posixpath.join(path, base), is_folder))
            return sorted(entries)

        return self.retry(list_once)

    def stat(self, path: str) -> FileInfo:
        """Return the size and checksum of a file; `MISSING` if there is none."""
        fs, full = self._resolve(path)
        try:
            return _file_info(self.retry(lambda: fs.info(full)))
        except FileNotFoundError:
            return MISSING

    def local_path(self, path: str) -> str:
        """Return the path of a local file; empty for a remote one."""
        fs, full = self._resolve(path)
        return full if is_local(fs) else ""

    def full_path(self, path: str) -> str:
        """Return the path of a file in its file system."""
        return self._resolve(path)[1]

    def location(self, path: str) -> str:
        """Return the location of a file for messages: a local path, or a URL without secrets."""
        fs, full = self._resolve(path)
        return full if is_local(fs) else redact(fs.unstrip_protocol(full))

    @blocking_on("storage")
    def read(self, path: str) -> bytes:
        """Return the whole content of a file.

        Raises
        ------
        FileNotFoundError: there is no such file.
        """
        fs, full = self._resolve(path)
        return bytes(self.retry(lambda: fs.cat_file(full)))

    @blocking_on("storage")
    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Return the bytes `start` to `end` (exclusive) of a file. Some servers only send whole files: see `read`."""
        fs, full = self._resolve(path)
        return bytes(self.retry(lambda: fs.cat_file(full, start=start, end=end)))

    @blocking_on("storage")
    def download(self, path: str, target: str) -> None:
        """Copy a file to a local path."""
        fs, full = self._resolve(path)
        self.retry(lambda: fs.get_file(full, target))

    def retry(self, action: Callable[[], T]) -> T:
        """Run the action, retry it after transient storage errors, and return its result."""
        return self._retry.call(action)

    def _relative(self, files: Mapping[str, FileInfo], ignored: Sequence[str]) -> dict[str, FileInfo]:
        """Return the files by their paths relative to the folder, sorted, without the ignored ones."""
        prefix = len(self._open()[1].strip("/"))
        full_paths = {full.strip("/")[prefix:].strip("/"): full for full in files}
        relative = {path: files[full_paths[path]] for path in sorted(full_paths) if not is_ignored(path, ignored)}
        self._irregular = {path: full_paths[path] for path in relative if "//" in full_paths[path]}
        return relative

    def _resolve(self, path: str) -> tuple[Any, str]:
        """Return the file system and full path of a file."""
        if "://" in path:
            return open_filesystem(path)
        fs, folder = self._open()
        if path in self._irregular:
            return fs, self._irregular[path]
        scheme, separator, full = posixpath.join(folder, path).rpartition("://")
        return fs, f"{scheme}{separator}{posixpath.normpath(full)}"

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the folder in it. Each process opens its own, since clients of a store do not
        survive a fork."""
        pid = os.getpid()
        if pid not in self._filesystems:
            fs, path = open_filesystem(self.url)
            self._filesystems[pid] = fs, path if self._folder is None else self._folder
        return self._filesystems[pid]


@blocking_on("storage")
def find_files(
    url: str, ignored: Sequence[str] = IGNORED_PREFIXES, *, expand_folders: bool = True
) -> tuple[FileReader, dict[str, FileInfo]]:
    """Return the files of a URL, sorted by path: a single file, all files below a folder, or the matches of a glob.

    Paths are relative to the folder, to that of a single file, or to the part of a glob before its first wildcard.

    Parameters
    ----------
    expand_folders: whether a folder that a glob matches stands for all files below it; else it is skipped.

    Raises
    ------
    FileNotFoundError: there is no such file or folder. A glob without a match is no error.
    StorageError: an unusable URL, or no permission.
    """
    fs, path = open_filesystem(url)
    wildcard = WILDCARD.search(path)
    reader = FileReader(url)
    fs.invalidate_cache()
    try:
        info = reader.retry(lambda: fs.info(path))
    except FileNotFoundError:
        if wildcard is None:
            raise  # with the store's message: the bucket may be missing
    else:
        if info["type"] == "directory":
            return reader, reader.list_files(ignored)
        reader = _reader_below(url, len(url), path.rpartition("/")[0])
        return reader, reader._relative({path: _file_info(info)}, ())
    assert wildcard is not None
    in_url = WILDCARD.search(url)
    assert in_url is not None, "paths are parts of their URLs"
    reader = _reader_below(url, in_url.start(), path[: wildcard.start()].rpartition("/")[0])
    return reader, reader._relative(reader.retry(lambda: _glob(fs, path, ignored, expand_folders)), ignored)


def _reader_below(url: str, end: int, folder: str) -> FileReader:
    """Return a reader of the folder that contains the last part of a URL, or its part from the wildcard at `end`."""
    shown = url[:end].rpartition("/")[0] or ("/" if url.startswith("/") else ".")
    is_chain = "::" in url or ("://" in url) != ("://" in shown)
    return FileReader(url, folder=folder, printable=redact(url if is_chain else shown))


def is_ignored(path: str, prefixes: Sequence[str]) -> bool:
    """Return whether a part of a relative path begins with one of the prefixes; see the docstring of this module."""
    return any(
        part.startswith(prefix) and not (prefix == "_" and "=" in part)
        for part in path.split("/")
        for prefix in prefixes
    )


def is_local(fs: Any) -> bool:
    """Return whether an fsspec file system is local."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def store_checksum(info: Mapping[str, Any]) -> str:
    """Return the checksum or version of a file's content from the listing of its store; empty if it has none.

    A weak ETag (`W/...`) does not count: different files may share it.
    """
    for name in CHECKSUM_KEYS:
        value = str(info.get(name) or "").strip('"')
        if value and not value.startswith("W/"):
            return f"{name}:{value}"
    return ""


@contextmanager
def as_data_errors(where: str) -> Iterator[None]:
    """Turn storage errors into a DataError at `where`."""
    try:
        yield
    except FileNotFoundError as error:
        reason = f" ({summarize_error(error)})" if "://" in where else ""  # the store's message: it may be the bucket
        raise DataError(f"does not exist{reason}", where=where, fix="check the URL, and the bucket if any") from None
    except StorageError as error:
        raise DataError(error.what, where=where, fix=error.fix) from None


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield the results of `function` for all items, in order, computed by threads a few items ahead.

    Each result counts as progress of the calling thread; see `pipeline.watchdog`.
    """
    if threads == 1:
        for item in items:
            yield function(item)
            note_progress()
        return
    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(function, item) for item in islice(remaining, 2 * threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [pool.submit(function, item) for item in islice(remaining, 1)]
                yield result
                note_progress()
        finally:
            pool.shutdown(cancel_futures=True)


def _list_files(fs: Any, folder: str, ignored: Sequence[str]) -> Iterator[tuple[str, FileInfo]]:
    """Yield the full paths of all files below a folder. Ignored local folders are not entered."""
    if is_local(fs):
        yield from _walk(folder, ignored)
        return
    fs.invalidate_cache()
    fs.ls(folder)  # `find` raises no error for a folder without permission
    for path, info in fs.find(folder, detail=True).items():
        if info["type"] == "file" and path.strip("/") != folder.strip("/") and not path.endswith("/"):
            yield path, _file_info(info)


def _walk(root: str, ignored: Sequence[str]) -> Iterator[tuple[str, FileInfo]]:
    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not is_ignored(name, ignored) and not _links_upwards(os.path.join(folder, name), folder)
        ]
        for name in names:
            path = os.path.join(folder, name)
            yield path, _local_info(path)
            note_progress()


def _links_upwards(path: str, folder: str) -> bool:
    """Return whether a path is a link to a folder that contains it, which would be followed without end."""
    return os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/")


def _glob(fs: Any, pattern: str, ignored: Sequence[str], expand_folders: bool) -> dict[str, FileInfo]:
    fs.invalidate_cache()
    files: dict[str, FileInfo] = {}
    for path, info in fs.glob(pattern, detail=True).items():
        if info["type"] == "directory" or (is_local(fs) and os.path.isdir(path)):
            files.update(_list_files(fs, path, ignored) if expand_folders else ())
        else:
            files[path] = _local_info(path) if is_local(fs) else _file_info(info)
    return files


def _file_info(info: Mapping[str, Any]) -> FileInfo:
    return FileInfo(int(info["size"]), store_checksum(info))


def _local_info(path: str) -> FileInfo:
    try:
        return FileInfo(os.stat(path).st_size)
    except FileNotFoundError:
        return MISSING
