"""Tell the format of a file by its first bytes, and so the source that reads it."""

from __future__ import annotations

import codecs
import re
import zlib

import pyarrow as pa

from pipeline.data.sources.tables.partitions import ListedFile, find_table_files
from pipeline.errors import DataError
from pipeline.redaction import redact
from pipeline.storage.read_files import as_data_errors

HEAD_BYTES = 4096

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed text, and Arrow's name of the codec."""

IMAGE_MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")

NAMES = {
    "parquet": "Parquet",
    "csv": "CSV",
    "arrow": "an Arrow (Feather) file",
    "numpy": "a NumPy file",
    "jsonl": "JSON lines",
    "image_folder": "an image",
}
"""What messages call the files of a source."""

UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def sniff_source(url: str) -> str:
    """Return the source that reads the files of a URL: parquet, csv, arrow, numpy, jsonl or image_folder.

    It is told by the content of the first file, not by its name.

    Raises
    ------
    DataError: there are no files, or the first is of no known format.
    StorageError: a URL that cannot be used.
    """
    file, head = read_first_head(url)
    source = sniff_head(head, file.name)
    if source is None:
        known = "Parquet, CSV, Arrow (Feather), NumPy (.npy, .npz), JSON lines or images"
        what = "is empty" if not head else "is of no known format" + _describe_unknown(head)
        raise DataError(what, where=file.where or redact(url), fix=f"use {known}")
    return source


def read_first_head(url: str) -> tuple[ListedFile, bytes]:
    """Return the first file of a URL that is not empty, and its first bytes.

    Raises
    ------
    DataError: there are no files, or it cannot be read.
    """
    reader, files = find_table_files(url)
    file = next((file for file in files if file.size_bytes), files[0])
    with as_data_errors(file.where):
        return file, reader.read_range(file.name, 0, min(file.size_bytes, HEAD_BYTES))


def sniff_head(head: bytes, name: str = "") -> str | None:
    """Return the source that reads a file with these first bytes; None if there is none.

    Parameters
    ----------
    name: the file's name, for an archive whose members cannot be seen.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.startswith(b"\x93NUMPY") or (head.startswith(b"PK\x03\x04") and _is_npz(head, name)):
        return "numpy"
    if head.startswith(IMAGE_MAGIC):
        return "image_folder"
    text = decompress_head(head)
    if not text or _describe_unknown(head) or (b"\0" in text and not text.startswith(UTF16_BOMS)):
        return None
    return "jsonl" if text.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[") else "csv"


def describe_format(head: bytes, expected: str) -> tuple[str, str]:
    """Return what a file with these first bytes is ("" if unknown), and how to fix a job that expects another format.

    Parameters
    ----------
    expected: the job's source.
    """
    source = sniff_head(head)
    if source is None or source == expected:
        return _describe_unknown(head).removeprefix(": "), "exclude it with a glob, or write it again"
    if source not in ("csv", "jsonl"):
        return NAMES[source], f"use source: {source}, or exclude it with a glob"
    name = next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), "")
    line = decompress_head(head).partition(b"\n")[0].decode(errors="replace").strip("\r\ufeff ")[:60]
    return (
        f"{NAMES[source]}{f' in {name}' if name else ''}, it begins with {line!r}",
        f"use source: {source}, or exclude it with a glob",
    )


def check_head(file: ListedFile, head: bytes, source: str) -> None:
    """Check by its first bytes that a file may be of a source.

    Raises
    ------
    DataError: it is empty, or of another format, which is named.
    """
    if not head:
        raise DataError("is empty", where=file.where, fix="write it again, or exclude it with a glob")
    found = sniff_head(head, file.name)
    if found == source or (found is None and source == "csv" and not _describe_unknown(head)):
        return  # in another encoding, or damaged: the reader says more
    name, fix = describe_format(head, source)
    raise DataError(f"is not {NAMES[source]}" + (f" but {name}" if name else ""), where=file.where, fix=fix)


def decompress_head(head: bytes) -> bytes:
    """Return the beginning of the text of a file with these first bytes, which may be compressed; empty if it is
    damaged."""
    codec = find_compression(head)
    if codec is None:
        return head
    if codec == "gzip":
        try:
            return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except zlib.error:
            return b""
    text = b""
    try:
        with pa.CompressedInputStream(pa.BufferReader(head), codec) as stream:
            while len(text) < HEAD_BYTES and (block := stream.read(1)):
                text += block
    except (pa.ArrowException, OSError):
        pass  # the head is cut off: what came before is enough
    return text


def find_compression(head: bytes) -> str | None:
    """Return Arrow's name of the codec of a compressed file, by its first bytes."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def _is_npz(head: bytes, name: str) -> bool:
    length = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + length].endswith(b".npy") or name.endswith(".npz")


def _describe_unknown(head: bytes) -> str:
    if head.startswith(b"PK\x03\x04"):
        if re.search(rb"xl/|\[Content_Types\]", head):
            return ": an Excel workbook (save it as CSV)"
        return ": a zip archive"
    if head.startswith(b"\x89HDF"):
        return ": an HDF5 file"
    if head.startswith(b"SQLite format 3"):
        return ": an SQLite database"
    return ": a compressed file" if head.startswith((b"\xfd7zXZ", b"\x04\x22\x4d\x18")) else ""
