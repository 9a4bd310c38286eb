"""Job files: from YAML and overrides to a `JobConfig` and back. Errors name the key and the nearest known one."""

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
from pipeline.config.recipes import fill_in_recipe, leave_out_replaced
from pipeline.errors import JobError
from pipeline.redaction import find_secrets

__all__ = [
    "build_job",
    "dump_job",
    "list_recipe_sections",
    "load_job",
    "override_job",
    "parse_job",
    "parse_yaml",
    "resolve_job",
]

IN_MEMORY = Path("job")
"""Used as the file of a job that is given as a mapping: for its folder, the working directory, and in messages."""


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Read a job file, the files it is based on, and `KEY=VALUE` overrides.

    Relative paths become absolute: in a file they start from its folder, in an override from the working directory.

    Raises
    ------
    JobError: a missing file or `code` folder, broken YAML, an unknown key or a value out of range.
    """
    return _build_with_overrides(read_tree(Path(path)), overrides, Path(path))


def _build_with_overrides(tree: dict[str, Any], overrides: Iterable[str], path: Path) -> JobConfig:
    job = build_job(_fill_and_override(tree, list(overrides))[0], where=str(path))
    raise_if_secret(job, str(path))
    if job.code is not None and not Path(job.code).is_dir():
        fix = "give the folder of your modules, in a job file relative to the file's folder"
        raise JobError("no such folder", where=f"code: {job.code}", fix=fix)
    return job


def list_recipe_sections(job: JobConfig | Mapping[str, Any] | str | Path, overrides: Iterable[str] = ()) -> list[str]:
    """Return the names of the sections that the file or mapping of a valid job leaves out, so that they are those of
    the recipe for its data."""
    if isinstance(job, JobConfig):
        return []
    tree = merge_bases(deepcopy(dict(job)), IN_MEMORY) if isinstance(job, Mapping) else read_tree(Path(job))
    return _fill_and_override(tree, list(overrides))[1]


def _fill_and_override(tree: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a job's tree with the recipe for its data and with overrides, and the sections that are the recipe's.

    Overrides of the data come first, since the recipe depends on it."""
    is_of_data = [override.strip().partition("=")[0].partition(".")[0] == "data" for override in overrides]
    data_overrides = [override for override, is_data in zip(overrides, is_of_data, strict=True) if is_data]
    others = [override for override, is_data in zip(overrides, is_of_data, strict=True) if not is_data]
    apply_overrides(tree, data_overrides)
    sections = leave_out_replaced(tree, fill_in_recipe(tree), others)
    return apply_overrides(tree, others), sections


def resolve_job(job: JobConfig | Mapping[str, Any] | str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Return a job from a job file, its content as a mapping, or a `JobConfig`; with overrides.

    Local paths become absolute, because workers and later commands run in other folders. Those of a job file start from
    its folder; those of a mapping, a `JobConfig` and overrides from the working directory.

    Raises
    ------
    JobError: as `load_job`; or a value of another type.
    """
    if isinstance(job, JobConfig):
        job = override_job(job, overrides)
        raise_if_secret(job, "job")
        tree = with_absolute_paths(Path.cwd(), job.to_dict())
        return job if tree == job.to_dict() else build_job(tree, where="job")
    if isinstance(job, Mapping):
        return _build_with_overrides(merge_bases(deepcopy(dict(job)), IN_MEMORY), overrides, IN_MEMORY)
    if isinstance(job, (str, Path)):
        return load_job(job, overrides)
    what = f"not a job, but a value of type {type(job).__name__}"
    raise JobError(what, where="job", fix="give the path of a job file, its content as a dict, or a JobConfig")


def raise_if_secret(job: JobConfig, where: str) -> None:
    """Check that a job can be stored, printed and uploaded.

    Raises
    ------
    JobError: a value holds a secret: a URL with a password or signature, or the value of a secret variable.
    """
    for key in find_secrets(job.to_dict()):
        raise JobError(
            f"{key}: holds a secret, which would be stored with the run",
            where=where,
            fix=f"put it into an environment variable and write {key}: env:NAME; it is resolved only where it is used",
        )


def parse_job(text: str, where: str) -> JobConfig:
    """Return the job of a resolved job file, as stored with a run. `base:` and environment variables are not
    resolved."""
    return build_job(require_mapping(parse_yaml(text, where), where), where=where, is_stored=True)


def override_job(job: JobConfig, overrides: Iterable[str]) -> JobConfig:
    """Return the same job with `KEY=VALUE` overrides."""
    settings = list(overrides)
    return build_job(apply_overrides(job.to_dict(), settings), where="--set", is_stored=True) if settings else job


def dump_job(job: JobConfig) -> str:
    """Return the resolved job as YAML, with all defaults; `parse_job` returns the same job."""
    return yaml.dump(job.to_dict(), Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=120)


def build_job(tree: Mapping[str, Any], where: str, *, is_stored: bool = False) -> JobConfig:
    """Check a tree of plain values and return its job.

    Parameters
    ----------
    is_stored: whether the tree is that of a stored job, where counts are floats.

    Raises
    ------
    JobError: lists all problems, each with its key.
    """
    try:
        return JobConfig.model_validate(dict(tree), context={STORED: is_stored})
    except ValidationError as error:
        lines = explain_validation_error(error, tree)
        what = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])
        raise JobError(
            what, where=where, fix="`trainyard init` writes a job file in which every key is explained"
        ) from None
