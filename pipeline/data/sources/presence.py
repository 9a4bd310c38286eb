"""Whether the data of a job is there and of a kind that its source reads, found out by listing it, without torch."""

from __future__ import annotations

from pipeline.config import FileDataConfig, JobConfig, ParquetDataConfig
from pipeline.errors import DataError
from pipeline.redaction import redact, resolve_env
from pipeline.storage.read_files import IGNORED_IMAGE_PREFIXES, FileReader

MAX_CHECKED_FOLDERS = 16
"""Folders of classes in which pictures are looked for."""

FOLDER_HINT = (
    "one folder for each class, with pictures in it such as .png and .jpg; or a Parquet file of paths and labels"
)


def check_data_exists(job: JobConfig) -> None:
    """Look at what `data.url` names. Named sources, which may yet be downloaded, and functions are not looked at.

    Of tables, all files are listed, and the first of them must begin and end as Parquet does. Of pictures, the folder
    must have folders, and one of the first of these pictures or further folders.

    Raises
    ------
    DataError: there is no such data, or it is of another kind. StorageError: a URL that cannot be used.
    """
    if not isinstance(job.data, FileDataConfig):
        return
    url = resolve_env(job.data.url, "data.url")
    if isinstance(job.data, ParquetDataConfig) or url.endswith(".parquet"):
        from pipeline.data.sources.parquet.reader import check_parquet_files  # it needs Arrow

        check_parquet_files(url)
    else:
        _check_folder(url)


def _check_folder(url: str) -> None:
    files, where = FileReader(url), f"data.url: {redact(url)}"
    kind = files.kind()
    if kind == "file":
        raise DataError("is a file", where=where, fix=FOLDER_HINT)
    if kind == "missing":
        raise DataError("there is no such folder", where=where, fix="check the URL")
    classes = [name for name, is_folder in files.list_directory("", IGNORED_IMAGE_PREFIXES) if is_folder]
    if not classes:
        raise DataError("holds no folders, and so no classes", where=where, fix=FOLDER_HINT)
    from pipeline.data.sources.images.decode import is_image_path  # it needs Pillow

    for folder in classes[:MAX_CHECKED_FOLDERS]:
        inside = files.list_directory(folder, IGNORED_IMAGE_PREFIXES)
        if any(is_folder or is_image_path(name) for name, is_folder in inside):
            return
    raise DataError(
        f"no pictures in the folders {', '.join(classes[:MAX_CHECKED_FOLDERS])}", where=where, fix=FOLDER_HINT
    )
