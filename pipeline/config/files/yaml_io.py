"""YAML 1.2 with safe types only, for reading and writing."""

from __future__ import annotations

import re
from typing import Any

import yaml

from pipeline.errors import JobError

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

MAX_CHARACTERS, MAX_VALUES, MAX_DIGITS = 1_000_000, 100_000, 100
"""Limits of a job file: a few lines of aliases can expand to more values than fit into memory."""


class _YamlLoader(yaml.SafeLoader):
    """Load safe YAML 1.2: plain values only, no dates, bytes or sets."""


class YamlDumper(yaml.SafeDumper):
    """Quote text that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values in full each time."""
        return True


_YamlLoader.yaml_implicit_resolvers = {}
_YamlLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "float", "str", "seq")
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_YamlLoader, YamlDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _construct_int(loader: _YamlLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _construct_unique_mapping(loader: _YamlLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool)):
            raise yaml.constructor.ConstructorError(None, None, "a key must be text or a number", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_YamlLoader.add_constructor("tag:yaml.org,2002:map", _construct_unique_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Return the plain values of a YAML text.

    Raises
    ------
    JobError: not YAML, with line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise JobError(f"not a job file: {len(text):,} characters", where=where, fix="give the path of a job file")
    try:
        tree = yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise JobError(f"not valid YAML: {problem}", where=location) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deeply nested lists
        raise JobError(f"not valid YAML: {error}", where=where) from None
    if not _has_few_values(tree):
        fix = "write fewer; the values of an alias count each time it is used"
        raise JobError(f"more than {MAX_VALUES:,} values", where=where, fix=fix)
    return tree


def _has_few_values(tree: Any) -> bool:
    """Return whether a tree has at most `MAX_VALUES` values, those of aliases counted each time."""
    pending, count = [tree], 0
    while pending:
        value = pending.pop()
        count += 1
        if count + len(pending) > MAX_VALUES:
            return False
        if isinstance(value, (dict, list)):
            pending += value.values() if isinstance(value, dict) else value
    return True
