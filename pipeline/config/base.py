"""The base class of the configuration, and the types and checks that several of its classes share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
IndexRange = Annotated[tuple[int, int], Strict(False)]
"""[first, end], the end excluded. YAML has lists where Python has tuples."""


class ConfigNode(BaseModel):
    """A node of the tree. Unknown keys are errors, types are strict (`"5"` is not a number), instances are
    immutable."""

    model_config = ConfigDict(
        ser_json_inf_nan="constants",  # in `args`, which may hold any number; never null
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )


RESERVED_NAMES = ("models", "ticks")
"""Names of folders beside the runs; no run may have them."""


def validate_name(value: str) -> str:
    """Return `value` if it is safe as the name of a folder.

    Raises
    ------
    ValueError: it leads out of its parent folder, is hidden or reserved, or has characters that some store refuses.
    """
    if value in RESERVED_NAMES:
        raise ValueError(f"{value!r} is reserved for the model registry")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value) or ".." in value:
        raise ValueError(
            f"{value!r} is not a valid name: use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return value


def validate_import_path(value: str) -> str:
    """Return `value` if it is of the form `module:name`; else raise ValueError."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise ValueError(f"{value!r} is not of the form module:name")
    return value


def closest_match(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most similar, or an empty string if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def format_suggestion(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'accuracy'?)`, or an empty string."""
    match = closest_match(word, known)
    return f" (did you mean {match!r}?)" if match else ""
