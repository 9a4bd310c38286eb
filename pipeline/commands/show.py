"""`runs` and `show`: what is in storage and how it stands, from storage alone."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from pipeline.config import SOURCES, UserFunctionDataConfig
from pipeline.config.files import parse_yaml
from pipeline.errors import JobError, StorageError
from pipeline.runs.locate import find_run, resolve_storage_url
from pipeline.runs.run import HEADER_PREFIX, JOB_FILE, Run, list_run_names
from pipeline.runs.serialization import compute_digest
from pipeline.runs.status import ListedRun, RunStatus, read_run_status
from pipeline.storage import Storage

IGNORED_FIELDS = ("name", "storage", "code", "schema")
"""Fields of a job in which a difference tells nothing of what was trained."""
DATA_METADATA_KEYS = ("fingerprint", "start", "code")
"""Facts of a birth that belong to a run's identity and stand in no field of the job."""
JOB_NAME_PATTERN = re.compile(r"^name: *(.+)$", re.MULTILINE)
MAX_SPLIT_DEPTH = 8
"""Levels of fields in fields that are told apart."""
DIGEST_DIGITS = 8
"""Of a digest."""


@dataclass(frozen=True)
class _ScannedRun:
    """What was read of one run."""

    status: RunStatus
    created_at: str
    metadata: Mapping[str, Any]
    job_name: str
    job_fields: Mapping[str, str]
    """Text of each field of its job."""


def runs(storage: str | None = None) -> tuple[str, list[ListedRun], dict[str, str]]:
    """The storage's URL, the runs in it from the oldest to the newest, and what is wrong with what cannot be read.

    A run takes five requests, however long it is; several runs are read at the same time where storage is far away.
    """
    root = Storage.open(resolve_storage_url(storage))

    def scan_run(name: str) -> _ScannedRun | str | None:
        run = Run(root, name)
        try:
            fields = _parse_fields(run.read_job_yaml())
            job = JOB_NAME_PATTERN.search(run.read_job_yaml())
            return _ScannedRun(
                read_run_status(run),
                run.created_at(),
                run.read_metadata(),
                job[1].strip("'") if job is not None else "",
                fields,
            )
        except FileNotFoundError:
            return None  # never born: some other folder
        except StorageError as error:
            return f"{error.where}: {error.what}"

    names = list_run_names(root)
    results = dict(zip(names, root.map_concurrent(scan_run, names), strict=True))
    unreadable = {name: result for name, result in results.items() if isinstance(result, str)}
    return root.url, _list_runs([result for result in results.values() if isinstance(result, _ScannedRun)]), unreadable


def show(run: str, storage: str | None = None, *, verify: bool = False) -> RunStatus:
    """The standing of one run, and what of its directory is missing or damaged.

    Parameters
    ----------
    verify: read every file of the metric log and of the kept checkpoints; else the cost is the same at any length.

    Raises
    ------
    InputError: there is no such run, or its journal or `job.yaml` cannot be read.
    """
    opened_run = find_run(run, storage)
    status = read_run_status(opened_run)
    if status.checkpoint is None:  # nothing was promised yet
        return status
    from pipeline.runs.integrity import find_damage  # pyarrow: half a second that `runs` does not need

    return replace(status, damaged=tuple(find_damage(opened_run, read_all_files=verify)))


def _list_runs(scanned: Sequence[_ScannedRun]) -> list[ListedRun]:
    """From the oldest to the newest, with what differs between the runs of one job."""
    listed: list[ListedRun] = []
    for job, group in groupby(sorted(scanned, key=lambda one: one.job_name), key=lambda one: one.job_name):
        same_job = list(group)
        differences = _find_differences(same_job)
        listed += [
            ListedRun(status=scanned_run.status, job=job, created_at=scanned_run.created_at, differs=differs)
            for scanned_run, differs in zip(same_job, differences, strict=True)
        ]
    return sorted(listed, key=lambda one: (one.created_at, one.status.run))


def _find_differences(same_job: Sequence[_ScannedRun]) -> list[dict[str, Any]]:
    """For each of the runs of one job, what is not the same in all of them."""
    fields = _varying_fields([one.job_fields for one in same_job])
    values = _varying_fields([_parse_values(values_of_run) for values_of_run in fields])
    flags = _varying_fields([{"max_steps": one.metadata.get("max_steps")} for one in same_job])
    distinct = [{**values_of_run, **flags_of_run} for values_of_run, flags_of_run in zip(values, flags, strict=True)]
    if len({repr(values_of_run) for values_of_run in distinct}) == len(distinct):
        return distinct
    digests = _varying_fields(
        [{name: _shorten_digest(one.metadata.get(name)) for name in DATA_METADATA_KEYS} for one in same_job]
    )
    return [{**values_of_run, **digest} for values_of_run, digest in zip(distinct, digests, strict=True)]


def _varying_fields(trees: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each mapping, what is not the same in all; None for what it lacks."""
    names = list(dict.fromkeys(name for tree in trees for name in tree))
    varying = [name for name in names if len({repr(tree.get(name)) for tree in trees}) > 1]
    return [{name: tree.get(name) for name in varying} for tree in trees]


def _parse_fields(job_yaml: str) -> dict[str, str]:
    """The fields of a stored job by their path, such as "train.phases.0", and the text of each.

    Equal text stands for equal values, so of many runs of one job little has to be parsed, which takes long. It counts
    on no more than the lines that `dump_job` writes: text of another form is compared in larger parts.
    """
    text = job_yaml.partition("\n")[2] if job_yaml.startswith(HEADER_PREFIX) else job_yaml
    fields = {
        path: field_text
        for path, field_text in _split_fields(text, "", 0)
        if path.partition(".")[0] not in IGNORED_FIELDS
    }
    # Jobs of earlier versions have the keys of every source, and would differ from all others in them.
    keys = SOURCES.get(fields.get("data.source", "").strip(), UserFunctionDataConfig).model_fields
    return {
        path: field_text
        for path, field_text in fields.items()
        if not path.startswith("data.") or path.split(".")[1] in keys
    }


def _split_fields(text: str, path: str, depth: int) -> Iterator[tuple[str, str]]:
    key, item = "", 0
    for block in re.split(r"\n(?=\S)", textwrap.dedent(text).strip("\n")):
        if block.startswith("- "):
            name, field_text = f"{key}.{item}" if key else str(item), f"  {block[2:]}"
            item += 1
            is_mapping = re.match(r"  [\w-]+:[ \n]", field_text) is not None
        else:
            key, _, field_text = block.partition(":")
            name, item = key, 0
            is_mapping = field_text.startswith("\n")
        name = f"{path}.{name}" if path else name
        if is_mapping and depth < MAX_SPLIT_DEPTH:
            yield from _split_fields(field_text, name, depth + 1)
        elif field_text.strip():
            yield name, field_text


def _parse_values(fields: Mapping[str, str | None]) -> dict[str, Any]:
    """Fields with their values, such as "train.phases.0.lr"; without those that the job lacks."""
    present = {path: text for path, text in fields.items() if text is not None}
    return {name: value for path, text in present.items() for name, value in _iter_leaves(_parse_value(text), path)}


@lru_cache(maxsize=1000)
def _parse_value(text: str) -> Any:
    try:
        return parse_yaml(text.strip(), JOB_FILE)
    except JobError:  # whoever uses the job is told
        return text.strip()


def _iter_leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        yield path, tree
    for key, value in items:
        yield from _iter_leaves(value, f"{path}.{key}")


def _shorten_digest(value: Any) -> Any:
    """A digest as people compare them; that of a mapping of files to digests in place of it."""
    digest = compute_digest(value) if isinstance(value, dict) else value
    return digest[:DIGEST_DIGITS] if isinstance(digest, str) else digest
