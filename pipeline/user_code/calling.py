"""Import and call the user's functions and classes, with what they raise converted to Trainyard's errors."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import InputError, TrainyardError
from pipeline.redaction import resolve_env_in_tree
from pipeline.user_code.dependencies import PACKAGE_FOLDER, is_installed
from pipeline.user_code.importing import active_code, collect_code_of, name_conflict_error

ErrorT = TypeVar("ErrorT", bound=TrainyardError)


def import_user_function(name: str, *, where: str, error: type[InputError]) -> Callable[..., Any]:
    """Import the function or class `module:name` from the active user code, or else from the working directory.

    Raises
    ------
    InputError: of type `error`: no such module or name, or the module itself raised an exception.
    """
    module_name, _, attribute = name.partition(":")
    code = active_code() or collect_code_of([name])
    try:
        module = code.import_module(module_name)
    except ImportError as missing:
        missing_name = (missing.name or "").removeprefix(f"{code.name}.")
        if missing_name.partition(".")[0] == PACKAGE_FOLDER.name:
            raise name_conflict_error(f"{missing_name}, which {name} imports", error, where) from missing
        is_requested = bool(missing_name) and f"{module_name}.".startswith(f"{missing_name}.")
        if not isinstance(missing, ModuleNotFoundError) or not is_requested:
            raise wrap_user_error(missing, where, error) from missing
        fix = f"name its folder with code: FOLDER, or run from the folder that holds it, not {os.getcwd()}"
        raise error(f"no module {missing_name!r}", where=where, fix=fix) from missing
    except Exception as raised:  # the user's module may raise anything
        raise wrap_user_error(raised, where, error) from raised
    function = getattr(module, attribute, None)
    if not callable(function):
        fix = f"define it in {getattr(module, '__file__', module_name)}"
        raise error(f"{module_name} has no function or class {attribute!r}", where=where, fix=fix)
    result: Callable[..., Any] = function
    return result


def call_user_function(
    name: str,
    args: Mapping[str, Any],
    *,
    where: str,
    error: type[InputError],
    optional_args: Mapping[str, Any] | None = None,
) -> Any:
    """Call the function or class `module:name` with `args` and return the result.

    Parameters
    ----------
    args: keyword arguments; a string `env:NAME` is replaced by the value of that environment variable.
    optional_args: further keyword arguments, passed if the signature has them and `args` does not.

    Raises
    ------
    InputError: of type `error`: no such module or name, or the call itself raised an exception.
    """
    function = import_user_function(name, where=where, error=error)
    resolved_args = resolve_env_in_tree(args, where)
    parameter_names = _parameter_names(function) if optional_args else set()
    extra = {key: value for key, value in (optional_args or {}).items() if key in parameter_names and key not in args}
    try:
        return function(**resolved_args, **extra)
    except Exception as raised:  # the user's code may raise anything
        raise wrap_user_error(raised, where, error) from raised


def wrap_user_error(raised: Exception, where: str, error: type[ErrorT]) -> ErrorT:
    """Return an exception of the user's code as an `error`, with the innermost line of the user's code."""
    frames = traceback.extract_tb(raised.__traceback__)
    files = [(Path(frame.filename), frame.lineno) for frame in frames if not frame.filename.startswith("<")]
    user_frames = [
        (file, line) for file, line in files if not file.is_relative_to(PACKAGE_FOLDER) and not is_installed(file)
    ]
    location = f", at {user_frames[-1][0]}:{user_frames[-1][1]}" if user_frames else ""
    return error(f"{type(raised).__name__}: {raised}{location}", where=where, fix="repair it, or its args")


def _parameter_names(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
