"""Check for the data of an image source, by listing folders; without torch."""

from __future__ import annotations

from pipeline.errors import DataError
from pipeline.redaction import redact
from pipeline.storage.read_files import IGNORED_IMAGE_PREFIXES, FileReader

MAX_CHECKED_FOLDERS = 16
"""Number of class folders that are searched for images."""

FOLDER_HINT = "use one folder per class, with images such as .png and .jpg; or a Parquet file of paths and labels"


def check_image_folder(url: str) -> None:
    """Check that a URL is a Parquet file, or a folder with folders, one of the first of which has images or folders.

    Raises
    ------
    DataError: there is no such data, or it is of another kind.
    StorageError: a URL that cannot be used.
    """
    if url.endswith(".parquet"):
        from pipeline.data.sources.tables.parquet import check_parquet_files  # it imports Arrow

        check_parquet_files(url)
        return
    reader, where = FileReader(url), f"data.url: {redact(url)}"
    kind = reader.kind()
    if kind == "file":
        raise DataError("is a file", where=where, fix=FOLDER_HINT)
    if kind == "missing":
        raise DataError("there is no such folder", where=where, fix="check the URL")
    classes = [name for name, is_folder in reader.list_directory("", IGNORED_IMAGE_PREFIXES) if is_folder]
    if not classes:
        raise DataError("has no folders, and so no classes", where=where, fix=FOLDER_HINT)
    from pipeline.data.sources.images.decode import is_image_path  # it imports Pillow

    for folder in classes[:MAX_CHECKED_FOLDERS]:
        entries = reader.list_directory(folder, IGNORED_IMAGE_PREFIXES)
        if any(is_folder or is_image_path(name) for name, is_folder in entries):
            return
    raise DataError(
        f"no images in the folders {', '.join(classes[:MAX_CHECKED_FOLDERS])}", where=where, fix=FOLDER_HINT
    )
