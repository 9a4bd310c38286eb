"""A job file for a table: look at its columns, choose the task and the splits, and say what was chosen and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import RESERVED_NAMES, SOURCE_CONFIGS, FileDataConfig, TableDataConfig
from pipeline.config.files import load_job
from pipeline.config.files.yaml_io import YamlDumper
from pipeline.config.recipes import TABLE_RECIPE
from pipeline.data.sources.tables.profile import profile_table
from pipeline.data.sources.tables.sniff import NAMES, sniff_source
from pipeline.data.tabular.profile import ColumnProfile
from pipeline.errors import DataError, InputError, JobError
from pipeline.events import ProgressFn
from pipeline.redaction import has_secret, redact

MIN_ROWS = 10
"""Rows of a table for which a job is drafted."""

MAX_CLASS_NUMBERS = 20
"""A label of whole numbers is one of classes if it has at most this many different ones ..."""

MIN_ROWS_PER_CLASS_NUMBER = 5
"""... and on average at least this many rows of each. (Two different numbers are always classes.)"""

MAX_CLASS_TEXTS = 1_000
"""A label of text with more values than this, or than half of its rows, is refused: it looks like a key or a remark."""

MIN_GROUP_REPEATS = 1.2
MIN_GROUPS = 20
"""A column may name groups of rows if it has at least this many values, each in this many rows on average, and if it is
named as an identifier, or is text of which a fifth or more of the values are distinct."""

IDENTIFIER = re.compile(
    r"(^|[\W_])(id|uuid|guid|user|customer|client|patient|subject|person|household|account|session|group)s?([\W_]?(id|no|nr|key|code|number))?$"
    r"|[a-z]I[dD]$",
)

MAX_NOTES = 3
"""Columns that the notes on splits name."""


@dataclass(frozen=True)
class JobDraft:
    """A job for a table, before it is written.

    text: the content of the job file.
    lines: what was chosen, and why.
    """

    text: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class JobFromData:
    """The job file for a table.

    path: of the job file.
    is_new: whether it was written now.
    lines: what was chosen, and why; for an earlier file, that it is used.
    """

    path: str
    is_new: bool
    lines: tuple[str, ...]


def find_or_write_job(url: str, labels: Sequence[str], *, on_progress: ProgressFn = lambda text: None) -> JobFromData:
    """Return the job file in the working directory for a table and its labels, `LABEL.yaml`; written if there is none.

    Another job's file of that name is left alone: then the file is `TABLE-LABEL.yaml`.

    Raises
    ------
    InputError: the table or the label cannot be used; or both names are taken.
    """
    names = [_job_name(labels[0]), _job_name(f"{_table_name(url)}-{labels[0]}")]
    for name in names:
        path = Path(f"{name}.yaml")
        if _is_job_of(path, url, labels):
            return JobFromData(str(path), False, (f"the job file {path} is there: its settings apply",))
        if not path.exists():
            draft = draft_job(name, url, labels, on_progress=on_progress)
            write_job_file(path, draft.text)
            return JobFromData(str(path), True, (*draft.lines, f"wrote {path}: edit it, and train {path} next time"))
    raise InputError(
        "the job files of other jobs have the names of this one",
        where=", ".join(f"{name}.yaml" for name in names),
        fix="`trainyard init NAME --data URL --label COLUMN` writes one of another name",
    )


def write_job_file(path: Path, text: str) -> None:
    """Write a new file.

    Raises
    ------
    InputError: it exists or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError("already exists", where=str(path), fix="choose another name or remove it") from None
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path)) from None


def draft_job(name: str, url: str, labels: Sequence[str], *, on_progress: ProgressFn = lambda text: None) -> JobDraft:
    """Look at a table, and return a job for it.

    Raises
    ------
    InputError: the table cannot be read, it has no such label, or the label cannot be predicted.
    """
    if has_secret(url):
        raise InputError(
            "the URL holds a secret, which a job file would store",
            where=redact(url),
            fix="put it into an environment variable, and write a job file with url: env:NAME",
        )
    for label in labels:
        if "${" in label:
            raise InputError(
                "a job file would replace ${...} in this name by an environment variable",
                where=f"--label {label}",
                fix="rename the column",
            )
    source = sniff_source(url)
    if not issubclass(SOURCE_CONFIGS[source], TableDataConfig):
        raise InputError(
            f"is {NAMES[source]}, not a table", where=redact(url), fix="write a job file: `trainyard init NAME`"
        )
    data = SOURCE_CONFIGS[source].model_validate({"source": source, "url": url, "label": list(labels)})
    assert isinstance(data, TableDataConfig), "a source of tables"
    profile = profile_table(data, labels, on_progress)
    num_rows, num_columns = next(iter(profile.values())).num_rows, len(profile) - len(set(labels))
    if num_rows < MIN_ROWS:
        raise DataError(
            f"has {num_rows:,} row{'s' if num_rows > 1 else ''}, too few to train and to validate on",
            where=redact(url),
            fix=f"use a table of at least {MIN_ROWS} rows",
        )
    task, reason = choose_task([profile[label] for label in labels], url)
    notes = split_notes([column for name, column in profile.items() if name not in labels])
    splits = {"by": "random", "val": 0.2}
    if task["kind"] in ("binary", "multiclass"):
        splits["stratify"] = True
    lines = [
        f"{redact(url)}: {num_rows:,} rows, {num_columns:,} columns beside the label",
        f"task: {_flow(task)}: {reason}",
        "features: auto: all other columns but those that cannot help, such as almost unique text",
        f"splits: a random fifth of the rows for validation{', of each class' if 'stratify' in splits else ''}",
        *notes,
        f"model and training: the recipe for {TABLE_RECIPE.kind}; `trainyard check` prints it",
    ]
    return JobDraft(_format_job(name, source, url, labels, task, reason, splits, notes), tuple(lines))


def choose_task(labels: Sequence[ColumnProfile], url: str) -> tuple[dict[str, Any], str]:
    """Return the `task` for one or several labels, and the reason.

    Text and booleans are classes. Whole numbers are classes if there are two different ones, or at most
    `MAX_CLASS_NUMBERS` with at least `MIN_ROWS_PER_CLASS_NUMBER` rows each on average. All other numbers are a
    regression. Several labels are a multilabel task if each has two different values, else a regression.

    Raises
    ------
    DataError: a label without two different values, with missing values, of another type, or of text that is almost
        unique.
    """
    for label in labels:
        _check_label(label, url)
    if len(labels) > 1 and all(_has_two_values(label) for label in labels):
        return {"kind": "multilabel"}, f"{len(labels)} labels, each of two values"
    if len(labels) > 1:
        if other := next((label for label in labels if label.kind.kind not in ("whole", "real", "truth")), None):
            raise DataError(
                f"of several labels, {other.name!r} has {other.kind}, not numbers",
                where=redact(url),
                fix="predict one label of classes at a time, or labels that all have two values",
            )
        return {"kind": "regression"}, f"{len(labels)} labels of numbers"
    (label,) = labels
    values = [value for value, _ in label.counts]
    kind = label.kind.kind
    if kind in ("text", "truth") or (label.is_whole and _is_class_number(label)):
        what = {"text": "texts", "truth": "booleans"}.get(kind, "whole numbers")
        listed = ", ".join(map(_format_value, sorted(values, key=_order)[:5])) + (", ..." if len(values) > 5 else "")
        reason = f"{label.name!r} has {label.num_distinct} different {what} ({listed})"
        if label.num_distinct > 2:
            return {"kind": "multiclass"}, reason
        return {"kind": "binary"}, f"{reason}; {_format_value(max(values, key=_order))} counts as positive"
    more = " or more" if label.has_more_distinct else ""
    what = "whole numbers" if label.is_whole else "numbers"
    return {"kind": "regression"}, f"{label.name!r} has {label.num_distinct:,}{more} different {what}"


def _check_label(label: ColumnProfile, url: str) -> None:
    where = redact(url)
    if label.kind.kind not in ("text", "whole", "real", "truth"):
        raise DataError(
            f"the label {label.name!r} has {label.kind}", where=where, fix="use a column of numbers, text or booleans"
        )
    if label.num_nulls:
        raise DataError(
            f"the label {label.name!r} has no value in {label.num_nulls:,} of {label.num_rows:,} rows",
            where=where,
            fix="remove these rows: nothing can be learned from them",
        )
    if label.num_distinct < 2:
        raise DataError(
            f"the label {label.name!r} has the same value in all {label.num_rows:,} rows",
            where=where,
            fix="use a column with at least two values",
        )
    is_text = label.kind.kind == "text"
    if is_text and label.num_distinct > 2 and label.num_distinct > min(MAX_CLASS_TEXTS, label.num_rows / 2):
        raise DataError(
            f"the label {label.name!r} has {label.num_distinct:,} different texts in {label.num_rows:,} rows",
            where=where,
            fix="use a column of classes or numbers; if these are classes, write the job file: `trainyard init NAME`",
        )


def _has_two_values(label: ColumnProfile) -> bool:
    return label.num_distinct == 2 and (label.kind.kind in ("text", "truth") or label.is_whole)


def _is_class_number(label: ColumnProfile) -> bool:
    distinct = label.num_distinct
    return distinct == 2 or distinct <= min(MAX_CLASS_NUMBERS, label.num_rows / MIN_ROWS_PER_CLASS_NUMBER)


def split_notes(columns: Sequence[ColumnProfile]) -> list[str]:
    """Return a line for each column that is a reason for splits that are not random: times, and identifiers that
    repeat."""
    times = [column for column in columns if column.kind.kind == "time" or column.is_time_text]
    groups = [column for column in columns if _is_group(column)]
    return [
        *(
            f"{column.name!r} holds times: if the model will predict rows that are newer than these, validate on the "
            f"newest: splits: {_flow({'by': 'time', 'column': column.name, 'val': 0.2})}"
            for column in times[:MAX_NOTES]
        ),
        *(
            f"{column.name!r} repeats ({column.num_distinct:,} values in {column.num_values:,} rows): if it names "
            "whose rows these are, keep those of one together: "
            f"splits: {_flow({'by': 'group', 'column': column.name, 'val': 0.2})}"
            for column in groups[:MAX_NOTES]
        ),
    ]


def _is_group(column: ColumnProfile) -> bool:
    if column.kind.kind not in ("text", "whole") or column.is_time_text or column.num_distinct < MIN_GROUPS:
        return False
    if column.num_values < MIN_GROUP_REPEATS * column.num_distinct:
        return False
    is_dense_text = column.kind.kind == "text" and column.num_distinct >= 0.2 * column.num_values
    return is_dense_text or IDENTIFIER.search(column.name) is not None


def _format_job(
    name: str,
    source: str,
    url: str,
    labels: Sequence[str],
    task: Mapping[str, Any],
    reason: str,
    splits: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    label: Any = labels[0] if len(labels) == 1 else list(labels)
    reason, notes = _printable(reason), [_printable(note) for note in notes]
    lines = [
        f"# `trainyard train {name}.yaml` trains this job; `trainyard check {name}.yaml` prints it with all that it "
        "leaves out.",
        "schema: 1",
        f"name: {_flow(name)}",
        "data:",
        f"  source: {source}",
        f"  url: {_flow(url)}",
        f"  label: {_flow(label)}",
        '  features: auto   # or names and patterns, or ["*"] for all; `exclude: [...]` beside it leaves columns out',
        f"  splits: {_flow(dict(splits))}   # test: 0.2 would hold out rows for `trainyard evaluate --split test`",
        *(f"  # {note}" for note in notes),
        f"task: {_flow(dict(task))}   # {reason}",
        f"# model, train and best are left out: they are the recipe for {TABLE_RECIPE.kind}.",
    ]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=YamlDumper, default_flow_style=True, width=2**31, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _printable(text: str) -> str:
    """Return a text for a comment: characters that would end the line are escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _order(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)


def _format_value(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _table_name(url: str) -> str:
    """Return the name of a file or folder without its endings; of a glob, that of the folder."""
    parts = [part for part in re.split(r"[/\\]", url.partition("?")[0]) if part and not re.search(r"[*?\[]", part)]
    return parts[-1].partition(".")[0] if parts else "table"


def _job_name(text: str) -> str:
    """Return a valid job name that is similar to a text."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-._")[:60].strip("-._") or "job"
    return f"{name}-job" if name in RESERVED_NAMES else name


def _is_job_of(path: Path, url: str, labels: Sequence[str]) -> bool:
    """Return whether a file is a job on this table with these labels."""
    if not path.is_file():
        return False
    try:
        data = load_job(path).data
    except JobError:
        return False
    wanted = url if "://" in url else str(Path(url).expanduser().absolute())
    return isinstance(data, FileDataConfig) and data.labels == list(labels) and _same_path(data.url, wanted)


def _same_path(first: str, second: str) -> bool:
    return first == second or ("://" not in first + second and Path(first).resolve() == Path(second).resolve())
