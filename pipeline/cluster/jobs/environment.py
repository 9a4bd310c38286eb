"""The variables that are handed to a job: `--env KEY` and `--env-file FILE`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from dotenv.parser import parse_stream  # what `dotenv_values` reads with; it alone has the numbers of the lines

from pipeline.errors import InputError

ENV_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def collect_env_vars(names: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Values by name; a name that is given alone wins over one in a file.

    Parameters
    ----------
    names: variables of this process' environment.
    files: with a KEY=VALUE on each line, as python-dotenv reads them: `export` before a name, quotes around a value (in
        double quotes with escapes such as \\n), comments from `#` on, at the end of a value without quotes too. `$NAME`
        and `${NAME}` are not replaced: a value is sent as it was written.

    Raises
    ------
    InputError: no such variable or file, or a line of another form. No value is ever quoted.
    """
    env_vars: dict[str, str] = {}
    for file in files:
        env_vars |= _read_env_file(file)
    for name in names:
        if "=" in name:
            raise InputError(
                f"--env takes a name, and its value from your environment, not {name.partition('=')[0]}=...",
                where="--env",
                fix=f"export {name.partition('=')[0]}=..., then --env {name.partition('=')[0]}; or use --env-file",
            )
        if name not in os.environ:
            raise InputError(f"the environment has no {name}", where=f"--env {name}", fix=f"export {name}=... first")
        env_vars[name] = os.environ[name]
    return env_vars


def _read_env_file(file: str) -> dict[str, str]:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"cannot be read: {reason}", where=f"--env-file {file}", fix="name a file") from None
    env_vars = {}
    for binding in parse_stream(StringIO(text)):
        if binding.key is None and not binding.error:  # a comment, or blank lines at the end
            continue
        if binding.value is None or not ENV_NAME_PATTERN.fullmatch(binding.key or ""):
            statement = binding.original.string
            blank = statement[: len(statement) - len(statement.lstrip())]
            number = binding.original.line + blank.count("\n")
            raise InputError("a line that is no KEY=VALUE", where=f"--env-file {file}, line {number}", fix="repair it")
        env_vars[binding.key or ""] = binding.value
    return env_vars
