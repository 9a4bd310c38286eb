"""The user's own code: how it is found and called."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import InputError, JobError, TrainyardError
from pipeline.job import Call, Job, OwnModel
from pipeline.redaction import looked_up_in

Failure = TypeVar("Failure", bound=TrainyardError)

OURS = Path(__file__).parents[1]
"""The package whose name a user's own must not have."""


def named_in(job: Job) -> list[str]:
    """All `module:name` that a job would import, sorted."""
    names = [job.model.kind] if isinstance(job.model, OwnModel) else []
    names += [job.data.source.call] if isinstance(job.data.source, Call) else []
    names += [job.task.loss] if job.task.loss is not None and ":" in job.task.loss else []
    return sorted({*names, *job.metrics})


def look_in(folder: str) -> None:
    """Let modules in a folder be imported; behind all others, so that none of them is hidden by the user's."""
    if folder not in sys.path:
        sys.path.append(folder)


def at_home(job: Job) -> Job:
    """The job with a relative `code` folder, one that was sent along with it, where it lies on this machine.

    A cluster's nodes unpack what was sent each for itself, onto the import path; the working directory of a worker
    is another one.
    """
    if job.code is None or os.path.isabs(job.code):
        return job
    found = [os.path.join(place, job.code) for place in sys.path if os.path.isdir(os.path.join(place, job.code))]
    return job.model_copy(update={"code": found[0]}) if found else job


def make_importable(job: Job, working_folder: str = "") -> None:
    """Let what a job names be imported: from its `code` folder, then from the working directory.

    Parameters
    ----------
    working_folder: that of the driving process, for its workers; else this process's.

    Raises
    ------
    JobError: a module of the user's own is called as ours, so that it cannot be imported beside it.
    """
    for name in named_in(job):
        if name.partition(":")[0].partition(".")[0] == OURS.name:
            raise _called_as_ours(name)
    if job.code is not None:
        folder = Path(job.code).absolute()
        for hidden in (folder / f"{OURS.name}.py", folder / OURS.name):
            if hidden.is_file() or (hidden.is_dir() and any(hidden.glob("*.py")) and hidden.resolve() != OURS):
                raise _called_as_ours(str(hidden))
        look_in(str(folder))
    look_in(working_folder or os.getcwd())


def imported(name: str, *, where: str, error: type[InputError]) -> Callable[..., Any]:
    """The function or class `module:name`. Modules of the working directory are found.

    Raises
    ------
    InputError: as `error`: there is no such module or name, or the module raised something itself.
    """
    module_name, _, attribute = name.partition(":")
    look_in(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as missing:
        if missing.name is not None and missing.name.partition(".")[0] == OURS.name:
            raise _called_as_ours(f"{missing.name}, which {name} imports", error, where) from missing
        asked_for = missing.name is not None and f"{module_name}.".startswith(f"{missing.name}.")
        if not isinstance(missing, ModuleNotFoundError) or not asked_for:
            raise failed(missing, where, error) from missing
        fix = f"name its folder with code: FOLDER, or run from the folder that holds it, not {os.getcwd()}"
        raise error(f"no module {missing.name!r}", where=where, fix=fix) from missing
    except Exception as raised:  # whatever the user's module raises is the user's to see
        raise failed(raised, where, error) from raised
    function = getattr(module, attribute, None)
    if not callable(function):
        fix = f"define it in {getattr(module, '__file__', module_name)}"
        raise error(f"{module_name} has no function or class {attribute!r}", where=where, fix=fix)
    found: Callable[..., Any] = function
    return found


def called(
    name: str,
    args: Mapping[str, Any],
    *,
    where: str,
    error: type[InputError],
    offers: Mapping[str, Any] | None = None,
) -> Any:
    """What the function or class `module:name` gives for `args`.

    Parameters
    ----------
    args: keyword arguments; a text `env:NAME` is what that environment variable holds.
    offers: more keyword arguments; those are given that its signature names and `args` does not hold.

    Raises
    ------
    InputError: as `error`: there is no such module or name, or it raised something itself.
    """
    function = imported(name, where=where, error=error)
    given = looked_up_in(args, where)
    wanted = _named_parameters(function) if offers else set()
    extra = {key: value for key, value in (offers or {}).items() if key in wanted and key not in args}
    try:
        return function(**given, **extra)
    except Exception as raised:  # whatever the user's code raises is the user's to see
        raise failed(raised, where, error) from raised


def failed(raised: Exception, where: str, error: type[Failure]) -> Failure:
    """What the user's code raised, as an error of ours with the last place in the user's code."""
    frames = traceback.extract_tb(raised.__traceback__)
    files = [(Path(frame.filename), frame.lineno) for frame in frames if not frame.filename.startswith("<")]
    own = [(file, line) for file, line in files if not file.is_relative_to(OURS) and not is_installed(file)]
    place = f", at {own[-1][0]}:{own[-1][1]}" if own else ""
    return error(f"{type(raised).__name__}: {raised}{place}", where=where, fix="repair it, or its args")


def is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    packages = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(packages) or path.is_relative_to(sysconfig.get_path("stdlib"))


def _called_as_ours(what: str, error: type[InputError] = JobError, where: str = "code") -> InputError:
    return error(
        f"{what}: {OURS.name!r} is the name of Trainyard's own package, and Python can import only one of that name",
        where=where,
        fix="rename yours",
    )


def _named_parameters(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in: it says nothing of its parameters
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
