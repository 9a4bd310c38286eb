"""Job files: YAML and overrides to a `Job` and back. Errors name the place and the nearest known key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import JobError
from pipeline.job import STORED, Job
from pipeline.job_file.explaining import explain
from pipeline.job_file.reading import apply, code_folder, mapping, read_tree
from pipeline.job_file.yaml12 import Dumper, parse_yaml
from pipeline.redaction import secrets_in

__all__ = ["build_job", "dump_job", "load_job", "override_job", "parse_job", "parse_yaml", "refuse_secrets"]


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file, the files it is based on, and `KEY=VALUE` overrides.

    Raises
    ------
    JobError: a missing file or `code` folder, broken YAML, an unknown key or a value out of range.
    """
    job = build_job(apply(read_tree(Path(path)), overrides), where=str(path))
    refuse_secrets(job, str(path))
    if job.code is None:
        return job
    folder = code_folder(job.code, Path(path))  # once more, for an override
    if not Path(folder).is_dir():
        raise JobError(
            "no such folder", where=f"code: {folder}", fix="name the folder of your modules, from the job file"
        )
    return job.model_copy(update={"code": folder})


def refuse_secrets(job: Job, where: str) -> None:
    """See that a job can be stored, printed and shipped as it is.

    Raises
    ------
    JobError: a value holds a secret: a URL with a password or a signature, or what a secret variable holds.
    """
    for key in secrets_in(job.resolved()):
        raise JobError(
            f"{key}: holds a secret, which would be stored with the run",
            where=where,
            fix=f"put it into an environment variable and write {key}: env:NAME; it is looked up where it is used",
        )


def parse_job(text: str, where: str) -> Job:
    """A job from the text of a resolved job file, as stored with a run. No `base:`, no environment."""
    return build_job(mapping(parse_yaml(text, where), where), where=where, is_stored=True)


def override_job(job: Job, overrides: Iterable[str]) -> Job:
    """The same job with `KEY=VALUE` overrides."""
    words = list(overrides)
    return build_job(apply(job.resolved(), words), where="--set", is_stored=True) if words else job


def dump_job(job: Job) -> str:
    """The resolved job as YAML, every default spelled out; `parse_job` gives the same job back."""
    return yaml.dump(job.resolved(), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120)


def build_job(tree: Mapping[str, Any], where: str, *, is_stored: bool = False) -> Job:
    """Check a tree of plain values.

    Parameters
    ----------
    is_stored: whether the tree is that of a job that was written out: counts are floats there.

    Raises
    ------
    JobError: every problem found, each with its key.
    """
    try:
        return Job.model_validate(dict(tree), context={STORED: is_stored})
    except ValidationError as error:
        lines = explain(error, tree)
        what = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])
        raise JobError(what, where=where, fix="`trainyard init` writes a job file with every key explained") from None
