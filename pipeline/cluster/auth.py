"""The token of a cluster that asks for one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import InputError

TOKEN_SOURCES = "--token-file FILE, RAY_AUTH_TOKEN, or ~/.ray/auth_token (RAY_AUTH_TOKEN_PATH names another file)"  # noqa: S105 - no token, but where it may come from


@dataclass(frozen=True)
class Token:
    """A token, and where it was found."""

    value: str = field(repr=False)
    source: str


def find_token(file: str | None) -> Token | None:
    """The token of `--token-file`, else RAY_AUTH_TOKEN, else of Ray's own files; None where there is none.

    Raises
    ------
    InputError: a file that is named and cannot be read, or is empty.
    """
    if file is not None:
        return _read_token(file, "--token-file")
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _read_token(path, "RAY_AUTH_TOKEN_PATH")
    default_path = Path("~/.ray/auth_token").expanduser()
    return _read_token(str(default_path), str(default_path)) if default_path.is_file() else None


def _read_token(file: str, source: str) -> Token:
    try:
        value = Path(file).expanduser().read_text().strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(
            f"the token cannot be read: {reason}", where=f"{source}: {file}", fix="name its file"
        ) from None
    if not value:
        raise InputError("the file is empty", where=f"{source}: {file}", fix="put the cluster's token into it")
    return Token(value, f"{source}: {file}" if source != file else file)
