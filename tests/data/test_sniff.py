"""The source of a file is told by its content."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.sources.tables.sniff import sniff_source
from pipeline.errors import DataError
from tests.data.table_files import write_stream, write_table

TABLE = pa.table({"a": [1, 2], "y": ["p", "q"]})


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 2)))
    return buffer.getvalue()


@pytest.mark.parametrize("source", ["parquet", "csv", "arrow", "numpy", "jsonl"])
def test_each_format_is_told_without_its_name(tmp_path: Path, source: str) -> None:
    write_table(tmp_path / "file", TABLE, source)
    assert sniff_source(str(tmp_path / "file")) == sniff_source(str(tmp_path)) == source


@pytest.mark.parametrize(
    ("content", "source"),
    [
        (b"a;b\n1;2\n", "csv"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0), "csv"),
        (gzip.compress(b'{"a": 1}\n', mtime=0), "jsonl"),
        (b'\xef\xbb\xbf\n {"a": 1}\n', "jsonl"),
        ("a,b\n".encode("utf-16"), "csv"),
        (npy(), "numpy"),
        (b"\x89PNG\r\n\x1a\n", "image_folder"),
    ],
)
def test_other_content(tmp_path: Path, content: bytes, source: str) -> None:
    (tmp_path / "file.txt").write_bytes(content)
    assert sniff_source(str(tmp_path / "file.txt")) == source


def test_a_stream_is_arrow(tmp_path: Path) -> None:
    assert sniff_source(str(write_stream(tmp_path / "file", TABLE))) == "arrow"


@pytest.mark.parametrize("content", [b"", b"\0\1\2", b"PK\x03\x04" + b"\0" * 40, b"\x89HDF\r\n"])
def test_unknown_content_is_a_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=r"is empty|no known format"):
        sniff_source(str(tmp_path / "file"))
    with pytest.raises(DataError, match="does not exist"):
        sniff_source(str(tmp_path / "none"))
