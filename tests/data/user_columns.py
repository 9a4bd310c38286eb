"""User functions that return columns with values far from zero."""

from __future__ import annotations

import numpy as np

SECONDS = 1.7e9 + np.random.default_rng(3).uniform(0, 1000, 300)
LABELS = (np.median(SECONDS) < SECONDS).astype(int)


def returns(values: list[float], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of type `kind`, and labels."""
    return np.array(values).astype(kind)[:, None], np.arange(len(values)) % 2


def seconds() -> tuple[np.ndarray, np.ndarray]:
    return SECONDS[:, None], LABELS


def far_goals() -> tuple[np.ndarray, np.ndarray]:
    return np.linspace(0, 1, 60), SECONDS[:60]
