"""The generated disc dataset."""

from __future__ import annotations

import math

import numpy as np

from pipeline.config.files import build_job
from pipeline.data.sources import open_dataset


def test_disc_points_and_labels() -> None:
    dataset = open_dataset(build_job({"name": "t", "data": {"source": "disc"}}, "test"))
    assert dataset.test is not None
    assert dataset.classes == ("outside", "inside")
    for arrays in (dataset.train, dataset.test):
        assert (arrays.inputs.shape, arrays.inputs.dtype) == ((1000, 2), np.dtype("f4"))
        assert (arrays.inputs >= 0).all()
        assert (arrays.inputs < 1).all()
        inside = (arrays.inputs.astype(np.float64) ** 2).sum(1) < 1 / (2 * math.pi)
        assert np.array_equal(arrays.targets, inside)
        assert 85 < inside.sum() < 165  # an eighth, within about four standard deviations
        assert abs(arrays.inputs.mean() - 0.5) < 0.03
    assert not np.array_equal(dataset.train.inputs, dataset.test.inputs)


def test_disc_depends_only_on_the_data_seed() -> None:
    def fingerprint(seed: object) -> str:
        return open_dataset(build_job({"name": "t", "seed": seed, "data": {"source": "disc"}}, "test")).fingerprint

    assert fingerprint(1) == fingerprint({"all": 1, "init": 5}) != fingerprint({"all": 1, "data": 2})
