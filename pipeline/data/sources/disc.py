"""Generated points of the unit square, labeled by whether they are inside a disc around its corner (0, 0)."""

from __future__ import annotations

import math

import numpy as np

from pipeline.config import JobConfig
from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.rng import make_generator, random_uint64

NUM_POINTS = 1000
"""Number of points in each of the training part and the test part."""

RADIUS_SQUARED = 1 / (2 * math.pi)
"""Squared radius of the disc, which covers an eighth of the unit square."""

COORDINATE_STEP = 2.0**-24
"""Resolution of the coordinates: each is a multiple of it, which float32 represents exactly."""


def open_disc(job: JobConfig, on_progress: object, *, float64: bool) -> Dataset:
    """Generate 1,000 points uniform in [0, 1) x [0, 1) (float32), of class 1 inside the disc; and as many for test.

    The seed is `seed.data`. `float64` makes no difference.
    """
    seed = job.seed.for_stream("data")
    return make_dataset(_sample_points(seed, 0), _sample_points(seed, 1), ("outside", "inside"))


def _sample_points(seed: int, part: int) -> DatasetPart:
    raw = random_uint64(make_generator(seed, "data", part), 2 * NUM_POINTS) >> np.uint64(40)
    points = (raw.astype(np.float64) * COORDINATE_STEP).reshape(NUM_POINTS, 2)
    inside = (points**2).sum(1) < RADIUS_SQUARED
    return DatasetPart(points.astype(np.float32), inside.astype(np.int64))
