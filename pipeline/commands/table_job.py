"""The job of a table that is passed to `train` instead of a job: in memory, or as the URL of its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import JobConfig, TableDataConfig
from pipeline.config.files import parse_yaml, resolve_job
from pipeline.config.files.loading import merge_bases
from pipeline.errors import InputError, JobError, TrainyardError
from pipeline.events import EventHandler, Message, PhaseStarted, ignore_event

if TYPE_CHECKING:  # it imports Arrow, which a job that is finished may not need
    from pipeline.data.tabular.in_memory import InMemoryTable

JOB_FILE_ENDINGS = (".yaml", ".yml")

MAX_BATCH_ROWS = 1 << 16
"""Rows of a table that are looked at together."""

VALIDATION_FRACTION = 0.2

SOURCE = "parquet"

JOB_NAME = "table"
"""Name of the job unless an override sets another one."""


def is_job(
    value: Any,
    target: Any = None,
    *,
    label: str | Sequence[str] | None = None,
    task: str | Mapping[str, Any] | None = None,
) -> bool:
    """Return whether the arguments of `train` are a job rather than data.

    With a label, a mapping is a table, and a text is the URL of one unless it names a YAML file.

    Raises
    ------
    JobError: neither a job nor data.
    InputError: a job together with options of data.
    """
    if (value is None or isinstance(value, int | float)) and target is None and label is None:
        raise JobError(
            f"not a job or a table, but a value of type {type(value).__name__}",
            where="train",
            fix="give the path of a job file, its content as a dict, a JobConfig, a table or arrays",
        )
    is_file = isinstance(value, JobConfig | str | Path)
    if not is_file and not isinstance(value, Mapping):
        return False
    options = {"target": target is not None, "label": label is not None, "task": task is not None}
    given = [name for name, is_given in options.items() if is_given]
    if isinstance(value, str | Path) and options["label"] and not str(value).endswith(JOB_FILE_ENDINGS):
        return False
    if not is_file and (options["target"] or options["label"]) and not isinstance(value.get("data"), Mapping):
        return False
    if given:
        raise InputError(
            f"goes with a table, but {'a job file' if is_file else 'a job'} is given",
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
    features: Literal["auto"] | Sequence[str] = "auto",
    base: Mapping[str, Any] | str | Path | None = None,
    overrides: Iterable[str] = (),
    on_event: EventHandler = ignore_event,
) -> Iterator[JobConfig]:
    """Provide the job that trains on a table.

    For a table in memory it is one with `source: parquet` and a file of the cache, which is kept there at least until
    the context ends. Errors inside name the table instead of that file. For the URL of a table it is the job that
    `trainyard train URL --label COLUMN` writes.

    Parameters
    ----------
    data, target, label: see `pipeline.data.tabular.in_memory.to_labeled_table`; or a URL and a label.
    task: as in a job file; by default that of `job_from_data.choose_task`, unless an override sets it.
    features: `data.features`, unless `base` has it.
    base: a job file, or its content as a mapping, from which all is taken but the source, the label and the task.
    overrides: `KEY=VALUE`.

    Raises
    ------
    InputError: the data is not a table, or the overrides make a job of another source.
    """
    if isinstance(data, str | Path):
        yield _draft_file_job(str(data), target, label, task, overrides, on_event)
        return
    from pipeline.data.stored_tables import store_table
    from pipeline.data.tabular.in_memory import WHERE, to_labeled_table

    table, overrides = to_labeled_table(data, target, label), list(overrides)
    notes = list(table.notes)
    if task is None and not any(override.partition("=")[0].strip() in ("task", "task.kind") for override in overrides):
        task, reasons = _choose_task(table)
        notes += reasons
    job = resolve_job(_to_job_tree(table, task, features, base), overrides)
    if not isinstance(job.data, TableDataConfig) or job.data.source != SOURCE:
        raise InputError(
            f"is {job.data.source}, but the data is a table in memory", where="data.source", fix="do not set it"
        )
    path, entry = store_table(table.table, job.data.cache)
    for note in notes:
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


def _draft_file_job(
    url: str,
    target: Any,
    label: str | Sequence[str] | None,
    task: str | Mapping[str, Any] | None,
    overrides: Iterable[str],
    on_event: EventHandler,
) -> JobConfig:
    """Return the job for the table at a URL.

    Raises
    ------
    InputError: labels are given apart; or the table or its labels cannot be used.
    """
    from pipeline.commands.job_from_data import draft_job

    if target is not None or label is None:
        raise InputError("labels cannot be given apart from a file", where="train(target=...)", fix="use label=")
    labels = [label] if isinstance(label, str) else list(label)
    draft = draft_job(JOB_NAME, url, labels, on_progress=lambda text: on_event(PhaseStarted(text)))
    tree = parse_yaml(draft.text, url)
    if task is not None:
        tree["task"] = dict(task) if isinstance(task, Mapping) else task
    for line in draft.lines:
        on_event(Message(line))
    return resolve_job(tree, overrides)


def _choose_task(table: InMemoryTable) -> tuple[dict[str, Any], list[str]]:
    """Return the task for the labels of a table, and what was chosen and why, for the user."""
    from pipeline.commands.job_from_data import choose_task, split_notes
    from pipeline.data.tabular.arrow_types import arrow_kind
    from pipeline.data.tabular.in_memory import WHERE
    from pipeline.data.tabular.profile import profile_columns

    kinds = {field.name: arrow_kind(field.type) for field in table.table.schema}
    profile = profile_columns(kinds, table.table.to_batches(MAX_BATCH_ROWS))
    task, reason = choose_task([profile[name] for name in table.labels], WHERE)
    inputs = [column for name, column in profile.items() if name not in table.labels]
    return task, [f"task: {task['kind']}: {reason}", *split_notes(inputs)]


def _to_job_tree(
    table: InMemoryTable,
    task: str | Mapping[str, Any] | None,
    features: Literal["auto"] | Sequence[str],
    base: Mapping[str, Any] | str | Path | None,
) -> dict[str, Any]:
    """Return the job as in a file, without what overrides set, and with a URL that `open_table_job` replaces."""
    labels = list(table.labels)
    tree = {} if base is None else merge_bases(dict(base) if isinstance(base, Mapping) else {"base": str(base)}, Path())
    tree = {"name": JOB_NAME, **tree}
    data = tree.get("data", {})
    if not isinstance(data, Mapping):
        raise InputError(f"must be a mapping, not {data!r}", where="data")
    label = labels if len(labels) > 1 else labels[0]
    tree["data"] = {
        "features": features if features == "auto" else list(features),
        **data,
        "source": SOURCE,
        "url": "table",
        "label": label,
    }
    if table.categorical:
        tree["data"]["categorical"] = [*data.get("categorical", []), *table.categorical]
    if task is not None:
        tree["task"] = dict(task) if isinstance(task, Mapping) else {"kind": task}
        if "splits" not in data and tree["task"].get("kind") in ("binary", "multiclass"):
            tree["data"]["splits"] = {"by": "random", "val": VALIDATION_FRACTION, "stratify": True}
    return tree
