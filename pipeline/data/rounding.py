"""What numbers lose on their way into float32 or float64, and whether that matters.

Inputs are held in float32 where that is enough, for it is half the size. A column of seconds since 1970 has most of
its digits in common, and float32 keeps 7: such data is held in float64, shifted and scaled there, and rounded last.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

NumberKind = Literal["floats", "integers", "decimals"]
"""What numbers were before they became float64: floats of no more digits, or such as may have more."""

TOLERANCE = 1e-6
"""An error of up to this share of the training rows' standard deviation is none."""

MAX_EXACT_INTEGER = 2.0**53
"""float64 holds every whole number up to here."""


def max_rounding_error(wide: np.ndarray, stored: np.ndarray, kind: NumberKind) -> np.ndarray:
    """The largest error of the numbers in each column, or a bound on it: float64 (C,), NaN aside.

    Parameters
    ----------
    wide: the numbers as float64 (n, C). stored: the same in the type in which they are held, (n, C).
    """
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        errors = np.abs(wide - stored)
        if kind != "floats":
            size = np.abs(wide)
            errors += np.where(size > (MAX_EXACT_INTEGER if kind == "integers" else 0.0), np.spacing(size) / 2, 0.0)
    largest: np.ndarray = np.fmax.reduce(errors, axis=0, initial=0.0)
    return largest


def is_too_coarse(rounding: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Whether errors (C,) matter, bool (C,).

    Parameters
    ----------
    std: of the training rows, float64 (C,), or (1,) for all columns.
    """
    coarse: np.ndarray = rounding > TOLERANCE * std
    return coarse
