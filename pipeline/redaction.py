"""Secrets: known by the names of environment variables and by where they stand in a URL, and written nowhere.

A secret is only ever named: `env:NAME` in a job file is looked up where it is used. `scrub` takes secrets out of all
that is printed or stored; a job that holds one is refused before anything is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from pipeline.errors import InputError, TrainyardError

SHORTEST = 8
"""Characters of a variable's value that is taken for a secret: shorter ones stand in many words."""
SHORTEST_HIDDEN = 4
"""The same of a variable that was said to hold one."""

_NAME = re.compile(
    r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|(?:ACCESS|ACCOUNT|API|AUTH|ENCRYPTION|SIGNING)_?KEY|CONNECTION_STRING|_SAS$|_PAT$",
    re.IGNORECASE,
)
_WHERE_IT_LIES = re.compile(r"_(?:FILE|PATH|DIR|ID|NAME)$", re.IGNORECASE)
"""Ends of names that say where a secret is, or whose: those may be told."""
_PASSWORD = re.compile(r"(\w://[^\s/@:]*):(?!\d+(?:/|\s|$))\S*@")
_QUERY = re.compile(r"(\w://[^\s?]*)\?[^\s'\")]*")
_SECRET_QUERY = re.compile(
    r"\w://\S*[?&][^\s=&]*(?:sig|token|secret|password|passwd|credential|key|auth)[^\s=&]*=", re.IGNORECASE
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tab and new line, and those that turn the direction of writing."""
_NAMED = re.compile(r"env:([A-Za-z_]\w*)")

_hidden: set[str] = set()


def hide(names: Iterable[str]) -> None:
    """Keep the values of these environment variables out of all that is written, whatever they are called."""
    _hidden.update(names)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return name in _hidden or (_NAME.search(name) is not None and _WHERE_IT_LIES.search(name) is None)


def scrub(text: str) -> str:
    """`text` without passwords and query strings in URLs, and without the values of secret environment variables."""
    text = _PASSWORD.sub(r"\1:***@", text)
    text = _QUERY.sub(r"\1?***", text)
    for value in _values():
        text = text.replace(value, "***")
    return text


def scrubbed(tree: Any) -> Any:
    """Plain values, each text in them scrubbed."""
    if isinstance(tree, str):
        return scrub(tree)
    if isinstance(tree, Mapping):
        return {key: scrubbed(value) for key, value in tree.items()}
    return [scrubbed(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def printable(text: str) -> str:
    """`text` for a terminal: scrubbed, and without what moves a cursor or worse, for it may come from storage."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", scrub(text))


def redact(error: BaseException) -> None:
    """Take secrets out of an error's words, in place, and of those that it came from."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(scrub(part) if isinstance(part, str) else part for part in one.args)
        if isinstance(one, TrainyardError):
            one.what, one.where, one.fix = scrub(one.what), scrub(one.where), scrub(one.fix)
        waiting += [one.__cause__, one.__context__]


def holds_secret(text: str) -> bool:
    """Whether a value of a job would give a secret away: a URL's password or signature, a secret variable's value."""
    return bool(_PASSWORD.search(text) or _SECRET_QUERY.search(text) or any(value in text for value in _values()))


def secrets_in(tree: Any, key: str = "") -> Iterator[str]:
    """Keys, as `data.url`, of the values that would give a secret away."""
    if isinstance(tree, str) and holds_secret(tree):
        yield key
    elif isinstance(tree, (Mapping, list, tuple)):
        for name, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from secrets_in(value, f"{key}.{name}" if key else str(name))


def is_looked_up(value: str) -> bool:
    """Whether it names an environment variable, as `env:NAME`."""
    return _NAMED.fullmatch(value) is not None


def looked_up(value: str, where: str = "") -> str:
    """The value of the environment variable that `env:NAME` names, kept secret from now on; any other text as it is.

    Raises
    ------
    InputError: there is no such variable.
    """
    named = _NAMED.fullmatch(value)
    if named is None:
        return value
    name = named[1]
    if name not in os.environ:
        raise InputError(f"the environment has no {name}", where=where or value, fix=f"export {name}=... first")
    hide([name])
    return os.environ[name]


def looked_up_in(tree: Any, where: str = "") -> Any:
    """Plain values with every `env:NAME` looked up."""
    if isinstance(tree, str):
        return looked_up(tree, where)
    if isinstance(tree, Mapping):
        return {key: looked_up_in(value, f"{where}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [looked_up_in(value, where) for value in tree]
    return tree


def _values() -> list[str]:
    """What must not be seen, as it is and as it stands in a URL, in JSON and in single lines; the longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        shortest = SHORTEST_HIDDEN if name in _hidden else SHORTEST
        if len(value) >= shortest and is_secret_name(name):
            lines = [line.strip() for line in value.splitlines()] if "\n" in value else []
            found |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
            found |= {line for line in lines if len(line) >= 2 * SHORTEST}
    return sorted(found, key=len, reverse=True)
