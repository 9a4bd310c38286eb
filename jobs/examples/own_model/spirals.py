"""A data source: a function that returns inputs and targets."""

import numpy as np


def load(rows: int, turns: float = 1.5) -> dict:
    """Return two spirals in the plane: inputs (N, 2) float32, targets (N,) 0 or 1."""
    rng = np.random.default_rng(0)
    label = np.arange(rows) % 2
    radius = np.sqrt(rng.uniform(0.02, 1, rows))
    angle = 2 * np.pi * turns * radius + np.pi * label
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) + rng.normal(0, 0.03, (rows, 2))
    return {"train": (points.astype(np.float32), label), "classes": ["first", "second"]}
