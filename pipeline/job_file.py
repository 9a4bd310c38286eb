"""Job files: YAML and overrides to a `Job` and back. Errors name the place and the nearest known key."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import JobError
from pipeline.job import Job

SHORT_FORMS = {"seed": "all", "task": "kind"}
"""`seed: 1` is short for `seed: {all: 1}`, `task: binary` for `task: {kind: binary}`."""

DEFAULT_VARIANTS = ("mlp", "multiclass", "sgd", "random")
"""What `kind` and `by` are where they are not given."""


# ------------------------------------------------------------------------------------------------- YAML

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
"""The core schema of YAML 1.2 (section 10.3.2): only true and false are booleans, 1e-3 is a number, 010 is ten."""


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.2: plain values only, no dates, bytes or sets."""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for anything but text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out each time."""
        return True


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "float", "str", "seq")
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _mapping_once(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool)):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_once)


def parse_yaml(text: str, where: str) -> Any:
    """Plain values from YAML text.

    Raises
    ------
    JobError: not YAML, with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise JobError(f"not valid YAML: {problem}", where=place) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise JobError(f"not valid YAML: {error}", where=where) from None


# --------------------------------------------------------------------------------------------- to a job


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file, the files it is based on, and `KEY=VALUE` overrides.

    Raises
    ------
    JobError: a missing file, broken YAML, an unknown key or a value out of range.
    """
    return build_job(_apply(_read_tree(Path(path)), overrides), where=str(path))


def parse_job(text: str, where: str) -> Job:
    """A job from the text of a resolved job file, as stored with a run. No `base:`, no environment."""
    return build_job(_mapping(parse_yaml(text, where), where), where=where)


def override_job(job: Job, overrides: Iterable[str]) -> Job:
    """The same job with `KEY=VALUE` overrides."""
    words = list(overrides)
    return build_job(_apply(job.resolved(), words), where="--set") if words else job


def dump_job(job: Job) -> str:
    """The resolved job as YAML, every default spelled out; `parse_job` gives the same job back."""
    return yaml.dump(job.resolved(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def build_job(tree: Mapping[str, Any], where: str) -> Job:
    """Check a tree of plain values.

    Raises
    ------
    JobError: every problem found, each with its key.
    """
    try:
        return Job.model_validate(dict(tree))
    except ValidationError as error:
        lines = _explain(error, tree)
        what = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])
        raise JobError(what, where=where, fix="`trainyard init` writes a job file with every key explained") from None


# --------------------------------------------------------------------------------------------- reading


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        path = path.expanduser().resolve() if seen else path
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError("no such job file", where=str(path), fix="`trainyard init` writes one") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise JobError(f"cannot be read: {error}", where=str(path)) from None
    tree: dict[str, Any] = _with_environment(_mapping(parse_yaml(text, str(path)), str(path)), str(path))
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise JobError(f"base: must be the path of a job file, not {base!r}", where=str(path))
    here = path.resolve()
    if here in seen:
        raise JobError(f"base: {base} leads in a circle", where=str(path))
    below = _read_tree(path.parent / base, (*seen, here))
    for key in SHORT_FORMS:
        if isinstance(tree.get(key), dict):
            _lengthen(below, key)
    return _merge(below, tree)


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise JobError("a job file is a mapping of keys to values", where=where)
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base` by key; a list, or a mapping of another `kind` or `by`, is replaced whole."""
    merged: dict[str, Any] = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping) and not _another_variant(below, value):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _another_variant(below: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    for tag in ("kind", "by"):
        if tag in over:
            unsaid = over[tag] if over[tag] in DEFAULT_VARIANTS else None
            if over[tag] != below.get(tag, unsaid):
                return True
    return False


def _lengthen(tree: dict[str, Any], key: str) -> None:
    """Write a short form out, so that more can be laid on it."""
    value = tree.get(key)
    if key in SHORT_FORMS and value is not None and not isinstance(value, (dict, list)):
        tree[key] = {SHORT_FORMS[key]: value}


def _with_environment(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_environment(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_environment(item, where) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def fill(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise JobError(f"the environment has no {match[1]}", where=where, fix=f"export {match[1]}=... first")
        return os.environ[match[1]]

    filled = re.sub(r"\$\{(\w+)\}", fill, value)
    whole = re.fullmatch(r"\$\{\w+\}", value)
    return parse_yaml(filled, where) if whole else filled


# ------------------------------------------------------------------------------------------- overriding


def _apply(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        where = f"--set {override}"
        if not equals or not key.strip():
            raise JobError("an override is KEY=VALUE", where=where, fix="for example --set train.batch_size=256")
        path = key.strip().split(".")
        if path[0] == "base":
            raise JobError("base stands in the job file alone", where=where, fix="write a job file with this base")
        _set(tree, path, parse_yaml(text, where), where)
    return tree


def _set(tree: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    holder: Any = tree
    _lengthen(tree, path[0] if len(path) > 1 else "")
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
            both = isinstance(below, dict) and isinstance(value, dict) and not _another_variant(below, value)
            holder[slot] = _merge(below, value) if both else value
        elif not isinstance(below, (dict, list)):
            default = _default(tree, path[: depth + 1])
            holder[slot] = default if isinstance(default, list) else {}
        holder = holder[slot]


def _default(tree: Mapping[str, Any], path: list[str]) -> Any:
    """What stands at a path that the file leaves out, so that an entry of a default list can be overridden."""
    try:
        value: Any = Job.model_validate({"name": "any", **tree}).resolved()
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


# ------------------------------------------------------------------------------------------- explaining

_SHAPE_ERRORS = ("model_type", "dict_type", "model_attributes_type")
"""A branch of a union that is a mapping, where the value is none."""

_WORDS = {
    **dict.fromkeys(_SHAPE_ERRORS, "must be a mapping of keys to values"),
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
    "invalid_key": "is no word",
}


def _explain(error: ValidationError, tree: Mapping[str, Any]) -> list[str]:
    """One line for each key that has a problem, by the name that the user wrote."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for problem in error.errors():
        found.setdefault(_written(problem, tree), []).append(problem)
    misspelt = {_meant(path, problem) for path, problems in found.items() for problem in problems}
    # Where a union fails, each branch complains; the branch that got furthest is what the user meant.
    return [
        _line(path, problems)
        for path, problems in found.items()
        if path not in misspelt and not any(len(other) > len(path) and other[: len(path)] == path for other in found)
    ]


def _meant(path: tuple[Any, ...], problem: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The known key that an unknown one stands for: no news that it is missing."""
    is_unknown = problem["type"] == "extra_forbidden"
    return (*path[:-1], _nearest(str(path[-1]), _known_keys(problem["loc"][:-1]))) if is_unknown else None


def _written(problem: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[Any, ...]:
    """The path of a problem without pydantic's names of branches: the parts that stand in the tree."""
    path, here = [], typing.cast("Any", tree)
    for depth, part in enumerate(problem["loc"]):
        is_key = isinstance(here, dict) and part in here
        if is_key or (isinstance(here, list) and isinstance(part, int) and part < len(here)):
            here = here[part]
            path.append(part)
        elif problem["type"] == "missing" and depth == len(problem["loc"]) - 1:
            path.append(part)
    return tuple(path)


def _line(path: tuple[Any, ...], problems: list[Mapping[str, Any]]) -> str:
    key = ".".join(str(part) for part in path)
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            return f"{key}: unknown key{_hint(str(path[-1]), known)}; known here: {', '.join(known)}"
        if problem["type"] == "missing":
            return f"{key}: missing"
        if problem["type"] == "union_tag_invalid":
            context = problem["ctx"]
            key = f"{key}.{context['discriminator'].strip(chr(39))}"
            return f"{key}: {_one_of(context['expected_tags'], context['tag'])}, not {context['tag']!r}"
    fitting = [problem for problem in problems if problem["type"] == "value_error"]  # it had the shape of its branch
    alternatives = fitting or [problem for problem in problems if problem["type"] not in _SHAPE_ERRORS] or problems
    says = list(dict.fromkeys(_message(problem) for problem in alternatives))
    text = " or ".join([says[0], *(said.removeprefix("must be ") for said in says[1:])])
    value = problems[0]["input"]
    is_said = isinstance(value, (dict, list)) or (problems[0]["type"] == "value_error" and str(value) in text)
    shown = "" if is_said else f", not {reprlib.repr(value)}"
    return f"{key}: {text}{shown}" if key else f"{text}{shown}"


def _message(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "literal_error":
        return _one_of(problem["ctx"]["expected"], problem["input"])
    said = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    return _WORDS.get(problem["type"], said)


def _one_of(expected: str, value: Any) -> str:
    choices = re.findall("'([^']*)'", expected)
    return f"must be {expected}{_hint(str(value), choices)}"


def _known_keys(place: tuple[Any, ...]) -> list[str]:
    """The keys of the branch at `place`, a path with pydantic's names of branches."""
    kinds: list[type[BaseModel]] = [Job]
    for part in place:
        named = [kind for kind in kinds if part == kind.__name__ or part in _tags(kind)]
        inner = [kind.model_fields[part].annotation for kind in kinds if part in kind.model_fields]
        if named or inner:
            kinds = named or [found for annotation in inner for found in _models_in(annotation)]
    keys = {field.alias or name for kind in kinds for name, field in kind.model_fields.items()}
    return sorted(keys | ({"base"} if not place else set()))


def _tags(kind: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(kind.model_fields["by"].annotation) if "by" in kind.model_fields else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in typing.get_args(annotation) for found in _models_in(inner)]


def _nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like this one, or nothing where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def _hint(word: str, known: Iterable[str]) -> str:
    near = _nearest(word, known)
    return f" (did you mean {near!r}?)" if near else ""
