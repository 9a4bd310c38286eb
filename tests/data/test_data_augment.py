"""Crops and flips, against the same done one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.augment import augmented, draw
from pipeline.data.sampler import share
from pipeline.job import Augment


def one_at_a_time(spec: Augment, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    height, width = images.shape[-2:]
    results = []
    for image, (top, left, mirrored) in zip(images, draws, strict=True):
        edges = [(0, 0)] * (image.ndim - 2) + [(spec.crop, spec.crop)] * 2
        window = np.pad(image, edges)[..., top : top + height, left : left + width]
        results.append(window[..., ::-1] if mirrored else window)
    return np.stack(results) if results else images


@given(
    rows=st.integers(0, 6),
    channels=st.sampled_from([(), (1,), (3,)]),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    crop=st.integers(0, 4),
    flip=st.booleans(),
    dtype=st.sampled_from(["uint8", "float32", "float64"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_equals_one_image_at_a_time(
    rows: int, channels: tuple[int, ...], height: int, width: int, crop: int, flip: bool, dtype: str, seed: int
) -> None:
    spec = Augment(crop=crop, flip=flip)
    images = np.random.default_rng(seed).integers(1, 256, (rows, *channels, height, width)).astype(dtype)
    draws = draw(spec, seed, 1, rows)
    changed = augmented(spec, torch.from_numpy(images), torch.from_numpy(draws))
    assert changed.dtype == torch.from_numpy(images).dtype
    assert np.array_equal(changed.numpy(), one_at_a_time(spec, images, draws))


@given(rows=st.integers(1, 20), world_size=st.integers(1, 5), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_shares_of_the_change_are_changes_of_the_shares(rows: int, world_size: int, seed: int) -> None:
    spec = Augment(crop=2, flip=True)
    images = torch.arange(rows * 25).view(rows, 5, 5)
    draws = torch.from_numpy(draw(spec, seed, 3, rows))
    parts = [share(rows, rank, world_size) for rank in range(world_size)]
    together = torch.cat([augmented(spec, images[part], draws[part]) for part in parts])
    assert torch.equal(together, augmented(spec, images, draws))


def test_draws() -> None:
    spec = Augment(crop=4, flip=True)
    draws = draw(spec, 1, 1, 9000)
    for axis in (0, 1):
        counts = np.bincount(draws[:, axis], minlength=9)
        assert len(counts) == 9
        assert (np.abs(counts - 1000) < 150).all()  # five deviations
    assert 4250 < draws[:, 2].sum() < 4750
    assert abs(np.corrcoef(draws.T)[np.triu_indices(3, 1)]).max() < 0.05
    assert np.array_equal(draws, draw(spec, 1, 1, 9000))
    assert not np.array_equal(draws, draw(spec, 1, 2, 9000))
    assert not np.array_equal(draws, draw(spec, 2, 1, 9000))


@pytest.mark.parametrize("spec", [Augment(crop=3), Augment(flip=True)])
def test_only_what_is_asked_for(spec: Augment) -> None:
    draws = draw(spec, 1, 1, 100)
    assert (draws[:, 2].max() == 1) == spec.flip
    assert draws[:, :2].max() == 2 * spec.crop
