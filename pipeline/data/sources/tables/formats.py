"""The reader of each file format of tables."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.config import CsvDataConfig, TableDataConfig
from pipeline.data.sources.tables.files import HEAD_BYTES, TableFiles, file_errors
from pipeline.data.sources.tables.parquet import MAX_CHECKED_FILES, ParquetFiles
from pipeline.data.sources.tables.partitions import find_table_files
from pipeline.data.sources.tables.sniff import check_head


def open_table_files(
    data: TableDataConfig, *, read_layouts: bool = True, text_columns: Collection[str] = ()
) -> TableFiles:
    """Return the files of `data.url`, to be used as a context manager.

    Parameters
    ----------
    read_layouts: see `TableFiles`.
    text_columns: columns that are text whatever they contain, in formats whose columns have no types.

    Raises
    ------
    DataError: there are no files.
    """
    if isinstance(data, CsvDataConfig):
        from pipeline.data.sources.tables.text.csv import CsvFiles

        return CsvFiles(data.url, data.cache, data=data, read_layouts=read_layouts, text_columns=text_columns)
    return ParquetFiles(data.url, data.cache, read_layouts=read_layouts)


def check_csv_files(url: str) -> None:
    """Check that there are files at a URL, and that the first of them may be CSV."""
    _check_format(url, "csv")


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
