"""Redaction of secrets, which are recognized by name, by format, and by their position in a URL.

A job file only names a secret: `env:NAME` is resolved where it is used. `redact` removes secrets from everything that
is printed or stored; a job that contains one is refused before anything is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any
from urllib.parse import quote

from pipeline.errors import InputError, TrainyardError

MIN_SECRET_LENGTH = 8
"""Minimum length of an environment variable's value to be redacted: shorter values occur within ordinary words."""
MIN_REGISTERED_LENGTH = 4
"""The same for a variable that was registered as a secret."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""Words of a name in any usual form: API_KEY, api-key, apiKey2."""
_SECRET_WORD = re.compile(
    r"\w*(?:secrets?|passwords?|passwd|passphrase|credentials?)|tokens?"
    r"|(?:api|auth|access|account|encryption|private|secret|signing)(?:key|token)s?|(?:db|ftp|ldap|mail|pg|sql|ssh|user)pass"
)
"""Words that make a name secret, anywhere in it; `token` only without a word of `_TEXT_TOKEN_WORD`."""
_TEXT_TOKEN_WORD = re.compile(
    r"additional|bos|cls|end|eos|first|image|last|mask|max|min|next|num|pad|page|per|sep|special|start|stop|total|unk"
)
"""Words beside `token` that make it a token of text, or of a list."""
_SECRET_LAST_WORD = re.compile(r"pass|pwd|pw|pat|sas|auth|authorization|bearer|jwt|signature|sig|private")
"""Words that make a name secret at its end."""
_ORDINARY_WHEN_ALONE = re.compile(r"pwd|pw|pat|sas|auth|signature|sig|private")
"""Those of them that need another word before them: PWD alone is the working directory of a shell."""
_ACCESS_KEY_WORD = re.compile(r"access|account|api|auth|encryption|master|private|secret|signing|storage")
"""Words that make a name secret directly before `key`, anywhere in it."""
_DATA_KEY_WORD = re.compile(
    r"any|batch|bucket|cache|class|column|composite|customer|data|dedup|dict|feature|field|file|foreign|group|hash|hot"
    r"|id|image|index|input|item|join|json|label|lookup|map|mask|merge|metric|natural|object|order|output|partition"
    r"|path|primary|pub|public|query|record|routing|row|sample|sequence|shard|sort|split|state|surrogate|table|target"
    r"|text|time|unique|user|value"
)
"""Words before a final `key` that make it a key of data. Any other final `key` counts as an access key, such as
OPENAI_KEY."""
_NOT_SECRET_LAST_WORD = re.compile(
    r"algorithm|arn|columns?|count|dir|enabled|expires|expiry|field|file|header|host|ids?|length|limit|method|mode"
    r"|names?|parallelism|path|port|prefix|provider|size|sock|space|types?|ur[il]|version"
)
"""Final words of names whose values describe a secret, such as its path or length, and are not secret themselves."""
_ENVIRONMENT_WORD = re.compile(r"dev|live|new|old|prod|production|stage|staging|test")
"""Final words of names that are ignored: DB_PASS_PROD."""
_SECRET_QUERY_NAME = re.compile(r"auth|code|key|pw|pwd|sas|sig|signature", re.IGNORECASE)
"""URL parameters that hold a credential although their names are ordinary words."""

_USERINFO = re.compile(r"(?<![\w+.-])(\w[\w+.-]*)://(?!\[)([^\s/@:?#]*)(?::(?!\d+(?:/|\s|$))(\S*))?@")
_TOKEN_USER_SCHEMES = ("http", "https", "dav", "davs", "webdav", "webdavs")
"""Schemes whose user is almost always a token."""
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes that have a container in the position of the user."""
_QUERY = re.compile(r"(\w://[^\s?#]*)(\?|#(?=[^\s'\")]*=))[^\s'\")]*")
_PARAMETER = re.compile(r"[?&#;]([^\s=&?#;]+)=[^\s&]")
_SECRET_SETTING = re.compile(
    r"\b((?:[\w-]{0,40}(?:password|passwd|secret)|pwd|token|api[_-]?key|(?:access|account|auth)[_-]?(?:key|token)|sig)\s*=\s*)"
    r"(?!\*\*\*|env:)[^\s&;,'\")]+",
    re.IGNORECASE,
)
"""A secret after its name: in a connection string, or in a message of a library."""
_SECRET_FORMATS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|\bgh[oprsu]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{16,}|\bhf_[A-Za-z]{30,}"
    r"|\bsk-(?:[a-z]{2,8}-)?(?=\w*[0-9])(?=\w*[A-Z])\w{20,}[\w-]*|\bxox[abeprs]-[\w-]{10,}|\bAIza[\w-]{35}"
    r"|\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEI[\w-]{20,}|\bdapi[0-9a-f]{32}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
    r"|(?i:authorization\W{1,4}(?:bearer|basic|token)\s+)\S+|\bBearer\s+(?=\S*[0-9])[\w+/=.~-]{16,}"
    r"|(?:AccountKey|SharedAccessKey|SharedAccessSignature)=[^\s;]{8,}"
    r"|(?:^|[?&\s])(?:Signature|X-(?:Amz|Goog)-Signature)=[\w%+/=-]{8,}"
)
"""Formats that are secret under any name: tokens of well-known services, keys, signatures."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, and those that change the direction of text."""
_ENV_REFERENCE = re.compile(r"env:([A-Za-z_]\w*)")

_registered_names: set[str] = set()


def register_secrets(names: Iterable[str]) -> None:
    """Redact the values of these environment variables from now on, whatever their names."""
    _registered_names.update(names)


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name holds a secret."""
    return name in _registered_names or _has_secret_word(name) or _is_access_key(name)


@cache
def _has_secret_word(name: str) -> bool:
    """Return whether the words of a name mark its value as a secret."""
    words = _split_words(name)
    if not words or _NOT_SECRET_LAST_WORD.fullmatch(words[-1]):
        return False
    if any(_SECRET_WORD.fullmatch(word) for word in words):
        is_text = all(not _SECRET_WORD.fullmatch(word) or word in ("token", "tokens") for word in words)
        return not (is_text and any(_TEXT_TOKEN_WORD.fullmatch(word) for word in words))
    if any(_ACCESS_KEY_WORD.fullmatch(before) and word in ("key", "keys") for before, word in pairwise(words)):
        return True
    if words[-2:] in (["connection", "string"], ["conn", "str"]):
        return True
    is_last = _SECRET_LAST_WORD.fullmatch(words[-1]) is not None
    return is_last and (len(words) > 1 or _ORDINARY_WHEN_ALONE.fullmatch(words[-1]) is None)


@cache
def _is_access_key(name: str) -> bool:
    """Return whether a name is that of an access key, and not of a key of data."""
    words = _split_words(name)
    return len(words) > 1 and words[-1] == "key" and not _DATA_KEY_WORD.fullmatch(words[-2])


def _split_words(name: str) -> list[str]:
    words = [word.lower() for word in _WORD.findall(name)]
    while len(words) > 1 and _ENVIRONMENT_WORD.fullmatch(words[-1]):
        words.pop()
    return words


def redact(text: str) -> str:
    """Return `text` with `***` for passwords and query strings in URLs, for anything in the format of a secret, and for
    the values of secret environment variables."""
    text = _USERINFO.sub(_mask_userinfo, text)
    text = _QUERY.sub(r"\1\2***", text)
    text = _SECRET_SETTING.sub(r"\1***", text)
    text = _SECRET_FORMATS.sub("***", text)
    for value in _secret_values():
        text = text.replace(value, "***")
    return text


def _mask_userinfo(match: re.Match[str]) -> str:
    scheme, user, password = match.groups()
    if password is not None:
        return f"{scheme}://{'***' if _is_token_user(scheme, user) else user}:***@"
    return f"{scheme}://***@" if _is_token_user(scheme, user) else match[0]


def _is_token_user(scheme: str, user: str) -> bool:
    """Return whether the user part of a URL is a token, not a name."""
    transport = scheme.lower().rpartition("+")[2]  # git+https
    return bool(user) and (
        transport in _TOKEN_USER_SCHEMES or (transport not in _CONTAINER_SCHEMES and _is_random_looking(user))
    )


def _is_random_looking(value: str) -> bool:
    """Return whether a text looks randomly generated: a digest, or letters of both cases with digits."""
    if not re.fullmatch(r"[\w+/=.~-]{16,}", value) or sum(letter.isdigit() for letter in value) < 3:
        return False
    is_hex = re.fullmatch(r"[0-9a-f-]+|[0-9A-F-]+", value) is not None
    return is_hex or (value.lower() != value and value.upper() != value)


def redact_tree(tree: Any) -> Any:
    """Return nested plain values with each string redacted."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, Mapping):
        return {key: redact_tree(value) for key, value in tree.items()}
    return [redact_tree(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def sanitize_for_terminal(text: str) -> str:
    """Return `text` redacted and without control characters, since text from storage could control the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", redact(text))


def redact_error(error: BaseException) -> None:
    """Redact the messages of an error and of all its causes and contexts, in place."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        current.args = tuple(redact(part) if isinstance(part, str) else part for part in current.args)
        if isinstance(current, TrainyardError):
            current.what, current.where, current.fix = redact(current.what), redact(current.where), redact(current.fix)
        pending += [current.__cause__, current.__context__]


def has_secret(text: str) -> bool:
    """Return whether a value of a job contains a secret: a password, token or signature in a URL, anything in the
    format of a secret, or the value of a secret variable."""
    if any(password is not None or _is_token_user(scheme, user) for scheme, user, password in _iter_url_users(text)):
        return True
    if "://" in text and any(_is_secret_parameter(name) for name in _PARAMETER.findall(text)):
        return True
    if _SECRET_FORMATS.search(text) or _SECRET_SETTING.search(text):
        return True
    return any(value in text for value in _secret_values())


def _iter_url_users(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield scheme, user and password of the URLs in a text; they can be nested, as in `simplecache::https://...`."""
    for match in _USERINFO.finditer(text):
        yield match[1], match[2], match[3]


def _is_secret_parameter(name: str) -> bool:
    return _SECRET_QUERY_NAME.fullmatch(name) is not None or is_secret_name(name)


def find_secrets(tree: Any, key: str = "", name: str = "") -> Iterator[str]:
    """Yield the keys, such as `data.url`, of the values that contain a secret, by their content or by their name, such
    as a `password` in the arguments of the user's code."""
    if isinstance(tree, str) and (has_secret(tree) or _is_named_secret(name, tree)):
        yield key
    elif isinstance(tree, Mapping):
        for subkey, value in tree.items():
            yield from find_secrets(value, f"{key}.{subkey}" if key else str(subkey), str(subkey))
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from find_secrets(value, f"{key}.{number}", name)


def _is_named_secret(name: str, value: str) -> bool:
    if not value or is_env_reference(value) or re.fullmatch(r"\[.*\]|<.*>", value):  # [CLS], <pad>
        return False
    is_key = _is_access_key(name) or _SECRET_QUERY_NAME.fullmatch(name) is not None
    return _has_secret_word(name) or (is_key and _is_random_looking(value))


def is_env_reference(value: str) -> bool:
    """Return whether a value names an environment variable, as `env:NAME`."""
    return _ENV_REFERENCE.fullmatch(value) is not None


def resolve_env(value: str, where: str = "") -> str:
    """Return the value of the environment variable that `env:NAME` names, and register it as a secret. Return any other
    text unchanged.

    Raises
    ------
    InputError: there is no such variable.
    """
    match = _ENV_REFERENCE.fullmatch(value)
    if match is None:
        return value
    name = match[1]
    if name not in os.environ:
        raise InputError(f"the environment has no {name}", where=where or value, fix=f"export {name}=... first")
    register_secrets([name])
    return os.environ[name]


def resolve_env_in_tree(tree: Any, where: str = "") -> Any:
    """Return nested plain values with every `env:NAME` resolved."""
    if isinstance(tree, str):
        return resolve_env(tree, where)
    if isinstance(tree, Mapping):
        return {key: resolve_env_in_tree(value, f"{where}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [resolve_env_in_tree(value, where) for value in tree]
    return tree


def _secret_values() -> list[str]:
    """Return the values to redact, longest first: plain, quoted for URLs, escaped for JSON and Python, and by line."""
    values: set[str] = set()
    for name, value in os.environ.items():
        shortest = MIN_REGISTERED_LENGTH if name in _registered_names else MIN_SECRET_LENGTH
        if len(value) >= shortest and is_secret_name(name):
            lines = [line.strip() for line in value.splitlines()] if "\n" in value else []
            values |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
            values |= {line for line in lines if len(line) >= 2 * MIN_SECRET_LENGTH}
    return sorted(values, key=len, reverse=True)
