"""The user's own code: what a job names of it, how it is found and called, and what it was."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.job import Call, Job, OwnModel


def named_in(job: Job) -> list[str]:
    """All `module:name` that a job would import, sorted."""
    names = [job.model.kind] if isinstance(job.model, OwnModel) else []
    names += [job.data.source.call] if isinstance(job.data.source, Call) else []
    return sorted(names)


def look_in(folder: str) -> None:
    """Let modules in a folder be imported; behind all others, so that none of them is hidden by the user's."""
    if folder not in sys.path:
        sys.path.append(folder)


def called(name: str, args: Mapping[str, Any], *, where: str, error: type[InputError]) -> Any:
    """What the function or class `module:name` gives for `args`. Modules of the working directory are found.

    Raises
    ------
    InputError: as `error`: there is no such module or name, or it raised something itself.
    """
    module_name, _, attribute = name.partition(":")
    look_in(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise _raised(missing, where, error) from missing
        fix = f"run from the folder that holds it, not {os.getcwd()}"
        raise error(f"no module {missing.name!r}", where=where, fix=fix) from missing
    except Exception as raised:  # whatever the user's module raises is the user's to see
        raise _raised(raised, where, error) from raised
    function = getattr(module, attribute, None)
    if not callable(function):
        fix = f"define it in {module.__file__}"
        raise error(f"{module_name} has no function or class {attribute!r}", where=where, fix=fix)
    try:
        return function(**args)
    except Exception as raised:  # as above
        raise _raised(raised, where, error) from raised


def digests(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the source file of each module named."""
    found = {}
    for module in sorted({name.partition(":")[0] for name in names}):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            found[module] = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    return found


def _raised(raised: Exception, where: str, error: type[InputError]) -> InputError:
    frames = traceback.extract_tb(raised.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    place = f", at {own[-1].filename}:{own[-1].lineno}" if own else ""
    return error(f"{type(raised).__name__}: {raised}{place}", where=where, fix="repair it, or its args")
