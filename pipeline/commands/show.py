"""`runs` and `show`: list the runs in storage and show their status, from storage alone."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from pipeline.config import SOURCE_CONFIGS, UserFunctionDataConfig
from pipeline.config.files import parse_yaml
from pipeline.errors import JobError, StorageError
from pipeline.runs.locate import find_run, resolve_storage_url
from pipeline.runs.run import HEADER_PREFIX, JOB_FILE, Run, list_run_names
from pipeline.runs.serialization import compute_digest
from pipeline.runs.status import ListedRun, RunStatus, read_run_status
from pipeline.storage import Storage

IGNORED_FIELDS = ("name", "storage", "code", "schema")
"""Fields of a job that do not affect what is trained."""
DATA_METADATA_KEYS = ("fingerprint", "start", "code")
"""Keys of a run's metadata that are part of its identity and of no field of the job."""
JOB_NAME_PATTERN = re.compile(r"^name: *(.+)$", re.MULTILINE)
MAX_SPLIT_DEPTH = 8
"""Levels of nested fields that are compared separately."""
DIGEST_DIGITS = 8
"""Digits of a digest in the list of runs."""


@dataclass(frozen=True)
class _ScannedRun:
    """What `runs` reads of one run."""

    status: RunStatus
    created_at: str
    metadata: Mapping[str, Any]
    job_name: str
    job_fields: Mapping[str, str]
    """Text of each field of its job, by path."""


def runs(storage: str | None = None) -> tuple[str, list[ListedRun], dict[str, str]]:
    """List the runs in storage.

    Reading a run takes five requests, whatever its length; several runs are read concurrently if storage is remote.

    Returns
    -------
    The storage's URL, its runs from the oldest to the newest, and the reason for each that cannot be read, by name.
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
            return None  # not created: some other folder
        except StorageError as error:
            return f"{error.where}: {error.what}"

    names = list_run_names(root)
    results = dict(zip(names, root.map_concurrent(scan_run, names), strict=True))
    unreadable = {name: result for name, result in results.items() if isinstance(result, str)}
    return root.url, _list_runs([result for result in results.values() if isinstance(result, _ScannedRun)]), unreadable


def show(run: str, storage: str | None = None, *, verify: bool = False) -> RunStatus:
    """Return the status of one run, and which of its files are missing or damaged.

    Parameters
    ----------
    verify: read every file of the metric log and of the kept checkpoints. Without it, the cost does not depend on the
        length of the run.

    Raises
    ------
    InputError: there is no such run, or its journal or `job.yaml` cannot be read.
    """
    opened_run = find_run(run, storage)
    status = read_run_status(opened_run)
    if status.checkpoint is None:  # nothing was committed yet
        return status
    from pipeline.runs.integrity import find_damage  # it imports pyarrow: half a second that `runs` does not need

    return replace(status, damaged=tuple(find_damage(opened_run, read_all_files=verify)))


def _list_runs(scanned: Sequence[_ScannedRun]) -> list[ListedRun]:
    """Sort runs from the oldest to the newest, with the differences between the runs of each job."""
    listed: list[ListedRun] = []
    for job, group in groupby(sorted(scanned, key=lambda run: run.job_name), key=lambda run: run.job_name):
        same_job = list(group)
        differences = _find_differences(same_job)
        listed += [
            ListedRun(status=scanned_run.status, job=job, created_at=scanned_run.created_at, differs=differs)
            for scanned_run, differs in zip(same_job, differences, strict=True)
        ]
    return sorted(listed, key=lambda run: (run.created_at, run.status.run))


def _find_differences(same_job: Sequence[_ScannedRun]) -> list[dict[str, Any]]:
    """Return, for each of the runs of one job, the values that are not the same in all of them."""
    fields = _varying_fields([run.job_fields for run in same_job])
    values = _varying_fields([_parse_values(run_fields) for run_fields in fields])
    options = _varying_fields([{"max_steps": run.metadata.get("max_steps")} for run in same_job])
    differences = [{**run_values, **run_options} for run_values, run_options in zip(values, options, strict=True)]
    if len({repr(difference) for difference in differences}) == len(differences):
        return differences
    digests = _varying_fields(
        [{name: _shorten_digest(run.metadata.get(name)) for name in DATA_METADATA_KEYS} for run in same_job]
    )
    return [{**difference, **run_digests} for difference, run_digests in zip(differences, digests, strict=True)]


def _varying_fields(trees: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keep the items of each mapping that are not the same in all; None for a missing one."""
    names = list(dict.fromkeys(name for tree in trees for name in tree))
    varying = [name for name in names if len({repr(tree.get(name)) for tree in trees}) > 1]
    return [{name: tree.get(name) for name in varying} for tree in trees]


def _parse_fields(job_yaml: str) -> dict[str, str]:
    """Return the text of each field of a stored job, by path, such as "train.phases.0".

    Equal text means equal values, so few fields of many runs of one job have to be parsed as YAML, which is slow. It
    relies on the layout that `dump_job` writes; text with another layout is compared in larger parts.
    """
    text = job_yaml.partition("\n")[2] if job_yaml.startswith(HEADER_PREFIX) else job_yaml
    fields = {
        path: field_text
        for path, field_text in _split_fields(text, "", 0)
        if path.partition(".")[0] not in IGNORED_FIELDS
    }
    # Jobs of earlier versions have the keys of all sources, and would differ from all others in them.
    keys = SOURCE_CONFIGS.get(fields.get("data.source", "").strip(), UserFunctionDataConfig).model_fields
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
    """Parse fields to values by path, such as "train.phases.0.lr", without fields that the job lacks."""
    present = {path: text for path, text in fields.items() if text is not None}
    return {name: value for path, text in present.items() for name, value in _iter_leaves(_parse_value(text), path)}


@lru_cache(maxsize=1000)
def _parse_value(text: str) -> Any:
    try:
        return parse_yaml(text.strip(), JOB_FILE)
    except JobError:  # reported by the commands that use the job
        return text.strip()


def _iter_leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        yield path, tree
    for key, value in items:
        yield from _iter_leaves(value, f"{path}.{key}")


def _shorten_digest(value: Any) -> Any:
    """Return the first digits of a digest. A mapping of files to digests is replaced by its digest."""
    digest = compute_digest(value) if isinstance(value, dict) else value
    return digest[:DIGEST_DIGITS] if isinstance(digest, str) else digest
