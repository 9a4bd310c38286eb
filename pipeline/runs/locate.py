"""Resolve the storage URL of a command, and a run by its name or URL."""

from __future__ import annotations

import os

from pipeline.redaction import is_env_reference, resolve_env
from pipeline.runs.run import Run, open_run

DEFAULT_STORAGE = "./runs"


def resolve_storage_url(flag: str | None, job_storage: str | None = None) -> str:
    """Return the flag, else TRAINYARD_STORAGE, else the job's `storage`, else ./runs; resolve `env:NAME`."""
    return resolve_env(flag or os.environ.get("TRAINYARD_STORAGE") or job_storage or DEFAULT_STORAGE, "storage")


def absolute_url(url: str) -> str:
    """Return a local path as an absolute path; any other URL, and `env:NAME`, unchanged."""
    return url if "://" in url or is_env_reference(url) else os.path.abspath(os.path.expanduser(url))


def find_run(run: str, flag: str | None = None) -> Run:
    """Open a run by its URL, or by its name in the storage.

    Raises
    ------
    InputError: there is no such run.
    """
    return open_run(run, resolve_storage_url(flag))
