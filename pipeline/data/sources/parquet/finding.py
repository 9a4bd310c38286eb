"""Which files a URL means, in an order that does not depend on where they lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from pipeline.data.sources.digests import store_checksum
from pipeline.errors import DataError, StorageError
from pipeline.storage.faults import Patience, explain, scrub
from pipeline.storage.filesystems import open_filesystem
from pipeline.watchdog import waits_for

MAGIC = re.compile(r"[*?\[]")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class File:
    """One file.

    name: path relative to the URL's folder, or to the part of a glob before its first wildcard.
    path: for the file system. where: for messages. size: bytes. checksum: see `DataFile`.
    partitions: what folders called `column=value` say of all its rows; None for Hive's word for null.
    """

    name: str
    path: str
    where: str
    size: int
    partitions: dict[str, str | None]
    checksum: str = ""


@dataclass(frozen=True, eq=False)
class Place:
    """A file system and how patiently it is asked."""

    fs: Any
    url: str

    @property
    def is_local(self) -> bool:
        protocols = self.fs.protocol
        return "file" in ((protocols,) if isinstance(protocols, str) else protocols)

    @waits_for("storage")
    def ask(self, action: Callable[[], Any], where: str) -> Any:
        """The action's answer, passing faults repeated.

        Raises
        ------
        DataError: no such file, no permission, or whatever else a person must put right.
        """
        with named(where):
            return Patience(where).call(action)


@contextmanager
def named(where: str) -> Iterator[None]:
    """Errors of storage as errors of the data that lies there."""
    try:
        yield
    except FileNotFoundError as error:
        reason = f" ({explain(error)})" if "://" in where else ""  # a store's own words: it may be the bucket
        raise DataError(
            f"is not there{reason}", where=where, fix="check the URL, and the bucket where it has one"
        ) from None
    except StorageError as error:
        raise DataError(error.what, where=where, fix=error.fix) from None


def find_files(url: str) -> tuple[Place, list[File]]:
    """The files of a URL, sorted by name: itself, what a glob matches, or all in a folder but those that are hidden.

    Raises
    ------
    DataError: an unusable URL, no permission, or no files.
    """
    place, path = _opened(url)
    found = place.ask(lambda: _listed(place.fs, path), place.url)
    base = _base(path) if MAGIC.search(path) else path.rstrip("/")
    if list(found) == [path]:
        base = path.rpartition("/")[0]
    files = []
    for name, (size, checksum) in found.items():
        relative = name[len(base) :].strip("/")
        if not any(_is_hidden(part) for part in relative.split("/")):
            where = name if place.is_local else scrub(place.fs.unstrip_protocol(name))
            files.append(File(relative, name, where, size, _partitions(relative), checksum))
    if not files:
        raise DataError(
            "no files there", where=place.url, fix="check the URL: a file, a glob such as *.parquet, or a folder"
        )
    return place, sorted(files, key=lambda file: file.name)


def _opened(url: str) -> tuple[Place, str]:
    where = scrub(url)
    with named(where):
        fs, path = open_filesystem(url)
    return Place(fs, where), path


def _listed(fs: Any, path: str) -> dict[str, tuple[int, str]]:
    """Sizes and checksums of files by path."""
    fs.invalidate_cache()
    try:
        info = fs.info(path)
    except FileNotFoundError:
        if not MAGIC.search(path):
            raise
        matches = fs.glob(path, detail=True)
        files: dict[str, tuple[int, str]] = {}
        for match, about in matches.items():
            files.update(_within(fs, match) if about["type"] == "directory" else {match: _of(about)})
        return files
    return _within(fs, path) if info["type"] == "directory" else {path: _of(info)}


def _within(fs: Any, folder: str) -> dict[str, tuple[int, str]]:
    fs.ls(folder)  # `find` is silent about a folder that it may not read
    return {path: _of(about) for path, about in fs.find(folder, detail=True).items() if about["type"] == "file"}


def _of(info: Mapping[str, Any]) -> tuple[int, str]:
    return int(info["size"]), store_checksum(info)


def _base(glob: str) -> str:
    parts = glob.split("/")
    first = next(number for number, part in enumerate(parts) if MAGIC.search(part))
    return "/".join(parts[:first])


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _partitions(name: str) -> dict[str, str | None]:
    pairs = (part.split("=", 1) for part in name.split("/")[:-1] if "=" in part)
    return {unquote(column): None if value == NULL_PARTITION else unquote(value) for column, value in pairs}
