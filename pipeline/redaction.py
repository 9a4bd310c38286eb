"""Secrets: known by their names, by their form, and by where they stand in a URL; and written nowhere.

A secret is only ever named: `env:NAME` in a job file is looked up where it is used. `scrub` takes secrets out of all
that is printed or stored; a job that holds one is refused before anything is written.
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
"""Characters of a variable's value that is taken for a secret: shorter ones stand in many words."""
MIN_REGISTERED_LENGTH = 4
"""The same of a variable that was said to hold one."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""Words of a name in any of the usual forms: API_KEY, api-key, apiKey2."""
_SECRET_WORD = re.compile(
    r"\w*(?:secrets?|passwords?|passwd|passphrase|credentials?)|tokens?"
    r"|(?:api|auth|access|account|encryption|private|secret|signing)(?:key|token)s?|(?:db|ftp|ldap|mail|pg|sql|ssh|user)pass"
)
"""One anywhere in a name, where no word of `_OF_TEXT` stands beside a token."""
_TEXT_TOKEN_WORD = re.compile(
    r"additional|bos|cls|end|eos|first|image|last|mask|max|min|next|num|pad|page|per|sep|special|start|stop|total|unk"
)
"""Beside `token`: then it is a piece of text, or of a list."""
_SECRET_LAST_WORD = re.compile(r"pass|pwd|pw|pat|sas|auth|authorization|bearer|jwt|signature|sig|private")
"""At the end of a name."""
_ORDINARY_WHEN_ALONE = re.compile(r"pwd|pw|pat|sas|auth|signature|sig|private")
"""... but behind another word only: PWD is where a shell is."""
_ACCESS_KEY_WORD = re.compile(r"access|account|api|auth|encryption|master|private|secret|signing|storage")
"""Before `key` anywhere in a name."""
_DATA_KEY_WORD = re.compile(
    r"any|batch|bucket|cache|class|column|composite|customer|data|dedup|dict|feature|field|file|foreign|group|hash|hot"
    r"|id|image|index|input|item|join|json|label|lookup|map|mask|merge|metric|natural|object|order|output|partition"
    r"|path|primary|pub|public|query|record|routing|row|sample|sequence|shard|sort|split|state|surrogate|table|target"
    r"|text|time|unique|user|value"
)
"""Before `key` at the end of a name: then it is one of data. Any other is taken for one that opens something, such as
OPENAI_KEY."""
_NOT_SECRET_LAST_WORD = re.compile(
    r"algorithm|arn|columns?|count|dir|enabled|expires|expiry|field|file|header|host|ids?|length|limit|method|mode"
    r"|names?|parallelism|path|port|prefix|provider|size|sock|space|types?|ur[il]|version"
)
"""Ends of names that say where a secret is, whose, or how long: those may be told."""
_ENVIRONMENT_WORD = re.compile(r"dev|live|new|old|prod|production|stage|staging|test")
"""Ends of names that leave everything as it is: DB_PASS_PROD."""
_SECRET_QUERY_NAME = re.compile(r"auth|code|key|pw|pwd|sas|sig|signature", re.IGNORECASE)
"""Parameters of a URL that let in whoever has them, though their names are words like any other."""

_USERINFO = re.compile(r"(?<![\w+.-])(\w[\w+.-]*)://(?!\[)([^\s/@:?#]*)(?::(?!\d+(?:/|\s|$))(\S*))?@")
_TOKEN_USER_SCHEMES = ("http", "https", "dav", "davs", "webdav", "webdavs")
"""Schemes whose user is hardly ever anything but a token."""
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes that have a container where others have a user."""
_QUERY = re.compile(r"(\w://[^\s?#]*)(\?|#(?=[^\s'\")]*=))[^\s'\")]*")
_PARAMETER = re.compile(r"[?&#;]([^\s=&?#;]+)=[^\s&]")
_SECRET_SETTING = re.compile(
    r"\b((?:[\w-]{0,40}(?:password|passwd|secret)|pwd|token|api[_-]?key|(?:access|account|auth)[_-]?(?:key|token)|sig)\s*=\s*)"
    r"(?!\*\*\*|env:)[^\s&;,'\")]+",
    re.IGNORECASE,
)
"""A secret with its name: in a connection string, or in a library's message."""
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
"""What is a secret by its own form, whatever it is called: tokens of well-known services, keys, signatures."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tab and new line, and those that turn the direction of writing."""
_ENV_REFERENCE = re.compile(r"env:([A-Za-z_]\w*)")

_registered_names: set[str] = set()


def register_secrets(names: Iterable[str]) -> None:
    """Keep the values of these environment variables out of all that is written, whatever they are called."""
    _registered_names.update(names)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return name in _registered_names or _has_secret_word(name) or _is_access_key(name)


@cache
def _has_secret_word(name: str) -> bool:
    """Whether the words of a name say that what is called so is a secret."""
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
    """Whether a name is that of a key, and not of one that data has."""
    words = _split_words(name)
    return len(words) > 1 and words[-1] == "key" and not _DATA_KEY_WORD.fullmatch(words[-2])


def _split_words(name: str) -> list[str]:
    words = [word.lower() for word in _WORD.findall(name)]
    while len(words) > 1 and _ENVIRONMENT_WORD.fullmatch(words[-1]):
        words.pop()
    return words


def redact(text: str) -> str:
    """`text` without passwords and query strings in URLs, without what looks like a secret, and without the values of
    secret environment variables."""
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
    """Whether the user of a URL is what lets in, and no name."""
    kind = scheme.lower().rpartition("+")[2]  # git+https
    return bool(user) and (kind in _TOKEN_USER_SCHEMES or (kind not in _CONTAINER_SCHEMES and _is_random_looking(user)))


def _is_random_looking(value: str) -> bool:
    """Whether a text looks as if a machine had drawn it at random: a digest, or letters of both cases and digits."""
    if not re.fullmatch(r"[\w+/=.~-]{16,}", value) or sum(letter.isdigit() for letter in value) < 3:
        return False
    is_hex = re.fullmatch(r"[0-9a-f-]+|[0-9A-F-]+", value) is not None
    return is_hex or (value.lower() != value and value.upper() != value)


def redact_tree(tree: Any) -> Any:
    """Plain values, each text in them scrubbed."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, Mapping):
        return {key: redact_tree(value) for key, value in tree.items()}
    return [redact_tree(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def sanitize_for_terminal(text: str) -> str:
    """`text` for a terminal: scrubbed, and without what moves a cursor or worse, for it may come from storage."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", redact(text))


def redact_error(error: BaseException) -> None:
    """Take secrets out of an error's words, in place, and of those that it came from."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        current.args = tuple(redact(part) if isinstance(part, str) else part for part in current.args)
        if isinstance(current, TrainyardError):
            current.what, current.where, current.fix = redact(current.what), redact(current.where), redact(current.fix)
        waiting += [current.__cause__, current.__context__]


def has_secret(text: str) -> bool:
    """Whether a value of a job would give a secret away: a URL's password, token or signature, what has the form of a
    secret, a secret variable's value."""
    if any(password is not None or _is_token_user(scheme, user) for scheme, user, password in _iter_url_users(text)):
        return True
    if "://" in text and any(_is_secret_parameter(name) for name in _PARAMETER.findall(text)):
        return True
    if _SECRET_FORMATS.search(text) or _SECRET_SETTING.search(text):
        return True
    return any(value in text for value in _secret_values())


def _iter_url_users(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Scheme, user and password of the URLs in a text; one may stand in another, as in `simplecache::https://...`."""
    for match in _USERINFO.finditer(text):
        yield match[1], match[2], match[3]


def _is_secret_parameter(name: str) -> bool:
    return _SECRET_QUERY_NAME.fullmatch(name) is not None or is_secret_name(name)


def find_secrets(tree: Any, key: str = "", name: str = "") -> Iterator[str]:
    """Keys, as `data.url`, of the values that would give a secret away: by what they are, or by what they are called,
    such as a `password` in the arguments of the user's own code."""
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
    """Whether it names an environment variable, as `env:NAME`."""
    return _ENV_REFERENCE.fullmatch(value) is not None


def resolve_env(value: str, where: str = "") -> str:
    """The value of the environment variable that `env:NAME` names, kept secret from now on; any other text as it is.

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
    """Plain values with every `env:NAME` looked up."""
    if isinstance(tree, str):
        return resolve_env(tree, where)
    if isinstance(tree, Mapping):
        return {key: resolve_env_in_tree(value, f"{where}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [resolve_env_in_tree(value, where) for value in tree]
    return tree


def _secret_values() -> list[str]:
    """What must not be seen, as it is and as it stands in a URL, in JSON and in single lines; the longest first."""
    values: set[str] = set()
    for name, value in os.environ.items():
        shortest = MIN_REGISTERED_LENGTH if name in _registered_names else MIN_SECRET_LENGTH
        if len(value) >= shortest and is_secret_name(name):
            lines = [line.strip() for line in value.splitlines()] if "\n" in value else []
            values |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
            values |= {line for line in lines if len(line) >= 2 * MIN_SECRET_LENGTH}
    return sorted(values, key=len, reverse=True)
