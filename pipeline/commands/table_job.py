"""The job of a table that the caller of `train` holds in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import JobConfig, ParquetDataConfig
from pipeline.config.files import resolve_job
from pipeline.errors import InputError, TrainyardError
from pipeline.events import EventHandler, Message

if TYPE_CHECKING:  # it imports Arrow, which a job that is finished may not need
    from pipeline.data.tabular.in_memory import InMemoryTable

JOB_NAME = "table"
"""Name of the job unless an override sets another one."""


def is_job(
    value: Any,
    target: Any = None,
    *,
    label: str | Sequence[str] | None = None,
    task: str | Mapping[str, Any] | None = None,
) -> bool:
    """Return whether the arguments of `train` are a job rather than data. A mapping is data if labels are given.

    Raises
    ------
    InputError: a job together with options of data.
    """
    is_file = isinstance(value, JobConfig | str | Path)
    if not is_file and not isinstance(value, Mapping):
        return False
    options = {"target": target is not None, "label": label is not None, "task": task is not None}
    given = [name for name, is_given in options.items() if is_given]
    if not is_file and (options["target"] or options["label"]) and not isinstance(value.get("data"), Mapping):
        return False
    if given:
        raise InputError(
            f"goes with a table in memory, but {'a job file' if is_file else 'a job'} is given",
            where=f"train({', '.join(f'{name}=...' for name in given)})",
            fix="a job names its label and task itself; set= overrides them",
        )
    return True


@contextmanager
def open_table_job(
    data: Any,
    target: Any = None,
    *,
    label: str | Sequence[str] | None = None,
    task: str | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    on_event: EventHandler,
) -> Iterator[JobConfig]:
    """Provide the job that trains on a table in memory: `source: parquet` with a file of the cache, which is kept there
    at least until the context ends. Errors inside name the table instead of that file.

    Parameters
    ----------
    data, target, label: see `pipeline.data.tabular.in_memory.to_labeled_table`.
    task: as in a job file.
    overrides: `KEY=VALUE`.

    Raises
    ------
    InputError: the data is not a table, or the overrides make a job of another source.
    """
    from pipeline.data.stored_tables import store_table
    from pipeline.data.tabular.in_memory import WHERE, to_labeled_table

    table = to_labeled_table(data, target, label)
    job = resolve_job(_to_job_tree(table, task), overrides)
    if not isinstance(job.data, ParquetDataConfig):
        raise InputError(
            f"is {job.data.source}, but the data is a table in memory", where="data.source", fix="do not set it"
        )
    path, entry = store_table(table.table, job.data.cache)
    for note in table.notes:
        on_event(Message(note))
    try:
        yield job.model_copy(update={"data": job.data.model_copy(update={"url": str(path)})})
    except TrainyardError as error:
        error.what, error.where, error.fix = (
            text.replace(str(path), WHERE) for text in (error.what, error.where, error.fix)
        )
        raise
    finally:
        del entry  # until here it protects the file from deletion


def _to_job_tree(table: InMemoryTable, task: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the job as in a file, without what overrides set, and with a URL that `open_table_job` replaces."""
    labels = list(table.labels)
    data = {"source": "parquet", "url": "table", "label": labels if len(labels) > 1 else labels[0]}
    if table.categorical:
        data["categorical"] = list(table.categorical)
    tree: dict[str, Any] = {"name": JOB_NAME, "data": data}
    if task is not None or len(labels) > 1:
        tree["task"] = "regression" if task is None else dict(task) if isinstance(task, Mapping) else task
    return tree
