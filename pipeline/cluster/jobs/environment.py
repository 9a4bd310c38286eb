"""The variables that are handed to a job: `--env KEY` and `--env-file FILE`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import InputError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def environment_of(names: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Values by name; a name that is given alone wins over one in a file.

    Parameters
    ----------
    names: variables of this process' environment.
    files: with a KEY=VALUE on each line; `#` begins a comment line, one pair of quotes around a value is taken off.

    Raises
    ------
    InputError: no such variable or file, or a line of another form. No value is ever quoted.
    """
    found: dict[str, str] = {}
    for file in files:
        found |= _file(file)
    for name in names:
        if "=" in name:
            raise InputError(
                f"--env takes a name, and its value from your environment, not {name.partition('=')[0]}=...",
                where="--env",
                fix=f"export {name.partition('=')[0]}=..., then --env {name.partition('=')[0]}; or use --env-file",
            )
        if name not in os.environ:
            raise InputError(f"the environment has no {name}", where=f"--env {name}", fix=f"export {name}=... first")
        found[name] = os.environ[name]
    return found


def _file(file: str) -> dict[str, str]:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"cannot be read: {reason}", where=f"--env-file {file}", fix="name a file") from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not NAME.fullmatch(name.strip()):
            raise InputError("a line that is no KEY=VALUE", where=f"--env-file {file}, line {number}", fix="repair it")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[name.strip()] = value
    return found
