"""Messages about an invalid job file: each problem once, by the key as the user wrote it."""

from __future__ import annotations

import re
import reprlib
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config import SOURCE_CONFIGS, JobConfig, sources_with
from pipeline.config.base import closest_match, format_suggestion

_SHAPE_ERRORS = ("model_type", "dict_type", "model_attributes_type")
"""Errors of a union member that is a mapping, for a value that is not."""

_MESSAGES = {
    **dict.fromkeys(_SHAPE_ERRORS, "must be a mapping of keys to values"),
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
    "invalid_key": "is not a valid key",
}

_REQUIRED = {
    ("data", "url"): "the file or folder of the data",
    ("data", "label"): "the column to predict",
}
"""Required keys that only some sources have."""


def explain_validation_error(error: ValidationError, tree: Mapping[str, Any]) -> list[str]:
    """Return one line per key that has a problem, by its name as the user wrote it."""
    problems_by_path: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for problem in error.errors():
        problems_by_path.setdefault(_user_path(problem, tree), []).append(problem)
    if ("data", "source") in problems_by_path:  # unknown source: no key can be said to belong to another one
        problems_by_path = {
            path: problems for path, problems in problems_by_path.items() if not _other_sources(problems[0])
        }
    misspelled = {_suggested_path(path, problem) for path, problems in problems_by_path.items() for problem in problems}
    # Each member of a failed union reports errors; those with the longest path are of the member that the user meant.
    return [
        _format_problems(path, problems)
        for path, problems in problems_by_path.items()
        if path not in misspelled
        and not any(len(other) > len(path) and other[: len(path)] == path for other in problems_by_path)
    ]


def _suggested_path(path: tuple[Any, ...], problem: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the path of the known key that an unknown one is similar to: not reported as missing too."""
    is_unknown = problem["type"] == "extra_forbidden" and not _other_sources(problem)
    return (*path[:-1], closest_match(str(path[-1]), _known_keys(problem["loc"][:-1]))) if is_unknown else None


def _other_sources(problem: Mapping[str, Any]) -> list[str]:
    """Return the sources that have a key of `data`, for a problem that the given source does not have it."""
    is_unknown = problem["type"] == "extra_forbidden" and problem["loc"][0] == "data" and len(problem["loc"]) == 3
    return sources_with(str(problem["loc"][-1])) if is_unknown else []


def _user_path(problem: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the path of a problem without pydantic's names of union members: only the parts that are in the tree."""
    path, node = [], typing.cast("Any", tree)
    tagged_nodes = set()
    for depth, part in enumerate(problem["loc"]):
        if isinstance(node, dict) and node.get("by") == part and id(node) not in tagged_nodes:
            tagged_nodes.add(id(node))  # `by: column` names a union member first; the key `column` in it comes second
            continue
        is_key = isinstance(node, dict) and part in node
        if is_key or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = node[part]
            path.append(part)
        elif problem["type"] == "missing" and depth == len(problem["loc"]) - 1:
            path.append(part)
    return tuple(path)


def _format_problems(path: tuple[Any, ...], problems: list[Mapping[str, Any]]) -> str:
    key = ".".join(str(part) for part in path)
    for problem in problems:
        if others := _other_sources(problem):
            *first, last = others
            names = f"{', '.join(first)} or {last}" if first else last
            return f"data: {path[-1]} goes with source: {names}"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            hint = format_suggestion(str(path[-1]), known) or format_suggestion(
                str(path[-1]), _keys_of_all_sources(problem)
            )
            return f"{key}: unknown key{hint}; known here: {', '.join(known)}"
        if problem["type"] == "missing" and path in _REQUIRED:
            source = next(name for name, kind in SOURCE_CONFIGS.items() if kind.__name__ == problem["loc"][1])
            return f"data: source: {source} needs {path[-1]}, {_REQUIRED[path]}"
        if problem["type"] == "missing":
            return f"{key}: missing"
        if problem["type"] == "union_tag_invalid":
            context = problem["ctx"]
            key = f"{key}.{context['discriminator'].strip(chr(39))}"
            return f"{key}: {_format_choices(context['expected_tags'], context['tag'])}, not {context['tag']!r}"
    # A value error comes from the union member whose types fit.
    value_errors = [problem for problem in problems if problem["type"] == "value_error"]
    alternatives = value_errors or [problem for problem in problems if problem["type"] not in _SHAPE_ERRORS] or problems
    messages = list(dict.fromkeys(_format_message(problem) for problem in alternatives))
    text = " or ".join([messages[0], *(message.removeprefix("must be ") for message in messages[1:])])
    value = problems[0]["input"]
    hides_value = isinstance(value, (dict, list)) or (problems[0]["type"] == "value_error" and str(value) in text)
    suffix = "" if hides_value else f", not {reprlib.repr(value)}"
    return f"{key}: {text}{suffix}" if key else f"{text}{suffix}"


def _format_message(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "literal_error":
        return _format_choices(problem["ctx"]["expected"], problem["input"])
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    return _MESSAGES.get(problem["type"], message)


def _format_choices(expected: str, value: Any) -> str:
    choices = re.findall("'([^']*)'", expected)
    return f"must be {expected}{format_suggestion(str(value), choices)}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Return the keys of the node at `location`, a path with pydantic's names of union members."""
    models: list[type[BaseModel]] = [JobConfig]
    for part in location:
        matching_models = [kind for kind in models if part == kind.__name__ or part in _union_tags(kind)]
        annotations = [kind.model_fields[part].annotation for kind in models if part in kind.model_fields]
        if matching_models or annotations:
            models = matching_models or [model for annotation in annotations for model in _find_models(annotation)]
    keys = {field.alias or name for kind in models for name, field in kind.model_fields.items()}
    return sorted(keys | ({"base"} if not location else set()))


def _keys_of_all_sources(problem: Mapping[str, Any]) -> list[str]:
    is_of_data = problem["loc"][0] == "data" and len(problem["loc"]) == 3
    return [key for kind in SOURCE_CONFIGS.values() for key in kind.model_fields] if is_of_data else []


def _union_tags(kind: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(kind.model_fields["by"].annotation) if "by" in kind.model_fields else ()


def _find_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _find_models(inner)]
