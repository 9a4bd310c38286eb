"""The reader of each file format of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pipeline.config import SOURCE_CONFIGS, CsvDataConfig, TableColumnsConfig, TableDataConfig, UserFunctionConfig
from pipeline.data.sources.tables.files import HEAD_BYTES, TableFiles, file_errors
from pipeline.data.sources.tables.parquet import MAX_CHECKED_FILES, ParquetFiles
from pipeline.data.sources.tables.partitions import find_table_files
from pipeline.data.sources.tables.sniff import check_head, read_first_head, sniff_head
from pipeline.errors import DataError
from pipeline.redaction import resolve_env


def config_of_url(data: TableColumnsConfig, url: str, text_columns: Sequence[str] = ()) -> TableDataConfig:
    """Return the configuration for other files, which may have another format.

    Parameters
    ----------
    data: the configuration of the training data; how its files are read holds for others of the same format.
    text_columns: columns that are text in formats whose columns have no types.

    Raises
    ------
    DataError: there are no files, or they are images.
    """
    file, head = read_first_head(resolve_env(url, "data.url"))
    source = sniff_head(head, file.name) or data.source  # its reader says what is wrong
    if isinstance(source, UserFunctionConfig):
        source = "parquet"
    if source == "image_folder":
        raise DataError("is an image, not a table", where=file.where, fix="name the files of tables")
    config_class = SOURCE_CONFIGS[str(source)]
    if isinstance(data, config_class):
        other = cast(TableDataConfig, data.model_copy(update={"url": url, "source": source}))
    else:
        common = {name: getattr(data, name) for name in TableColumnsConfig.model_fields}
        other = cast(TableDataConfig, config_class(**{**common, "source": source, "url": url}))
    return other.model_copy(update={"text_columns": list(text_columns)}) if source == "csv" else other


def open_table_files(data: TableDataConfig, *, read_layouts: bool = True) -> TableFiles:
    """Return the files of `data.url`, to be used as a context manager.

    Parameters
    ----------
    read_layouts: see `TableFiles`.

    Raises
    ------
    DataError: there are no files.
    """
    if isinstance(data, CsvDataConfig):  # a reader is imported when it is needed
        from pipeline.data.sources.tables.text.csv import CsvFiles

        return CsvFiles(data, read_layouts=read_layouts)
    if data.source == "jsonl":
        from pipeline.data.sources.tables.text.jsonl import JsonlFiles

        return JsonlFiles(data.url, data.cache, read_layouts=read_layouts)
    if data.source == "arrow":
        from pipeline.data.sources.tables.arrow import ArrowFiles

        return ArrowFiles(data.url, data.cache, read_layouts=read_layouts)
    if data.source == "numpy":
        from pipeline.data.sources.tables.numpy import NumpyFiles

        return NumpyFiles(data.url, data.cache, read_layouts=read_layouts)
    return ParquetFiles(data.url, data.cache, read_layouts=read_layouts)


def check_csv_files(url: str) -> None:
    """Check that there are files at a URL, and that the first of them may be CSV."""
    _check_format(url, "csv")


def check_arrow_files(url: str) -> None:
    """Check that there are files at a URL, and that the first of them may be Arrow IPC."""
    _check_format(url, "arrow")


def check_numpy_files(url: str) -> None:
    """Check that there are files at a URL, and that the first of them may be NumPy's."""
    _check_format(url, "numpy")


def check_jsonl_files(url: str) -> None:
    """Check that there are files at a URL, and that the first of them may be JSON lines."""
    _check_format(url, "jsonl")


def _check_format(url: str, source: str) -> None:
    """Check by their first bytes that the first files at a URL are of a source.

    Raises
    ------
    DataError: an unusable URL, no permission, no files, or one of another format.
    """
    reader, files = find_table_files(url)
    for file in files[:MAX_CHECKED_FILES]:
        with file_errors(file):
            head = reader.read_range(file.name, 0, min(file.size_bytes, HEAD_BYTES))
        check_head(file, head, source)
