"""Which Parquet files a URL means, and what the names of their folders say of their rows."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from pipeline.errors import DataError
from pipeline.redaction import redact
from pipeline.storage.read_files import FileReader, as_data_errors, find_files

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class ListedFile:
    """One file.

    name: path relative to the URL's folder, or to the part of a glob before its first wildcard.
    where: for messages. size: bytes. checksum: see `digests.DataFile`.
    partitions: what folders called `column=value` say of all its rows; None for Hive's word for null.
    """

    name: str
    where: str
    size_bytes: int
    partitions: dict[str, str | None]
    checksum: str


def find_parquet(url: str) -> tuple[FileReader, list[ListedFile]]:
    """The files of a URL, sorted by name: itself, what a glob matches, or all in a folder that are not ignored.

    Raises
    ------
    DataError: an unusable URL, no permission, a link that leads nowhere, or no files.
    """
    with as_data_errors(redact(url)):
        reader, found = find_files(url)
    files = [
        ListedFile(name, reader.location(name), info.size, _parse_partitions(name), info.checksum)
        for name, info in found.items()
    ]
    for file in files:
        if file.size_bytes < 0:
            raise DataError("is a link that leads nowhere", where=file.where, fix="remove it, or restore its file")
    if not files:
        raise DataError(
            "no files there", where=redact(url), fix="check the URL: a file, a glob such as *.parquet, or a folder"
        )
    return reader, files


def _parse_partitions(name: str) -> dict[str, str | None]:
    pairs = (part.split("=", 1) for part in name.split("/")[:-1] if "=" in part)
    return {unquote(column): None if value == NULL_PARTITION else unquote(value) for column, value in pairs}
