"""List the files of a URL, with the partition columns in the names of their folders."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from pipeline.data.stored_tables import explaining_missing_table
from pipeline.errors import DataError
from pipeline.redaction import redact
from pipeline.storage.read_files import FileReader, as_data_errors, find_files

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class ListedFile:
    """One file.

    name: path relative to the URL's folder, or to the part of a glob before its first wildcard.
    where: location for messages.
    size_bytes, checksum: see `file_digests.DataFile`.
    partitions: the values of folders `column=value`, which apply to all rows of the file; None for Hive's null.
    """

    name: str
    where: str
    size_bytes: int
    partitions: dict[str, str | None]
    checksum: str


def find_table_files(url: str) -> tuple[FileReader, list[ListedFile]]:
    """Return the files of a URL, sorted by name: a single file, the matches of a glob, or all files in a folder that
    are not ignored.

    Raises
    ------
    DataError: an unusable URL, no permission, a broken link, or no files.
    """
    with explaining_missing_table(url), as_data_errors(redact(url)):
        reader, infos = find_files(url)
    files = [
        ListedFile(name, reader.location(name), info.size, _parse_partitions(name), info.checksum)
        for name, info in infos.items()
    ]
    for file in files:
        if file.size_bytes < 0:
            raise DataError("is a broken link", where=file.where, fix="remove it, or restore its target")
    if not files:
        raise DataError(
            "there are no files", where=redact(url), fix="check the URL: a file, a glob such as *.parquet, or a folder"
        )
    return reader, files


def _parse_partitions(name: str) -> dict[str, str | None]:
    pairs = (part.split("=", 1) for part in name.split("/")[:-1] if "=" in part)
    return {unquote(column): None if value == NULL_PARTITION else unquote(value) for column, value in pairs}
