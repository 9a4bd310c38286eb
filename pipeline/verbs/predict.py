"""`predict`: answers of a saved model for a table or a folder of pictures, as Parquet."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.pictures import endings
from pipeline.data.preprocess import DataReport
from pipeline.data.sources.image_folder.files import Files
from pipeline.data.sources.parquet import batches
from pipeline.errors import InputError
from pipeline.predictor import Predictor
from pipeline.storage import Storage
from pipeline.verbs.load import load

BATCH_ROWS = 16_384
"""Rows of a table in memory at once."""
BATCH_PICTURES = 256


@dataclass(frozen=True)
class Predicted:
    """What was written."""

    run: str
    step: int
    rows: int
    output: str
    report: DataReport
    """How the input's columns differ from the training rows."""

    @property
    def warnings(self) -> list[str]:
        """What should not be overlooked."""
        return self.report.warnings()

    def to_json(self) -> dict[str, Any]:
        found = {name: value for name, value in self.__dict__.items() if name != "report"}
        return {**found, "columns": self.report.to_json(), "warnings": self.warnings, "error": None}

    def lines(self) -> list[str]:
        lines = [f"{self.rows:,} rows by {self.run} at step {self.step} to {self.output}"]
        return lines + [f"  {line}" for line in self.report.lines()]


def predict(
    model: str,
    *,
    input: str,  # noqa: A002 - the public name of the option
    output: str,
    storage: str | None = None,
    device: str = "auto",
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Predicted:
    """Write one row for each row of a table, or each picture of a folder, in their order.

    The columns: the job's `keys` that are there (of pictures: `path`); `prediction`, a class or the value (of several
    labels, each by its name); and `probability_CLASS` of each class. The output appears whole or not at all; memory
    holds a batch of the input at a time, and the compressed output.

    Parameters
    ----------
    model: RUN[@best|@last|@STEP], see `load`.
    input: Parquet at any fsspec URL: a file, glob or folder; for a model of pictures a folder of them.
    output: URL of the Parquet file to write.

    Raises
    ------
    InputError: no such model, or an input that does not look like what it was trained on.
    """
    predictor = load(model, storage=storage, device=device, trust=trust)
    folder, name = _place(output)
    count, writer, report = 0, None, DataReport(predictor.fitted.preprocess)
    with tempfile.TemporaryDirectory(prefix="trainyard-predict-") as scratch:
        path = Path(scratch) / "output.parquet"
        try:
            for table in _answered(predictor, input, report):
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
                count += table.num_rows
                say(f"{count:,} rows")
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise InputError("has no rows", where=f"--input {input}", fix="check the URL")
        folder.replace(name, path.read_bytes(), sync=True)
    return Predicted(predictor.run, predictor.step, count, output, report)


def _answered(predictor: Predictor, source: str, report: DataReport) -> Iterator[pa.Table]:
    job = predictor.job
    if job.data.source == "parquet":
        for batch in batches(source, None, BATCH_ROWS):
            keys = [key for key in job.data.keys if key in batch.schema.names]
            beside = pa.Table.from_batches([batch.select(keys)])
            yield _with_answers(predictor, beside, batch, report)
    elif job.data.source == "image_folder":
        files = Files(source)
        paths = [path for path in files.list() if Path(path).suffix.lower() in endings()]
        for first in range(0, len(paths), BATCH_PICTURES):
            some = paths[first : first + BATCH_PICTURES]
            contents = [files.read(path) for path in some]
            yield _with_answers(predictor, pa.table({"path": some}), contents, report)
    else:
        raise InputError(
            f"this model was trained on {job.data.source}, which is neither tables nor pictures",
            where=f"--input {source}",
            fix="in Python: load(RUN).predict(array)",
        )


def _with_answers(predictor: Predictor, beside: pa.Table, data: Any, report: DataReport) -> pa.Table:
    """`beside` and, behind its columns, what the model says of the same rows."""
    scores = predictor.scores(data, report)
    answers = predictor.answers(scores)
    labels = predictor.job.data.labels
    if answers.ndim == 2:
        columns = {f"prediction_{name}": answers[:, place] for place, name in enumerate(labels)}
    else:
        columns = {"prediction": answers}
    for place, name in enumerate(predictor.classes):
        columns[f"probability_{name}"] = scores[:, place]
    for name, values in columns.items():
        beside = beside.append_column(name, pa.array(values))
    return beside


def _place(output: str) -> tuple[Storage, str]:
    folder, slash, name = output.rpartition("/")
    if not name.endswith(".parquet"):
        raise InputError("must end in .parquet", where=f"--output {output}", fix=f"{output.rstrip('/')}/out.parquet")
    return Storage.open(folder + slash if folder else "." if not slash else "/"), name
