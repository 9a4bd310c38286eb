"""Job files: YAML and overrides to a `Job` and back. Errors name the place and the nearest known key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import STORED, JobConfig
from pipeline.config.files.loading import apply_overrides, merge_bases, read_tree, require_mapping, with_absolute_paths
from pipeline.config.files.validation_errors import explain_validation_error
from pipeline.config.files.yaml_io import YamlDumper, parse_yaml
from pipeline.errors import JobError
from pipeline.redaction import find_secrets

__all__ = ["build_job", "dump_job", "load_job", "override_job", "parse_job", "parse_yaml", "resolve_job"]

IN_MEMORY = Path("job")
"""Stands for the file of a job that was given as a mapping: in the working directory, and for messages."""


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Read a job file, the files it is based on, and `KEY=VALUE` overrides.

    Relative paths become whole: in a file they start from its folder, in an override from the working directory.

    Raises
    ------
    JobError: a missing file or `code` folder, broken YAML, an unknown key or a value out of range.
    """
    return _build_with_overrides(read_tree(Path(path)), overrides, Path(path))


def _build_with_overrides(tree: dict[str, Any], overrides: Iterable[str], path: Path) -> JobConfig:
    job = build_job(apply_overrides(tree, overrides), where=str(path))
    raise_if_secret(job, str(path))
    if job.code is not None and not Path(job.code).is_dir():
        fix = "name the folder of your modules, in a job file from its own folder on"
        raise JobError("no such folder", where=f"code: {job.code}", fix=fix)
    return job


def resolve_job(job: JobConfig | Mapping[str, Any] | str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """A job from whatever describes it: a job file, the content of one as a mapping, or a `Job`; with overrides.

    Local paths are written out from the root, for workers and later commands run in other folders: those of a job file
    start from its folder, those of a mapping, of a `Job` and of overrides from the working directory.

    Raises
    ------
    JobError: as `load_job`; or something else altogether.
    """
    if isinstance(job, JobConfig):
        job = override_job(job, overrides)
        raise_if_secret(job, "job")
        whole = with_absolute_paths(Path.cwd(), job.to_dict())
        return job if whole == job.to_dict() else build_job(whole, where="job")
    if isinstance(job, Mapping):
        return _build_with_overrides(merge_bases(deepcopy(dict(job)), IN_MEMORY), overrides, IN_MEMORY)
    if isinstance(job, (str, Path)):
        return load_job(job, overrides)
    what = f"not a job, but a value of type {type(job).__name__}"
    raise JobError(what, where="job", fix="give the path of a job file, its content as a dict, or a Job")


def raise_if_secret(job: JobConfig, where: str) -> None:
    """See that a job can be stored, printed and shipped as it is.

    Raises
    ------
    JobError: a value holds a secret: a URL with a password or a signature, or what a secret variable holds.
    """
    for key in find_secrets(job.to_dict()):
        raise JobError(
            f"{key}: holds a secret, which would be stored with the run",
            where=where,
            fix=f"put it into an environment variable and write {key}: env:NAME; it is looked up where it is used",
        )


def parse_job(text: str, where: str) -> JobConfig:
    """A job from the text of a resolved job file, as stored with a run. No `base:`, no environment."""
    return build_job(require_mapping(parse_yaml(text, where), where), where=where, is_stored=True)


def override_job(job: JobConfig, overrides: Iterable[str]) -> JobConfig:
    """The same job with `KEY=VALUE` overrides."""
    words = list(overrides)
    return build_job(apply_overrides(job.to_dict(), words), where="--set", is_stored=True) if words else job


def dump_job(job: JobConfig) -> str:
    """The resolved job as YAML, every default spelled out; `parse_job` gives the same job back."""
    return yaml.dump(job.to_dict(), Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=120)


def build_job(tree: Mapping[str, Any], where: str, *, is_stored: bool = False) -> JobConfig:
    """Check a tree of plain values.

    Parameters
    ----------
    is_stored: whether the tree is that of a job that was written out: counts are floats there.

    Raises
    ------
    JobError: every problem found, each with its key.
    """
    try:
        return JobConfig.model_validate(dict(tree), context={STORED: is_stored})
    except ValidationError as error:
        lines = explain_validation_error(error, tree)
        what = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])
        raise JobError(what, where=where, fix="`trainyard init` writes a job file with every key explained") from None
