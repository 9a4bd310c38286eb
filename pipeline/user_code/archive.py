"""The archive of the user's code that is stored with a run, `code.zip`."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import PurePosixPath

from pipeline.errors import StorageError
from pipeline.user_code.dependencies import MAX_BYTES, MAX_FILES


def to_zip(files: Mapping[str, bytes]) -> bytes:
    """Return `code.zip`: the same bytes for the same files. Not compressed, because compression differs by machine."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path, content in sorted(files.items()):
            entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def from_zip(archive: bytes) -> dict[str, bytes]:
    """Return the Python files of a `code.zip`, by their paths below an import path.

    Raises
    ------
    StorageError: not a zip archive, or one with a file that `to_zip` would not have written.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            entries = opened.infolist()
            if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise _invalid_archive_error(f"it holds more than {MAX_FILES:,} files or {MAX_BYTES // 10**6} MB")
            return {_check_archive_path(entry.filename): opened.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise _invalid_archive_error(str(error)) from None


def _check_archive_path(name: str) -> str:
    path = PurePosixPath(name)
    if path.suffix != ".py" or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise _invalid_archive_error(f"it holds {name!r}")
    return path.as_posix()


def _invalid_archive_error(what: str) -> StorageError:
    return StorageError(f"not the archive that Trainyard stored: {what}", where="code.zip", fix="restore it")
