"""Where runs lie: the storage a command means, and the run that a name or URL means."""

from __future__ import annotations

import os

from pipeline.redaction import is_env_reference, resolve_env
from pipeline.runs.run import Run, open_run

DEFAULT_STORAGE = "./runs"


def resolve_storage_url(flag: str | None, job_storage: str | None = None) -> str:
    """The flag, else TRAINYARD_STORAGE, else the job's `storage`, else ./runs; `env:NAME` looked up."""
    return resolve_env(flag or os.environ.get("TRAINYARD_STORAGE") or job_storage or DEFAULT_STORAGE, "storage")


def absolute_url(url: str) -> str:
    """A local path from the root; any other URL, and `env:NAME`, as it is."""
    return url if "://" in url or is_env_reference(url) else os.path.abspath(os.path.expanduser(url))


def find_run(run: str, flag: str | None = None) -> Run:
    """The run that a URL, or a name under the storage, means.

    Raises
    ------
    InputError: there is no such run.
    """
    return open_run(run, resolve_storage_url(flag))
