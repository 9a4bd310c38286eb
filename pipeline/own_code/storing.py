"""The user's own code as it is stored with a run, and taken out again."""

from __future__ import annotations

import atexit
import hashlib
import importlib.machinery
import importlib.util
import io
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from pipeline.errors import JobError, StorageError
from pipeline.job import Job
from pipeline.own_code.calling import is_installed, named_in

MOST_FILES, MOST_BYTES = 1_000, 10_000_000
"""Bounds of the code that is stored with a run."""


def sources(job: Job) -> dict[str, bytes]:
    """The Python files that a run would need to be rebuilt, by their paths below an import path, sorted.

    With `code`: all of that folder's; without: those of the packages and modules that the job names, installed ones
    left out. Hidden folders, caches and virtual environments are left out.

    Raises
    ------
    JobError: more than 1,000 files or 10 MB.
    """
    files = {}
    size = 0
    for path, file in _source_files(job):
        files[path] = file.read_bytes()
        size += len(files[path])
        if len(files) > MOST_FILES or size > MOST_BYTES:
            raise JobError(
                f"more than {MOST_FILES:,} Python files or {MOST_BYTES // 10**6} MB would be stored with the run",
                where=f"code: {job.code}" if job.code is not None else f"{file.parent}",
                fix="point code: at a smaller folder, one that holds the job's own modules alone",
            )
    return dict(sorted(files.items()))


def packed(files: Mapping[str, bytes]) -> bytes:
    """`code.zip`: the same bytes for the same files. Nothing is compressed: that would differ between machines."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path, content in sorted(files.items()):
            entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def digests(job: Job) -> dict[str, str]:
    """SHA-256 of what a job runs of the user's own: each file that is stored with the run, `code.zip` as a whole, and
    the source file of each installed module that the job names."""
    files = sources(job)
    found = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    if files:
        found["code.zip"] = hashlib.sha256(packed(files)).hexdigest()
    for module in sorted({name.partition(":")[0] for name in named_in(job)}):
        spec = _spec(module)
        if spec is not None and spec.origin is not None and is_installed(Path(spec.origin)):
            found[module] = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files and modules that differ between two answers of `digests`, sorted."""
    return sorted(name for name in {*before, *now} - {"code.zip"} if before.get(name) != now.get(name))


def unpacked(archive: bytes) -> Path:
    """The Python files of a `code.zip`, in a temporary folder that is deleted when this process ends.

    Raises
    ------
    StorageError: no such archive, or a file in it that `packed` would not have written; nothing is left then.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            entries = opened.infolist()
            if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise _not_ours(f"it holds more than {MOST_FILES:,} files or {MOST_BYTES // 10**6} MB")
            files = {_safe(entry.filename): opened.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise _not_ours(str(error)) from None
    folder = Path(tempfile.mkdtemp(prefix="trainyard-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def _source_files(job: Job) -> Iterator[tuple[str, Path]]:
    if job.code is not None:
        folder = Path(job.code).absolute()
        yield from ((file.relative_to(folder).as_posix(), file) for file in _python_files(folder))
        return
    for module in sorted({name.partition(":")[0].partition(".")[0] for name in named_in(job)}):
        spec = _spec(module)
        if spec is None:
            continue
        if spec.submodule_search_locations is not None:
            for package in map(Path, spec.submodule_search_locations):
                if not is_installed(package):
                    yield from ((file.relative_to(package.parent).as_posix(), file) for file in _python_files(package))
        elif spec.has_location and spec.origin is not None and not is_installed(Path(spec.origin)):
            yield Path(spec.origin).name, Path(spec.origin)


def _python_files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in ("__pycache__", "site-packages")
            and not (here / name / "pyvenv.cfg").is_file()
        )
        yield from (here / name for name in sorted(files) if name.endswith(".py") and (here / name).is_file())


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: __main__ of a notebook
        return None


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.suffix != ".py" or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise _not_ours(f"it holds {name!r}")
    return path


def _not_ours(what: str) -> StorageError:
    return StorageError(f"not the archive that Trainyard stored: {what}", where="code.zip", fix="restore it")
