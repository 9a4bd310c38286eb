"""`runs` and `show`: what is in storage and how it stands, from storage alone."""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import StorageError
from pipeline.record.run import Run, list_runs
from pipeline.record.standing import Standing, standing
from pipeline.storage import Storage
from pipeline.verbs.places import find_run, storage_url


def runs(storage: str | None = None) -> tuple[str, list[Standing], dict[str, str]]:
    """The storage's URL, the standing of each run in it by name, and what is wrong with those that cannot be read."""
    root = Storage.open(storage_url(storage))
    found, unreadable = [], {}
    for name in list_runs(root):
        try:
            found.append(standing(Run(root, name)))
        except StorageError as error:
            unreadable[name] = f"{error.where}: {error.what}"
    return root.url, found, unreadable


def show(run: str, storage: str | None = None, *, verify: bool = False) -> Standing:
    """The standing of one run, and what of its directory is missing or damaged.

    Parameters
    ----------
    verify: read every file of the metric log and of the kept checkpoints; else the cost is the same at any length.

    Raises
    ------
    InputError: there is no such run, or its journal or `job.yaml` cannot be read.
    """
    found = find_run(run, storage)
    how = standing(found)
    if how.checkpoint is None:  # nothing was promised yet
        return how
    from pipeline.record.soundness import damage  # pyarrow: half a second that `runs` does not need

    return replace(how, damaged=tuple(damage(found, every_file=verify)))
