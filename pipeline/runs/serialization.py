"""Plain values as strict JSON with digests, and UTC timestamps."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

MAX_DEPTH = 100
"""Maximum depth of nested lists and mappings: parsed values are processed recursively."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON, keys in the given order; a nonfinite float becomes the string "nan", "inf" or "-inf"."""
    return json.dumps(_to_plain(value), allow_nan=False, indent=indent)


def from_json(text: str | bytes) -> Any:
    """Parse what `to_json` returned; ValueError for anything else."""
    try:
        tree = json.loads(text, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    nodes = [tree]
    for _ in range(MAX_DEPTH):
        nodes = [
            child
            for node in nodes
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not nodes:
            return tree
    raise ValueError("nested too deeply")


def compute_digest(tree: Mapping[str, Any]) -> str:
    """Return the digest of a tree of plain values that does not contain the digest yet."""
    return hashlib.sha256(to_json(tree).encode()).hexdigest()


def with_digest(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values with their digest appended, by which `verify_digest` detects damage."""
    plain: dict[str, Any] = from_json(to_json(tree))
    return {**plain, "sha256": compute_digest(plain)}


def verify_digest(tree: Any) -> dict[str, Any]:
    """Return what `with_digest` was given; ValueError if it was altered since."""
    if not isinstance(tree, dict):
        raise ValueError("not a mapping of names to values")
    content = {name: value for name, value in tree.items() if name != "sha256"}
    if tree.get("sha256") != compute_digest(content):
        raise ValueError("it was altered")
    return content


def utc_now() -> str:
    """Return the UTC time to the microsecond, as ISO 8601: information for users, never compared by a protocol."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def seconds_since(timestamp: str, clock_s: float | None = None) -> float:
    """Return the age in seconds of a time from `utc_now`, at `clock_s` (seconds since 1970; default: now)."""
    return (time.time() if clock_s is None else clock_s) - datetime.fromisoformat(timestamp).timestamp()


def check_timestamp(text: str) -> str:
    """Return `text` if it is a time as `utc_now` writes it; else raise ValueError."""
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return text


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item"):  # a scalar of NumPy or torch
        return _to_plain(value.item())
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be stored as JSON")
