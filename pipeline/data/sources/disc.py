"""Points in the unit square, labelled by whether they lie in a disc around its corner: made, not read."""

from __future__ import annotations

import math

import numpy as np

from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.rng import make_generator, random_uint64

NUM_POINTS = 1000
"""Points in the training part and in the test set, each."""

RADIUS_SQUARED = 1 / (2 * math.pi)
"""Of the disc around (0, 0); an eighth of the unit square lies within it."""

COORDINATE_STEP = 2.0**-24
"""Step of the coordinates: each is a multiple of it that float32 holds exactly."""


def open_disc(seed: int) -> Dataset:
    """1,000 points uniform in [0, 1) x [0, 1) (float32), class 1 inside the disc; 1,000 others as its test set."""
    return make_dataset(_sample_points(seed, 0), _sample_points(seed, 1), ("outside", "inside"))


def _sample_points(seed: int, part: int) -> DatasetPart:
    raw = random_uint64(make_generator(seed, "data", part), 2 * NUM_POINTS) >> np.uint64(40)
    points = (raw.astype(np.float64) * COORDINATE_STEP).reshape(NUM_POINTS, 2)
    inside = (points**2).sum(1) < RADIUS_SQUARED
    return DatasetPart(points.astype(np.float32), inside.astype(np.int64))
