"""Plain values on their way into strict JSON and back, and UTC times."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON, keys in the given order; a float that is not finite becomes the string "nan", "inf" or "-inf"."""
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def from_json(text: str | bytes) -> Any:
    """What `to_json` wrote; json.JSONDecodeError (or UnicodeDecodeError) for anything else."""
    return json.loads(text)


def now() -> str:
    """UTC to the microsecond, as ISO 8601: data for people, never compared by a protocol."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def seconds_since(moment: str, clock: float | None = None) -> float:
    """Age in seconds of a time that `now` wrote, against `clock` (seconds since 1970; default: this machine's)."""
    return (time.time() if clock is None else clock) - datetime.fromisoformat(moment).timestamp()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item"):  # a scalar of NumPy or torch
        return _plain(value.item())
    raise TypeError(f"{value!r} of type {type(value).__name__} has no place in JSON")
