"""Where runs lie: the storage a command means, and the run that a name or URL means."""

from __future__ import annotations

import os

from pipeline.errors import InputError
from pipeline.job import plain_name
from pipeline.record.run import Run
from pipeline.storage import Storage

DEFAULT_STORAGE = "./runs"


def storage_url(flag: str | None, job_storage: str | None = None) -> str:
    """The flag, else TRAINYARD_STORAGE, else the job's `storage`, else ./runs."""
    return flag or os.environ.get("TRAINYARD_STORAGE") or job_storage or DEFAULT_STORAGE


def find_run(run: str, flag: str | None = None) -> Run:
    """The run that a URL, or a name under the storage, means.

    Raises
    ------
    InputError: there is no such run.
    """
    root, _, name = run.rstrip("/").rpartition("/")
    root = root or storage_url(flag)
    try:
        found = Run(Storage.open(root), plain_name(name))
    except ValueError as error:
        raise InputError(str(error), where=run) from None
    if not found.exists():
        raise InputError("no such run", where=found.url, fix="`trainyard runs` lists those that are there")
    return found
