"""Points in the unit square, labelled by whether they lie in a disc around its corner: made, not read."""

from __future__ import annotations

import math

import numpy as np

from pipeline.data.random import generator, words
from pipeline.data.sources.arrays import Arrays, Source, make_source

ROWS = 1000
"""Points in the training part and in the test set, each."""

RADIUS_SQUARED = 1 / (2 * math.pi)
"""Of the disc around (0, 0); an eighth of the unit square lies within it."""

UNIT = 2.0**-24
"""Step of the coordinates: each is a multiple of it that float32 holds exactly."""


def open_disc(seed: int) -> Source:
    """1,000 points uniform in [0, 1) x [0, 1) (float32), class 1 inside the disc; 1,000 others as its test set."""
    return make_source(_points(seed, 0), _points(seed, 1), ("outside", "inside"))


def _points(seed: int, part: int) -> Arrays:
    raw = words(generator(seed, "data", part), 2 * ROWS) >> np.uint64(40)
    points = (raw.astype(np.float64) * UNIT).reshape(ROWS, 2)
    inside = (points**2).sum(1) < RADIUS_SQUARED
    return Arrays(points.astype(np.float32), inside.astype(np.int64))
