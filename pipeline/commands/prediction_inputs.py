"""The input of `predict`: rows of tables with their keys, and images with their paths, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.config import ImageFolderDataConfig, TableColumnsConfig
from pipeline.data.sources.file_digests import select_num_read_threads
from pipeline.data.sources.images.decode import InvalidImageError, is_image_path, silence_pillow_warnings
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.tabular.encoder import suggest_columns
from pipeline.errors import DataError, InputError
from pipeline.inference.inputs import decode_input_image, find_input_columns
from pipeline.inference.predictor import Predictor
from pipeline.redaction import redact
from pipeline.storage.read_files import IGNORED_IMAGE_PREFIXES, FileReader, find_files, map_in_threads

BATCH_ROWS = 16_384
"""Rows of a table in memory at once."""
BATCH_IMAGES = 256
"""Images in memory at once."""

ArrowColumns = dict[str, pa.Array]


class TableInput:
    """Rows of table files, with their keys. The constructor checks the columns of all files.

    reserved: names of the columns of the predictions, which no key keeps.
    """

    def __init__(
        self,
        predictor: Predictor,
        data: TableColumnsConfig,
        files: TableFiles,
        reserved: set[str],
        on_warning: Callable[[str], None],
    ) -> None:
        self.skipped: list[str] = []
        self._files = files
        self._inputs = _select_input_columns(predictor, files)
        self._keys = _unify_key_types(data.keys, files, on_warning)
        _check_casts(files, self._keys)
        self._names = [_unique_name(key, {*reserved, *self._keys} - {key}, reserved, on_warning) for key in self._keys]

    def iter_batches(self) -> Iterator[tuple[ArrowColumns, pa.RecordBatch]]:
        """Yield the keys and the input columns of each batch of rows."""
        for number in range(len(self._files.files)):
            for batch in self._files.iter_batches(number, [*self._keys, *self._inputs], BATCH_ROWS):
                columns = [_cast(batch.column(key), key_type) for key, key_type in self._keys.items()]
                yield dict(zip(self._names, columns, strict=True)), batch.select(self._inputs)
            self._files.release(number)


def _select_input_columns(predictor: Predictor, files: TableFiles) -> list[str]:
    """Return the model's input columns, which every file must have."""
    columns: list[str] = []
    for number, file in enumerate(files.files):
        rows = files.row_counts[number]
        file_columns = find_input_columns(
            files.column_kinds(number), predictor.fitted.input_transform, predictor.job, rows, file.where
        )
        if columns and file_columns != columns:
            raise DataError(
                f"the samples are in column {file_columns[0]!r}, but in {columns[0]!r} of {files.files[0].where}",
                where=file.where,
                fix="write all files with the same columns",
            )
        columns = file_columns
    return columns


def _unify_key_types(
    keys: Iterable[str], files: TableFiles, on_warning: Callable[[str], None]
) -> dict[str, pa.DataType]:
    """Return, for each key that the files have, the common type of its values in all files.

    Raises
    ------
    DataError: only some files have a key, or its types have no common type.
    """
    unified: dict[str, pa.DataType] = {}
    types = [files.column_types(number) for number in range(len(files.files))]
    for key in dict.fromkeys(keys):
        files_without_key = [file for file, file_types in zip(files.files, types, strict=True) if key not in file_types]
        if len(files_without_key) == len(types):
            suggestions = suggest_columns(key, types[0])
            on_warning(f"the key {key!r} is not in {files.url}, so it is not in the output ({suggestions})")
            continue
        if files_without_key:
            raise DataError(
                f"the key {key!r} is not in this file, but in others",
                where=files_without_key[0].where,
                fix="write all files with the same columns",
            )
        for file, file_types in zip(files.files, types, strict=True):
            file_type = _value_type(file_types[key])
            try:
                schemas = [pa.schema([(key, unified.get(key, file_type))]), pa.schema([(key, file_type)])]
                unified[key] = pa.unify_schemas(schemas, promote_options="permissive").field(key).type
            except pa.ArrowException:
                raise DataError(
                    f"the key {key!r} is {file_type} in this file, but {unified[key]} in {files.files[0].where}",
                    where=file.where,
                    fix="write all files with one type for each column",
                ) from None
    return unified


def _value_type(data_type: pa.DataType) -> pa.DataType:
    """Return the type of the values, which for a dictionary-encoded column is that of its dictionary."""
    return _value_type(data_type.value_type) if pa.types.is_dictionary(data_type) else data_type


def _cast(array: pa.Array, data_type: pa.DataType) -> pa.Array:
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    return array if array.type == data_type else array.cast(data_type)


def _check_casts(files: TableFiles, keys: dict[str, pa.DataType]) -> None:
    """Read the keys whose type in a file differs from the common one, and check that each value can be converted: not
    every integer is a float.

    Raises
    ------
    DataError: the common type cannot hold a value.
    """
    for number, file in enumerate(files.files):
        file_types = files.column_types(number)
        for key, common_type in keys.items():
            if _value_type(file_types[key]) == common_type:
                continue
            for batch in files.iter_batches(number, [key], BATCH_ROWS):
                try:
                    _cast(batch.column(key), common_type)
                except pa.ArrowException as error:
                    raise DataError(
                        f"the key {key!r} is {file_types[key]} in this file and becomes {common_type} in the output, "
                        f"as in other files, but not every value can ({str(error).splitlines()[0]})",
                        where=file.where,
                        fix="write all files with one type for each column",
                    ) from None


def _unique_name(key: str, others: set[str], reserved: set[str], on_warning: Callable[[str], None]) -> str:
    """Return the name of a key in the output, which is none of the reserved names of the predictions' columns."""
    name = key
    while name in reserved or (name != key and name in others):
        name = f"key_{name}"
    if name != key:
        on_warning(f"the key {key!r} is named {name!r} in the output, where {key!r} is a column of the predictions")
    return name


class ImageInput:
    """Images, with their paths as keys."""

    def __init__(self, predictor: Predictor, data: ImageFolderDataConfig, url: str) -> None:
        self.skipped: list[str] = []
        self._data, self._shape = data, predictor.fitted.input_transform.output_shape
        self._where = f"--input {redact(url)}"
        self._files, self._paths = _find_images(url, self._where)

    def iter_batches(self) -> Iterator[tuple[ArrowColumns, np.ndarray]]:
        """Yield the paths and the pixels of each batch of images."""
        reason = ""
        for first in range(0, len(self._paths), BATCH_IMAGES):
            paths = self._paths[first : first + BATCH_IMAGES]
            with silence_pillow_warnings():
                images_or_reasons = list(
                    map_in_threads(self._decode, paths, select_num_read_threads(self._files.is_remote))
                )
            images = {
                path: pixels
                for path, pixels in zip(paths, images_or_reasons, strict=True)
                if isinstance(pixels, np.ndarray)
            }
            reason = reason or next((text for text in images_or_reasons if isinstance(text, str)), "")
            self.skipped += [path for path in paths if path not in images]
            if images:
                yield {"path": pa.array(list(images))}, np.stack(list(images.values()))
        if len(self.skipped) == len(self._paths):
            raise DataError(
                f"none of {len(self._paths):,} images can be decoded; {self._paths[0]}: {reason}",
                where=self._where,
                fix="check that they are images",
            )

    def _decode(self, path: str) -> np.ndarray | str:
        """Return an image, or the reason why it is broken if the job skips broken images."""
        name = f"{self._files.printable}/{path}"
        try:
            return decode_input_image(self._files.read(path), name, self._data, self._shape)
        except FileNotFoundError:
            raise DataError("no longer exists", where=name, fix="do not change the input meanwhile") from None
        except InvalidImageError as error:
            if self._data.on_error == "skip":
                return str(error)
            raise DataError(
                f"cannot be used as an image: {error}",
                where=name,
                fix="replace or delete it; a job with data.on_error: skip skips broken images",
            ) from None


def _find_images(url: str, where: str) -> tuple[FileReader, list[str]]:
    """Return a folder and the images in it that a URL names: one file, the matches of a glob, or all.

    Raises
    ------
    InputError: there are none.
    """
    fix = "name an image, or a glob or folder of images"
    try:
        files, file_names = find_files(url, IGNORED_IMAGE_PREFIXES, expand_folders=False)
    except FileNotFoundError:
        raise InputError("there is no such file or folder", where=where, fix=fix) from None
    if FileReader(url).kind() == "file":
        return files, list(file_names)
    image_names = [name for name in file_names if is_image_path(name)]
    if not image_names:
        raise InputError(f"no images among {len(file_names):,} files", where=where, fix=f"{fix}, such as .png and .jpg")
    return files, image_names
