"""`runs` and `show`: what is in storage and how it stands, from storage alone."""

from __future__ import annotations

from pipeline.record.run import Run, list_runs
from pipeline.record.standing import Standing, standing
from pipeline.storage import Storage
from pipeline.verbs.places import find_run, storage_url


def runs(storage: str | None = None) -> tuple[str, list[Standing]]:
    """The storage's URL and the standing of each run in it, by name."""
    root = Storage.open(storage_url(storage))
    return root.url, [standing(Run(root, name)) for name in list_runs(root)]


def show(run: str, storage: str | None = None) -> Standing:
    """The standing of one run.

    Raises
    ------
    InputError: there is no such run.
    """
    return standing(find_run(run, storage))
