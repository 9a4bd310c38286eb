"""Job files as plain trees: bases, environment variables and overrides are merged into one tree."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import JobConfig
from pipeline.config.files.yaml_io import parse_yaml
from pipeline.errors import JobError
from pipeline.redaction import has_secret, is_env_reference, is_secret_name

SHORT_FORMS = {"seed": "all", "task": "kind"}
"""`seed: 1` is short for `seed: {all: 1}`, `task: binary` for `task: {kind: binary}`."""

URL_PATH, CODE_PATH, WEIGHTS_PATH, RUN_PATH = ("data", "url"), ("code",), ("model", "weights"), ("model", "init_from")
LOCAL_PATHS = (URL_PATH, CODE_PATH, WEIGHTS_PATH, RUN_PATH, ("data", "root"), ("data", "cache", "folder"))
"""Fields that may hold a local path. (`storage` stays relative to the working directory.)"""

DEFAULT_VARIANTS = ("mlp", "multiclass", "sgd", "random")
"""Values of `kind` and `by` where they are not given."""


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a job file and its bases. seen: the files that are based on this one."""
    try:
        path = path.expanduser().resolve() if seen else path
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError("no such job file", where=str(path), fix="`trainyard init` writes one") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise JobError(f"cannot be read: {error}", where=str(path)) from None
    return merge_bases(require_mapping(parse_yaml(text, str(path)), str(path)), path, seen)


def merge_bases(tree: dict[str, Any], path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of a job file at `path`, with environment variables substituted and merged into its bases."""
    tree = with_absolute_paths(path.parent, _substitute_env(tree, str(path)))
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise JobError(f"base: must be the path of a job file, not {base!r}", where=str(path))
    resolved_path = path.resolve()
    if resolved_path in seen:
        raise JobError(f"base: {base} is circular: the file is based on itself", where=str(path))
    base_tree = read_tree(path.parent / base, (*seen, resolved_path))
    for key in SHORT_FORMS:
        if isinstance(tree.get(key), dict):
            _expand_short_form(base_tree, key)
    return _merge(base_tree, tree)


def with_absolute_paths(folder: Path, tree: Any, key: tuple[Any, ...] = ()) -> Any:
    """Return the values of a job, or of the part at `key` in it, with relative paths made absolute from `folder`: that
    of the file that holds them, or the working directory for overrides."""
    if isinstance(tree, Mapping):
        return {name: with_absolute_paths(folder, value, (*key, name)) for name, value in tree.items()}
    return _absolute_path(folder, tree, key) if isinstance(tree, str) and key in LOCAL_PATHS else tree


def _absolute_path(folder: Path, value: str, key: tuple[Any, ...]) -> str:
    if not value or is_env_reference(value) or "://" in value or re.match(r"\w+:/", value):
        return value
    if key in (URL_PATH, CODE_PATH):
        value = os.path.expanduser(value)  # `~` in the others is resolved on each machine of a cluster
    is_name = "/" not in value and (key == RUN_PATH or (key == WEIGHTS_PATH and not os.path.isfile(folder / value)))
    return value if is_name or value.startswith("~") else os.path.abspath(folder / value)


def require_mapping(tree: Any, where: str) -> dict[str, Any]:
    """Return the tree; raise JobError if it is not a mapping."""
    if not isinstance(tree, dict):
        raise JobError("a job file is a mapping of keys to values", where=where)
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base` by key; a list, or a mapping with another `kind` or `by`, is replaced as a whole."""
    merged: dict[str, Any] = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping) and not _is_other_variant(below, value):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _is_other_variant(below: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    for tag in ("kind", "by"):
        if tag in over:
            default = over[tag] if over[tag] in DEFAULT_VARIANTS else None
            if over[tag] != below.get(tag, default):
                return True
    return False


def _expand_short_form(tree: dict[str, Any], key: str) -> None:
    """Expand a short form in place, so that other keys can be merged into it."""
    value = tree.get(key)
    if key in SHORT_FORMS and value is not None and not isinstance(value, (dict, list)):
        tree[key] = {SHORT_FORMS[key]: value}


def _substitute_env(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _substitute_env(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute_env(item, where) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def fill(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise JobError(f"the environment has no {match[1]}", where=where, fix=f"export {match[1]}=... first")
        if is_secret_name(match[1]) or has_secret(os.environ[match[1]]):
            raise JobError(
                f"${{{match[1]}}} would write a secret into the run's job.yaml",
                where=where,
                fix=f"write env:{match[1]} instead (in a URL or in args): it is resolved only where it is used",
            )
        return os.environ[match[1]]

    filled = re.sub(r"\$\{(\w+)\}", fill, value)
    is_whole_value = re.fullmatch(r"\$\{\w+\}", value)
    return parse_yaml(filled, where) if is_whole_value else filled


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `KEY=VALUE` overrides to a tree, in place and in order."""
    for override in overrides:
        key, equals, text = override.partition("=")
        where = f"--set {override}"
        if not equals or not key.strip():
            raise JobError(
                "an override has the form KEY=VALUE", where=where, fix="for example --set train.batch_size=256"
            )
        path = key.strip().split(".")
        if path[0] == "base":
            raise JobError("base cannot be overridden", where=where, fix="write a job file with this base")
        _set_at_path(tree, path, with_absolute_paths(Path.cwd(), parse_yaml(text, where), tuple(path)), where)
    return tree


def _set_at_path(tree: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    holder: Any = tree
    _expand_short_form(tree, path[0] if len(path) > 1 else "")
    for depth, key in enumerate(path):
        slot: Any = key
        if isinstance(holder, list):
            if not key.isdecimal() or int(key) >= len(holder):
                raise JobError(f"the list has {len(holder)} items, no {key!r}", where=where)
            slot = int(key)
        elif key.isdecimal() and int(key) in holder:
            slot = int(key)
        below = holder[slot] if isinstance(holder, list) else holder.get(slot)
        if depth == len(path) - 1:
            is_merged = isinstance(below, dict) and isinstance(value, dict) and not _is_other_variant(below, value)
            holder[slot] = _merge(below, value) if is_merged else value
        elif not isinstance(below, (dict, list)):
            default = _default_at_path(tree, path[: depth + 1])
            holder[slot] = default if isinstance(default, list) else {}
        holder = holder[slot]


def _default_at_path(tree: Mapping[str, Any], path: list[str]) -> Any:
    """Return the default at a path that the file does not set, so that an entry of a default list can be overridden."""
    try:
        value: Any = JobConfig.model_validate({"name": "any", **tree}).to_dict()
    except ValidationError:
        return None
    for key in path:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list):
            value = value[int(key)]
        else:
            return None
    return value
