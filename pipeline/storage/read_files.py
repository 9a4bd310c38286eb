"""Reading files at any fsspec URL: finding them below a folder or a glob, and reading them from any thread or process.

All data comes in through this module, tables as well as images, so that one set of rules holds for both:

- Ignored files: a file is ignored where its name, or that of a folder between it and the URL, begins with one of the
  reader's ignored prefixes (Arrow's `ignore_prefixes`). The default is Arrow's and Spark's, "." and "_": writers of
  tables keep `_SUCCESS`, `_delta_log/` and unfinished files under such names. A Hive partition folder of a column that
  begins with an underscore, `_day=2024-01-01`, is data all the same. Image folders ignore "." alone, as torchvision's
  ImageFolder shows what begins with "_": cameras name photographs `_DSC0001.JPG`, and `_background_` is a class. Parts
  of the URL itself, and a URL that names a single file, are never ignored.
- Symbolic links on this machine are followed, as Arrow does. One that leads nowhere is a file of size -1.
- Faults of storage that may pass are retried, see `pipeline.storage.retry`. Others are a StorageError that names the
  URL, or FileNotFoundError where there is no such file; `as_data_errors` makes both a DataError.
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
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.retry import RetryPolicy, redact, summarize_error
from pipeline.watchdog import blocking_on, note_progress

T = TypeVar("T")
R = TypeVar("R")

IGNORED_PREFIXES = (".", "_")
"""Of tables; see the module's documentation."""

IGNORED_IMAGE_PREFIXES = (".",)

WILDCARD = re.compile(r"[*?\[]")

CHECKSUM_KEYS = ("md5Hash", "generation", "ETag", "etag", "blob_id", "CRC")
"""What listings of fsspec's stores call a checksum or version of the content: Google Cloud Storage (the first two),
S3 and HTTP, Azure, Hugging Face, zip archives."""


class FileInfo(NamedTuple):
    """What a listing says of a file.

    size: bytes; -1 where there is no such file. checksum: of the content, see `store_checksum`; empty where unknown.
    """

    size: int
    checksum: str = ""


MISSING = FileInfo(-1)


class FileReader:
    """The files below a folder, by their "/"-separated paths relative to it, and any others by whole URL.

    Can be used by many threads, and after a fork.

    Parameters
    ----------
    url: of the folder, or of what `find_files` was asked for.
    folder: path of the folder in the file system of `url`; by default that of `url`.
    printable: the folder's URL for messages, without secrets.
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
        """Whether the files are this machine's."""
        return is_local(self._open()[0])

    @property
    def is_remote(self) -> bool:
        """Whether a read takes a request over the network."""
        fs = self._open()[0]
        return not is_local(fs) and "memory" not in fs.protocol

    def kind(self) -> Literal["file", "folder", "missing"]:
        """What the URL names."""
        fs, folder = self._open()
        try:
            return "folder" if self.retry(lambda: fs.info(folder))["type"] == "directory" else "file"
        except FileNotFoundError:
            return "missing"

    @blocking_on("storage")
    def list_files(self, ignored: Sequence[str] = IGNORED_PREFIXES) -> dict[str, FileInfo]:
        """All files below the folder at any depth, sorted by path.

        Raises
        ------
        FileNotFoundError: there is no such folder, or a store has no files below it. StorageError: it cannot be read.
        """
        fs, folder = self._open()
        found = self.retry(lambda: dict(_list_files(fs, folder, ignored)))
        if not found and not (is_local(fs) and os.path.isdir(folder)):
            raise FileNotFoundError(folder)
        return self._relative(found, ignored)

    @blocking_on("storage")
    def list_directory(self, path: str = "", ignored: Sequence[str] = IGNORED_PREFIXES) -> list[tuple[str, bool]]:
        """Paths of the files and folders directly in a folder, sorted, each with whether it is a folder."""
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
        """What the store says of a file; `MISSING` where there is none."""
        fs, full = self._resolve(path)
        try:
            return _file_info(self.retry(lambda: fs.info(full)))
        except FileNotFoundError:
            return MISSING

    def local_path(self, path: str) -> str:
        """The path of a file of this machine; empty for one elsewhere."""
        fs, full = self._resolve(path)
        return full if is_local(fs) else ""

    def full_path(self, path: str) -> str:
        """The path of a file in its file system."""
        return self._resolve(path)[1]

    def location(self, path: str) -> str:
        """Where a file lies, for messages: a path of this machine, or a URL without secrets."""
        fs, full = self._resolve(path)
        return full if is_local(fs) else redact(fs.unstrip_protocol(full))

    @blocking_on("storage")
    def read(self, path: str) -> bytes:
        """The whole content of a file.

        Raises
        ------
        FileNotFoundError: there is no such file.
        """
        fs, full = self._resolve(path)
        return bytes(self.retry(lambda: fs.cat_file(full)))

    @blocking_on("storage")
    def read_range(self, path: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` up to `end`. Some servers send whole files alone: see `read`."""
        fs, full = self._resolve(path)
        return bytes(self.retry(lambda: fs.cat_file(full, start=start, end=end)))

    @blocking_on("storage")
    def download(self, path: str, target: str) -> None:
        """Copy a file to a path of this machine."""
        fs, full = self._resolve(path)
        self.retry(lambda: fs.get_file(full, target))

    def retry(self, action: Callable[[], T]) -> T:
        """The action's result; faults of storage that may pass are retried."""
        return self._retry.call(action)

    def _relative(self, found: Mapping[str, FileInfo], ignored: Sequence[str]) -> dict[str, FileInfo]:
        """Files by paths relative to the folder, sorted, without those to ignore."""
        prefix = len(self._open()[1].strip("/"))
        named = {full.strip("/")[prefix:].strip("/"): full for full in found}
        files = {path: found[named[path]] for path in sorted(named) if not is_ignored(path, ignored)}
        self._irregular = {path: named[path] for path in files if "//" in named[path]}
        return files

    def _resolve(self, path: str) -> tuple[Any, str]:
        """The file system and full path of a file."""
        if "://" in path:
            return open_filesystem(path)
        fs, folder = self._open()
        if path in self._irregular:
            return fs, self._irregular[path]
        scheme, separator, full = posixpath.join(folder, path).rpartition("://")
        return fs, f"{scheme}{separator}{posixpath.normpath(full)}"

    def _open(self) -> tuple[Any, str]:
        """The file system and the folder in it. Clients of a store do not survive a fork: each process has its own."""
        process = os.getpid()
        if process not in self._filesystems:
            fs, path = open_filesystem(self.url)
            self._filesystems[process] = fs, path if self._folder is None else self._folder
        return self._filesystems[process]


@blocking_on("storage")
def find_files(
    url: str, ignored: Sequence[str] = IGNORED_PREFIXES, *, expand_folders: bool = True
) -> tuple[FileReader, dict[str, FileInfo]]:
    """The files that a URL means, sorted by path: itself, all below a folder, or what a glob matches.

    Paths are relative to the folder, to that of a single file, or to the part of a glob before its first wildcard.

    Parameters
    ----------
    expand_folders: whether a folder that a glob matches stands for all files below it; else it is passed over.

    Raises
    ------
    FileNotFoundError: nothing is there; a glob that matches nothing is no error.
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
            raise  # with the store's own words: it may be the bucket
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
    """A reader of the folder in which a URL's last part lies, or all from its first wildcard at `end` on."""
    shown = url[:end].rpartition("/")[0] or ("/" if url.startswith("/") else ".")
    is_chain = "::" in url or ("://" in url) != ("://" in shown)
    return FileReader(url, folder=folder, printable=redact(url if is_chain else shown))


def is_ignored(path: str, prefixes: Sequence[str]) -> bool:
    """Whether a part of a relative path begins as those of files that are no data, see the module's documentation."""
    return any(
        part.startswith(prefix) and not (prefix == "_" and "=" in part)
        for part in path.split("/")
        for prefix in prefixes
    )


def is_local(fs: Any) -> bool:
    """Whether a file system of fsspec is this machine's."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def store_checksum(info: Mapping[str, Any]) -> str:
    """The checksum or version of a file's content by the listing of its store; empty where it has none.

    A weak ETag (`W/...`) is none: files that differ may share it.
    """
    for name in CHECKSUM_KEYS:
        value = str(info.get(name) or "").strip('"')
        if value and not value.startswith("W/"):
            return f"{name}:{value}"
    return ""


@contextmanager
def as_data_errors(where: str) -> Iterator[None]:
    """Errors of storage as DataError of what lies at `where`."""
    try:
        yield
    except FileNotFoundError as error:
        reason = f" ({summarize_error(error)})" if "://" in where else ""  # a store's own words: it may be the bucket
        raise DataError(
            f"is not there{reason}", where=where, fix="check the URL, and the bucket where it has one"
        ) from None
    except StorageError as error:
        raise DataError(error.what, where=where, fix=error.fix) from None


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`function` of every item, in order, by threads that work a little ahead.

    Each result counts as progress of the calling thread, see `pipeline.watchdog`.
    """
    if threads == 1:
        for item in items:
            yield function(item)
            note_progress()
        return
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(function, item) for item in islice(left, 2 * threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [pool.submit(function, item) for item in islice(left, 1)]
                yield result
                note_progress()
        finally:
            pool.shutdown(cancel_futures=True)


def _list_files(fs: Any, folder: str, ignored: Sequence[str]) -> Iterator[tuple[str, FileInfo]]:
    """Full paths of all files below a folder; ignored folders of this machine are not entered."""
    if is_local(fs):
        yield from _walk(folder, ignored)
        return
    fs.invalidate_cache()
    fs.ls(folder)  # `find` is silent about a folder that it may not read
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
    """Whether a path is a link to a folder that contains it: following it would never end."""
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
