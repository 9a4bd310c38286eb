"""`predict`: answers of a saved model for a table or for pictures, as Parquet."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import CacheConfig, ImageFolderDataConfig, ParquetDataConfig
from pipeline.data.sources.file_digests import select_num_read_threads
from pipeline.data.sources.images.decode import InvalidImageError, is_image_path, silence_pillow_warnings
from pipeline.data.sources.parquet.reader import ParquetFiles
from pipeline.data.tabular.encoder import suggest_columns
from pipeline.data.transforms import DataReport
from pipeline.errors import DataError, InputError, StorageError, TrainyardError
from pipeline.inference.inputs import decode_input_image, find_input_columns
from pipeline.inference.load import load
from pipeline.inference.predictor import Predictor
from pipeline.redaction import redact
from pipeline.storage import Storage
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.read_files import (
    IGNORED_IMAGE_PREFIXES,
    WILDCARD,
    FileReader,
    find_files,
    is_local,
    map_in_threads,
)
from pipeline.storage.retry import RetryPolicy

BATCH_ROWS = 16_384
"""Rows of a table in memory at once."""
BATCH_IMAGES = 256

MAX_LISTED = 10
"""Pictures that a message names."""

ArrowColumns = dict[str, pa.Array]


@dataclass(frozen=True)
class PredictResult:
    """What was written."""

    run: str
    step: int
    rows: int
    output: str
    report: DataReport
    """How the input's columns differ from the training rows."""
    skipped: tuple[str, ...] = ()
    """Broken pictures that were left out."""
    warnings: tuple[str, ...] = ()
    """What should not be overlooked."""

    def to_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in self.__dict__.items() if name != "report"}
        fields |= {"columns": self.report.to_json(), "skipped": list(self.skipped), "warnings": list(self.warnings)}
        return {**fields, "error": None}

    def format_lines(self) -> list[str]:
        lines = [f"{self.rows:,} rows by {self.run} at step {self.step} to {self.output}"]
        return lines + [f"  {line}" for line in self.report.format_lines()]


def predict(
    model: str,
    *,
    input: str,  # noqa: A002 - the public name of the option
    output: str,
    storage: str | None = None,
    device: str = "auto",
    trust: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
    on_warning: Callable[[str], None] = lambda text: None,
) -> PredictResult:
    """Write one row for each row of a table, or each picture, in their order.

    The columns: the job's `keys` that are there (of pictures: `path`); `prediction`, a class or the value (of several
    labels, each by its name); and `probability_CLASS` of each class. A key that is called as one of these columns gets
    `key_` before its name. Keys have one type for all files: the wider one where theirs differ, text for categories.
    The output appears whole or not at all; memory holds a batch of the input at a time, and the compressed output.

    Files, their columns and types, and the place of the output are checked before the first prediction.

    Parameters
    ----------
    model: RUN[@best|@last|@STEP], see `load`.
    input: Parquet at any fsspec URL: a file, glob or folder; for a model of pictures a picture, or a glob or folder of
        them. With the job's `data.on_error: skip`, broken pictures are left out, whatever their share.
    output: URL of the Parquet file to write; no part of the input.
    warn: takes what should not be overlooked, as soon as it is known.

    Raises
    ------
    InputError: no such model, an input that does not look like what it was trained on, or an output that cannot be
        written or would replace the input.
    """
    predictor = load(model, storage=storage, device=device, trust=trust)
    folder, name = _split_output_url(output)
    warnings: list[str] = []

    def tell(text: str) -> None:
        warnings.append(text)
        on_warning(text)

    count, writer, report = 0, None, DataReport(predictor.fitted.input_transform)
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="trainyard-predict-") as scratch:
        source = _open_input(predictor, input, output, tell, stack)
        _check_output_writable(folder, name, output)
        path = Path(scratch) / "output.parquet"
        try:
            for key_columns, data in source.iter_batches():
                table = pa.table(
                    {**key_columns, **_prediction_columns(predictor, predictor.predict_scores(data, report))}
                )
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
                count += table.num_rows
                on_progress(f"{count:,} rows")
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise InputError("has no rows", where=f"--input {input}", fix="check the URL")
        folder.replace(name, path.read_bytes(), sync=True)
    if source.skipped:
        listed = ", ".join(source.skipped[:MAX_LISTED]) + (", ..." if len(source.skipped) > MAX_LISTED else "")
        tell(f"{len(source.skipped):,} pictures are broken and left out: {listed}")
    for text in report.format_warnings():
        tell(text)
    skipped = tuple(source.skipped)
    return PredictResult(predictor.run, predictor.step, count, output, report, skipped, tuple(warnings))


def _open_input(
    predictor: Predictor, url: str, output: str, on_warning: Callable[[str], None], stack: ExitStack
) -> _TableInput | _ImageInput:
    """The input, looked at. stack: what ends its reading."""
    data = predictor.job.data
    if isinstance(data, ParquetDataConfig):
        files = ParquetFiles(url, CacheConfig())
        _check_output_outside_input(url, files.paths, output)
        return _TableInput(predictor, data, stack.enter_context(files), on_warning)
    if isinstance(data, ImageFolderDataConfig):
        return _ImageInput(predictor, data, url)
    raise InputError(
        f"this model was trained on {data.source}, which is neither tables nor pictures",
        where=f"--input {url}",
        fix="in Python: load(RUN).predict(array)",
    )


class _TableInput:
    """Rows of Parquet files, with their keys. All that footers tell is checked when it is made."""

    def __init__(
        self, predictor: Predictor, data: ParquetDataConfig, files: ParquetFiles, on_warning: Callable[[str], None]
    ) -> None:
        self.skipped: list[str] = []
        self._files = files
        self._inputs = _select_input_columns(predictor, files)
        self._keys = _unify_key_types(data.keys, files, on_warning)
        _check_casts(files, self._keys)
        taken = set(
            _prediction_columns(predictor, np.empty((0, len(predictor.classes) or predictor.fitted.num_outputs)))
        )
        self._names = [_unique_name(key, {*taken, *self._keys} - {key}, taken, on_warning) for key in self._keys]

    def iter_batches(self) -> Iterator[tuple[ArrowColumns, pa.RecordBatch]]:
        """Keys, and what the model takes of the same rows."""
        for number in range(len(self._files.files)):
            for batch in self._files.iter_batches(number, [*self._keys, *self._inputs], BATCH_ROWS):
                columns = [_cast(batch.column(key), kind) for key, kind in self._keys.items()]
                yield dict(zip(self._names, columns, strict=True)), batch.select(self._inputs)
            self._files.release(number)


def _select_input_columns(predictor: Predictor, files: ParquetFiles) -> list[str]:
    """The columns that the model takes, which every file has."""
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
    keys: Iterable[str], files: ParquetFiles, on_warning: Callable[[str], None]
) -> dict[str, pa.DataType]:
    """For each key that is there, the type that holds its values of all files.

    Raises
    ------
    DataError: a key that some files have and others have not, or types that nothing holds together.
    """
    unified: dict[str, pa.DataType] = {}
    types = [files.column_types(number) for number in range(len(files.files))]
    for key in dict.fromkeys(keys):
        files_without_key = [file for file, file_types in zip(files.files, types, strict=True) if key not in file_types]
        if len(files_without_key) == len(types):
            suggestions = suggest_columns(key, types[0])
            on_warning(f"the key {key!r} is not in {files.url}, and not in the output ({suggestions})")
            continue
        if files_without_key:
            raise DataError(
                f"the key {key!r} is not in this file, but in others",
                where=files_without_key[0].where,
                fix="write all files with the same columns",
            )
        for file, file_types in zip(files.files, types, strict=True):
            kind = _value_type(file_types[key])
            try:
                both = [pa.schema([(key, unified.get(key, kind))]), pa.schema([(key, kind)])]
                unified[key] = pa.unify_schemas(both, promote_options="permissive").field(key).type
            except pa.ArrowException:
                raise DataError(
                    f"the key {key!r} holds {kind} here, but {unified[key]} in {files.files[0].where}",
                    where=file.where,
                    fix="write all files with one type for each column",
                ) from None
    return unified


def _value_type(data_type: pa.DataType) -> pa.DataType:
    return _value_type(data_type.value_type) if pa.types.is_dictionary(data_type) else data_type


def _cast(array: pa.Array, data_type: pa.DataType) -> pa.Array:
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    return array if array.type == data_type else array.cast(data_type)


def _check_casts(files: ParquetFiles, keys: dict[str, pa.DataType]) -> None:
    """Read the keys of files whose types are others than the common ones: not every whole number is a float.

    Raises
    ------
    DataError: a value that the common type cannot hold.
    """
    for number, file in enumerate(files.files):
        file_types = files.column_types(number)
        for key, kind in keys.items():
            if _value_type(file_types[key]) == kind:
                continue
            for batch in files.iter_batches(number, [key], BATCH_ROWS):
                try:
                    _cast(batch.column(key), kind)
                except pa.ArrowException as error:
                    raise DataError(
                        f"the key {key!r} holds {file_types[key]} here and becomes {kind} in the output, as in other "
                        f"files, but not all of it can ({str(error).splitlines()[0]})",
                        where=file.where,
                        fix="write all files with one type for each column",
                    ) from None


def _unique_name(key: str, others: set[str], taken: set[str], on_warning: Callable[[str], None]) -> str:
    """What a key is called in the output, where the model's columns have their names."""
    name = key
    while name in taken or (name != key and name in others):
        name = f"key_{name}"
    if name != key:
        on_warning(f"the key {key!r} is called {name!r} in the output, where {key!r} is what the model says")
    return name


class _ImageInput:
    """Pictures by path."""

    def __init__(self, predictor: Predictor, data: ImageFolderDataConfig, url: str) -> None:
        self.skipped: list[str] = []
        self._data, self._shape = data, predictor.fitted.input_transform.output_shape
        self._where = f"--input {redact(url)}"
        self._files, self._paths = _find_images(url, self._where)

    def iter_batches(self) -> Iterator[tuple[ArrowColumns, np.ndarray]]:
        """Paths, and their pictures."""
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
                f"none of {len(self._paths):,} pictures can be decoded; {self._paths[0]}: {reason}",
                where=self._where,
                fix="see that they are pictures",
            )

    def _decode(self, path: str) -> np.ndarray | str:
        """A picture, or why there is none where the job skips such."""
        name = f"{self._files.printable}/{path}"
        try:
            return decode_input_image(self._files.read(path), name, self._data, self._shape)
        except FileNotFoundError:
            raise DataError("is gone", where=name, fix="leave the input as it is") from None
        except InvalidImageError as error:
            if self._data.on_error == "skip":
                return str(error)
            raise DataError(
                f"cannot be used as a picture: {error}",
                where=name,
                fix="replace or delete it; a job with data.on_error: skip leaves such out",
            ) from None


def _find_images(url: str, where: str) -> tuple[FileReader, list[str]]:
    """A folder, and the pictures below it that a URL means: one, what a glob matches, or all.

    Raises
    ------
    InputError: there are none.
    """
    fix = "a picture, or a glob or folder of them"
    try:
        files, file_names = find_files(url, IGNORED_IMAGE_PREFIXES, expand_folders=False)
    except FileNotFoundError:
        raise InputError("there is no such file or folder", where=where, fix=fix) from None
    if FileReader(url).kind() == "file":
        return files, list(file_names)
    image_names = [name for name in file_names if is_image_path(name)]
    if not image_names:
        raise InputError(
            f"no pictures among {len(file_names):,} files", where=where, fix=f"{fix}, such as .png and .jpg"
        )
    return files, image_names


def _prediction_columns(predictor: Predictor, scores: np.ndarray) -> dict[str, np.ndarray]:
    """What the model says, by the names of the output's columns."""
    answers = predictor.decode_predictions(scores)
    labels = predictor.job.data.labels
    if answers.ndim == 2:
        columns = {f"prediction_{name}": answers[:, index] for index, name in enumerate(labels)}
    else:
        columns = {"prediction": answers}
    for index, name in enumerate(predictor.classes):
        columns[f"probability_{name}"] = scores[:, index]
    return columns


def _split_output_url(output: str) -> tuple[Storage, str]:
    folder, slash, name = output.rpartition("/")
    if not name.endswith(".parquet"):
        raise InputError("must end in .parquet", where=f"--output {output}", fix=f"{output.rstrip('/')}/out.parquet")
    return Storage.open(folder + slash if folder else "." if not slash else "/"), name


def _check_output_outside_input(url: str, paths: Iterable[str], output: str) -> None:
    """Refuse an output that is part of the input: it would replace the user's data, or be read as data the next time.

    Raises
    ------
    InputError: names both.
    """
    (fs, source), (out_fs, target) = open_filesystem(url), open_filesystem(output)
    if type(fs) is not type(out_fs):
        return
    resolve = os.path.realpath if is_local(fs) else str
    target, files = resolve(target), {resolve(path) for path in paths}
    folders = [target[:index] for index, character in enumerate(target) if character == "/" and index] + [target]
    problem = ""
    if target in files:
        problem = "is a file of the input, which it would replace"
    elif match := WILDCARD.search(source):
        from fsspec.utils import glob_translate

        base, _, rest = source[: match.start()].rpartition("/")
        pattern = re.compile(glob_translate(f"{resolve(base)}/{rest}{source[match.start() :]}"))
        if any(pattern.fullmatch(folder) for folder in folders):
            problem = "is one that the input's glob matches: it would be read as input the next time"
    elif resolve(source.rstrip("/")) in folders:
        problem = "lies in the input's folder: it would be read as input the next time"
    if problem:
        raise InputError(
            problem, where=f"--output {redact(output)}", fix=f"write it elsewhere than --input {redact(url)}"
        )


def _check_output_writable(folder: Storage, name: str, output: str) -> None:
    """Try to write beside the output.

    Raises
    ------
    InputError: it is a folder, perhaps that of the input, or nothing can be written there.
    """
    where = f"--output {redact(output)}"
    fs, path = open_filesystem(output)
    if RetryPolicy(redact(output)).call(lambda: fs.isdir(path)):
        raise InputError("is a folder", where=where, fix="name a file that is not there yet, or one to replace")
    probe_name = f".{name}-{uuid.uuid4().hex[:8]}"
    try:
        folder.replace(probe_name, b"")
    except StorageError as error:
        raise InputError(error.what, where=where, fix=error.fix) from None
    with suppress(TrainyardError):
        folder.delete(probe_name)
