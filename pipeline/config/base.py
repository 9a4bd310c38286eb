"""What the branches of the job tree have in common: strictness, and the values that stand in several of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
IndexRange = Annotated[tuple[int, int], Strict(False)]
"""[first, end]; YAML has lists where Python has tuples."""


class ConfigNode(BaseModel):
    """A branch of the tree: unknown keys are errors, `"5"` is no number, values never change once built."""

    model_config = ConfigDict(
        ser_json_inf_nan="constants",  # in arguments of the user's own; never null
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
    )


RESERVED_NAMES = ("models", "ticks")
"""Folders that lie beside the runs."""


def validate_name(value: str) -> str:
    """`value`, if it is safe as the name of a folder.

    Raises
    ------
    ValueError: it could leave its parent folder, is hidden or reserved, or has characters that some store refuses.
    """
    if value in RESERVED_NAMES:
        raise ValueError(f"{value!r} is taken: the registry lies there")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value) or ".." in value:
        raise ValueError(
            f"{value!r} is no name: use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return value


def validate_import_path(value: str) -> str:
    """`value`, if it is of the form `module:name`; else ValueError."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise ValueError(f"{value!r} is not of the form module:name")
    return value


def closest_match(word: str, known: Iterable[str]) -> str:
    """The known word that is most like this one, or nothing where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def format_suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'accuracy'?)`, or nothing."""
    near = closest_match(word, known)
    return f" (did you mean {near!r}?)" if near else ""
