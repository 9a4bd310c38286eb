"""Rounding errors of the conversion to float32 or float64, and whether they matter.

Inputs are stored as float32 if that is precise enough, since it is half the size. The values of a column of seconds
since 1970 have most of their digits in common, and float32 keeps 7: such data is stored as float64, shifted and scaled
in it, and rounded last.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

NumberKind = Literal["floats", "integers", "decimals"]
"""Type of the numbers before conversion to float64: floats have no more digits, integers and decimals may have more."""

TOLERANCE = 1e-6
"""An error of up to this fraction of the training rows' standard deviation does not matter."""

MAX_EXACT_INTEGER = 2.0**53
"""float64 represents every integer up to this one."""


def max_rounding_error(wide: np.ndarray, stored: np.ndarray, kind: NumberKind) -> np.ndarray:
    """Return the largest error of the numbers in each column, or a bound on it: float64 (C,). NaN is ignored.

    Parameters
    ----------
    wide: the numbers as float64 (n, C). stored: the same numbers in the type in which they are stored, (n, C).
    kind: of the numbers before they were converted to `wide`.
    """
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        errors = np.abs(wide - stored)
        if kind != "floats":
            size = np.abs(wide)
            errors += np.where(size > (MAX_EXACT_INTEGER if kind == "integers" else 0.0), np.spacing(size) / 2, 0.0)
    largest: np.ndarray = np.fmax.reduce(errors, axis=0, initial=0.0)
    return largest


def is_too_coarse(rounding: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return whether errors (C,) matter, bool (C,).

    Parameters
    ----------
    rounding: the largest error in each column, as from `max_rounding_error`.
    std: of the training rows, float64 (C,), or (1,) for all columns.
    """
    coarse: np.ndarray = rounding > TOLERANCE * std
    return coarse
