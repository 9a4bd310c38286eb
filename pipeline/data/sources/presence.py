"""Whether the data of a job is there and of a kind that its source reads, found out by listing it, without torch."""

from __future__ import annotations

from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import DataError
from pipeline.job import FileDataConfig, Job, ParquetDataConfig
from pipeline.redaction import looked_up
from pipeline.storage.faults import Patience, scrub
from pipeline.storage.filesystems import open_filesystem

LOOKED_INTO = 16
"""Folders of classes in which pictures are looked for."""

CLASSES = "one folder for each class, with pictures in it such as .png and .jpg; or a Parquet file of paths and labels"


def check_present(job: Job) -> None:
    """Look at what `data.url` names. Named sources, which may yet be downloaded, and functions are not looked at.

    Of tables, all files are listed, and the first of them must begin and end as Parquet does. Of pictures, the folder
    must have folders, and one of the first of these pictures or further folders.

    Raises
    ------
    DataError: there is no such data, or it is of another kind. StorageError: a URL that cannot be used.
    """
    if not isinstance(job.data, FileDataConfig):
        return
    url = looked_up(job.data.url, "data.url")
    if isinstance(job.data, ParquetDataConfig) or url.endswith(".parquet"):
        from pipeline.data.sources.parquet.files import check_files  # it needs Arrow

        check_files(url)
    else:
        _check_folder(url)


def _check_folder(url: str) -> None:
    where, patience = f"data.url: {scrub(url)}", Patience(scrub(url))
    fs, root = open_filesystem(url)
    if patience.call(lambda: fs.isfile(root)):
        raise DataError("is a file", where=where, fix=CLASSES)
    if not patience.call(lambda: fs.exists(root)):
        raise DataError("there is no such folder", where=where, fix="check the URL")
    classes = [name for name, is_folder in patience.call(partial(_entries, fs, root)) if is_folder]
    if not classes:
        raise DataError("holds no folders, and so no classes", where=where, fix=CLASSES)
    from pipeline.data.pictures import endings  # it needs Pillow

    for folder in classes[:LOOKED_INTO]:
        inside = patience.call(partial(_entries, fs, folder))
        if any(is_folder or PurePosixPath(name).suffix.lower() in endings() for name, is_folder in inside):
            return
    named = ", ".join(PurePosixPath(folder).name for folder in classes[:LOOKED_INTO])
    raise DataError(f"no pictures in the folders {named}", where=where, fix=CLASSES)


def _entries(fs: Any, folder: str) -> list[tuple[str, bool]]:
    """Paths of what lies in a folder, sorted, and whether each is a folder; without what begins with a dot."""
    found = []
    for entry in sorted(fs.ls(folder, detail=True), key=lambda entry: str(entry["name"])):
        name = str(entry["name"]).rstrip("/")
        if name.strip("/") != folder.strip("/") and not PurePosixPath(name).name.startswith("."):
            found.append((name, entry["type"] == "directory" or (bool(entry.get("islink")) and fs.isdir(name))))
    return found
