"""`predict`: write the predictions of a saved model for a table or for images to a file."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.commands.prediction_files import ENDINGS, PredictionFile, find_ending
from pipeline.commands.prediction_inputs import ImageInput, TableInput
from pipeline.config import CacheConfig, ImageFolderDataConfig, TableColumnsConfig
from pipeline.config.quantiles import MEDIAN, quantile_name
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.sources.tables.formats import config_of_url, open_table_files
from pipeline.data.tabular.encoder import list_text_columns
from pipeline.data.transforms import DataReport
from pipeline.errors import InputError, StorageError, TrainyardError
from pipeline.format_metrics import format_number
from pipeline.inference.load import load
from pipeline.inference.predictor import Predictor
from pipeline.redaction import redact
from pipeline.storage import Storage
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.read_files import (
    WILDCARD,
    is_local,
)
from pipeline.storage.retry import RetryPolicy

MAX_LISTED = 10
"""Images that a message names."""


@dataclass(frozen=True)
class PredictResult:
    """What was predicted and written."""

    run: str
    step: int
    rows: int
    output: str
    threshold: float
    """Of a binary task, the probability above which the second class is predicted; else 0.5."""
    report: DataReport
    """How the input's columns differ from the training data."""
    skipped: tuple[str, ...] = ()
    """Broken images that were skipped."""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in self.__dict__.items() if name != "report"}
        fields |= {"columns": self.report.to_json(), "skipped": list(self.skipped), "warnings": list(self.warnings)}
        return {**fields, "error": None}

    def format_lines(self) -> list[str]:
        lines = [f"wrote {self.rows:,} rows predicted by {self.run} at step {self.step} to {self.output}"]
        if self.threshold != 0.5:
            lines.append(f"  threshold {format_number(self.threshold)} (task.threshold)")
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
    """Write one row for each row of a table, or for each image, in their order.

    The columns are the job's `keys` that the input has (for images: `path`); `prediction`, a class or a value (with
    several labels, one `prediction_LABEL` for each; with `task.quantiles`, `prediction_q10` for the quantile 0.1 and so
    on, and `prediction`, the median, if it is one of them; for multilabel `prediction_LABEL` and
    `probability_LABEL`, that of the label's positive value); `probability_CLASS` for each class; and for an ensemble
    `uncertainty`, the members' disagreement (see `Predictor.predict_with_uncertainty`; with several labels or quantiles
    `uncertainty_LABEL` or `uncertainty_q10`). A key with the name of one of these columns gets the prefix `key_`. A key
    has one type for all files: the wider one if theirs differ, text for categories. The output is written completely or
    not at all. Memory holds one batch of the input, and the compressed output.

    Files, their columns and types, and the output's location are checked before the first prediction.

    Parameters
    ----------
    model: RUN[@best|@last|@STEP], see `load`.
    input: tables in any format that is a source, such as Parquet or CSV, at any fsspec URL: a file, glob or folder. The
        format is told by the content, whatever the model was trained on. For a model of images an image, or a glob or
        folder of them. With the job's `data.on_error: skip`, broken images are skipped, whatever their fraction.
    output: URL of the file to write, outside the input: .parquet, .csv, .tsv (also .gz), .arrow or .feather.
    storage: URL of the runs; default: TRAINYARD_STORAGE, else ./runs.
    device: auto, cpu, cuda or mps.
    trust: allow the stored job to import the modules that it names.
    on_progress: receives the number of rows so far.
    on_warning: receives warnings as soon as they arise.

    Raises
    ------
    InputError: no such model, an input that does not match the training data, or an output that cannot be written or
        would replace the input.
    """
    predictor = load(model, storage=storage, device=device, trust=trust)
    folder, name, ending = _split_output_url(output)
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        on_warning(text)

    count, report = 0, DataReport(predictor.fitted.input_transform)
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="trainyard-predict-") as scratch:
        source = _open_input(predictor, input, output, warn, stack)
        _check_output_writable(folder, name, output)
        path = Path(scratch) / "output"
        with PredictionFile(path, ending, f"--output {redact(output)}") as written:
            for key_columns, data in source.iter_batches():
                scores, uncertainty = predictor.predict_scores_and_uncertainty(data, report)
                written.write(pa.table({**key_columns, **_prediction_columns(predictor, scores, uncertainty)}))
                count += len(scores)
                on_progress(f"{count:,} rows")
        if written.is_empty:
            raise InputError("has no rows", where=f"--input {input}", fix="check the URL")
        folder.replace(name, path.read_bytes(), sync=True)
    if source.skipped:
        listed = ", ".join(source.skipped[:MAX_LISTED]) + (", ..." if len(source.skipped) > MAX_LISTED else "")
        plural = "s" if len(source.skipped) > 1 else ""
        warn(f"skipped {len(source.skipped):,} broken image{plural}: {listed}")
    for text in report.format_warnings():
        warn(text)
    skipped = tuple(source.skipped)
    return PredictResult(
        predictor.run, predictor.step, count, output, predictor.threshold, report, skipped, tuple(warnings)
    )


def _open_input(
    predictor: Predictor, url: str, output: str, on_warning: Callable[[str], None], stack: ExitStack
) -> TableInput | ImageInput:
    """Open and check the input. stack: closes it."""
    data = predictor.job.data
    if isinstance(data, TableColumnsConfig):
        files = _open_tables(predictor, data, url)
        _check_output_outside_input(url, files.paths, output)
        reserved = set(_prediction_columns(predictor, *predictor.empty_scores()))
        return TableInput(predictor, data, stack.enter_context(files), reserved, on_warning)
    if isinstance(data, ImageFolderDataConfig):
        return ImageInput(predictor, data, url)
    raise InputError(
        f"this model was trained on {data.source}, which is neither tables nor images",
        where=f"--input {url}",
        fix="in Python: load(RUN).predict(array)",
    )


def _open_tables(predictor: Predictor, data: TableColumnsConfig, url: str) -> TableFiles:
    """Return the files of the input, which may have another format than the training data."""
    schema = predictor.fitted.input_transform.schema
    other = config_of_url(data, url, list_text_columns(schema) if schema is not None else [])
    return open_table_files(other.model_copy(update={"cache": CacheConfig()}))


def _prediction_columns(
    predictor: Predictor, scores: np.ndarray, uncertainty: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return the predictions by the names of their columns in the output."""
    predictions = predictor.decode_predictions(scores)
    quantiles = predictor.fitted.target_transform.quantiles
    is_multilabel = predictor.fitted.target_transform.kind == "multilabel"
    labels = [quantile_name(quantile) for quantile in quantiles] or predictor.job.data.labels
    columns = {}
    if is_multilabel:
        labels = list(predictor.classes)
        values = predictor.fitted.target_transform.decode_label_columns((scores > 0.5).astype(np.int64))
        columns = {f"prediction_{name}": column for name, column in zip(labels, values, strict=True)}
    elif quantiles or predictions.ndim == 2:
        columns |= {f"prediction_{name}": scores[:, index] for index, name in enumerate(labels)}
    else:
        columns = {"prediction": predictions}
    if MEDIAN in quantiles:
        columns = {"prediction": scores[:, quantiles.index(MEDIAN)], **columns}
    for index, name in enumerate(predictor.classes):
        columns[f"probability_{name}"] = scores[:, index]
    if uncertainty is not None and uncertainty.shape[1] == 1:
        columns["uncertainty"] = uncertainty[:, 0]
    elif uncertainty is not None:
        columns |= {f"uncertainty_{name}": uncertainty[:, index] for index, name in enumerate(labels)}
    return columns


def _split_output_url(output: str) -> tuple[Storage, str, str]:
    """Return the folder, the name of the file and its ending."""
    folder, slash, name = output.rpartition("/")
    ending = find_ending(name)
    if ending is None:
        raise InputError(
            f"must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}",
            where=f"--output {output}",
            fix=f"{output.rstrip('/')}/out.parquet",
        )
    return Storage.open(folder + slash if folder else "." if not slash else "/"), name, ending


def _check_output_outside_input(url: str, paths: Iterable[str], output: str) -> None:
    """Refuse an output that is part of the input: it would replace the user's data, or be read as input the next time.

    Raises
    ------
    InputError: names both URLs.
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
            problem = "matches the input's glob: it would be read as input the next time"
    elif resolve(source.rstrip("/")) in folders:
        problem = "is in the input's folder: it would be read as input the next time"
    if problem:
        raise InputError(problem, where=f"--output {redact(output)}", fix=f"write it outside --input {redact(url)}")


def _check_output_writable(folder: Storage, name: str, output: str) -> None:
    """Check that the output is not a folder and that a file can be written beside it.

    Raises
    ------
    InputError: it cannot be written.
    """
    where = f"--output {redact(output)}"
    fs, path = open_filesystem(output)
    if RetryPolicy(redact(output)).call(lambda: fs.isdir(path)):
        raise InputError("is a folder", where=where, fix="name a new file, or one to replace")
    probe_name = f".{name}-{uuid.uuid4().hex[:8]}"
    try:
        folder.replace(probe_name, b"")
    except StorageError as error:
        raise InputError(error.what, where=where, fix=error.fix) from None
    with suppress(TrainyardError):
        folder.delete(probe_name)
