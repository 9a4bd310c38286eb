"""Plain values on their way into strict JSON and back, and UTC times."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

MAX_DEPTH = 100
"""Levels of lists and mappings that may lie in each other: what is read is walked by functions that call themselves."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON, keys in the given order; a float that is not finite becomes the string "nan", "inf" or "-inf"."""
    return json.dumps(_to_plain(value), allow_nan=False, indent=indent)


def from_json(text: str | bytes) -> Any:
    """What `to_json` wrote; ValueError for anything else."""
    try:
        tree = json.loads(text, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("lists in lists in lists") from None
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
    raise ValueError("lists in lists in lists")


def compute_digest(tree: Mapping[str, Any]) -> str:
    """Digest of a tree of plain values, in which its own digest does not stand yet."""
    return hashlib.sha256(to_json(tree).encode()).hexdigest()


def with_digest(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with their digest behind them, by which `unsealed` finds out damage."""
    plain: dict[str, Any] = from_json(to_json(tree))
    return {**plain, "sha256": compute_digest(plain)}


def verify_digest(tree: Any) -> dict[str, Any]:
    """What `sealed` was given; ValueError where it was altered since."""
    if not isinstance(tree, dict):
        raise ValueError("no mapping of names to values")
    content = {name: value for name, value in tree.items() if name != "sha256"}
    if tree.get("sha256") != compute_digest(content):
        raise ValueError("it was altered")
    return content


def utc_now() -> str:
    """UTC to the microsecond, as ISO 8601: data for people, never compared by a protocol."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def seconds_since(timestamp: str, clock_s: float | None = None) -> float:
    """Age in seconds of a time that `now` wrote, against `clock` (seconds since 1970; default: this machine's)."""
    return (time.time() if clock_s is None else clock_s) - datetime.fromisoformat(timestamp).timestamp()


def check_timestamp(text: str) -> str:
    """`text`, if it is a time as `now` writes them; else ValueError."""
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
    raise TypeError(f"{value!r} of type {type(value).__name__} has no place in JSON")
