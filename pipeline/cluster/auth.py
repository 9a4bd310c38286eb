"""The authentication token of a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import InputError

TOKEN_SOURCES = "--token-file FILE, RAY_AUTH_TOKEN, or ~/.ray/auth_token (RAY_AUTH_TOKEN_PATH names another file)"  # noqa: S105 - no token, but its sources


@dataclass(frozen=True)
class Token:
    """A token, and its source."""

    value: str = field(repr=False)
    source: str


def find_token(file: str | None) -> Token | None:
    """Return the token of `--token-file`, else of RAY_AUTH_TOKEN, else of Ray's own files; None if there is none.

    Parameters
    ----------
    file: the value of `--token-file`.

    Raises
    ------
    InputError: a given file cannot be read, or is empty.
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
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise InputError(
            f"the token cannot be read: {reason}", where=f"{source}: {file}", fix="give the path of the token's file"
        ) from None
    if not value:
        raise InputError("the file is empty", where=f"{source}: {file}", fix="write the cluster's token into it")
    return Token(value, f"{source}: {file}" if source != file else file)
