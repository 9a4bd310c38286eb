"""Augmentation of batches, compared with augmentation of one image at a time, and with torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from pipeline.config import AugmentConfig, ColorJitterConfig
from pipeline.data.augment import (
    AugmentParams,
    MixupParams,
    apply_augment,
    check_images,
    is_enabled,
    required_positions,
    sample_mixup_lambda,
    sample_mixup_permutation,
    sample_params,
)
from pipeline.data.sampler import rank_slice
from pipeline.errors import DataError

ALL_AUGMENTATIONS = AugmentConfig(
    crop=2, flip=True, rotate=30, jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4)
)


def sample_crops(config: AugmentConfig, seed: int, step: int, rows: int) -> np.ndarray:
    crops = sample_params(config, seed, step, rows).crops
    assert crops is not None
    return crops.numpy()


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def augment_one_by_one(config: AugmentConfig, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
    height, width = images.shape[-2:]
    results = []
    for image, (top, left, is_flipped) in zip(images, crops, strict=True):
        padding = [(0, 0)] * (image.ndim - 2) + [(config.crop, config.crop)] * 2
        window = np.pad(image, padding)[..., top : top + height, left : left + width]
        results.append(window[..., ::-1] if is_flipped else window)
    return np.stack(results) if results else images


@given(
    rows=st.integers(0, 6),
    channels=st.sampled_from([(), (1,), (3,)]),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    crop=st.integers(0, 4),
    dtype=st.sampled_from(["uint8", "float32", "float64"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_crops_match_one_image_at_a_time(
    rows: int, channels: tuple[int, ...], height: int, width: int, crop: int, dtype: str, seed: int
) -> None:
    config = AugmentConfig(crop=crop, flip=True)
    images = np.random.default_rng(seed).integers(1, 256, (rows, *channels, height, width)).astype(dtype)
    augmented = apply_augment(config, torch.from_numpy(images), sample_params(config, seed, 1, rows))
    assert augmented.dtype == torch.from_numpy(images).dtype
    assert np.array_equal(augmented.numpy(), augment_one_by_one(config, images, sample_crops(config, seed, 1, rows)))


def test_sampled_crops_are_stable() -> None:
    # Changing these breaks the resume of every stored run.
    assert sample_crops(AugmentConfig(crop=4, flip=True), 1, 1, 4).tolist() == [
        [4, 1, 1],
        [4, 1, 0],
        [6, 3, 0],
        [0, 8, 0],
    ]


@given(
    rows=st.integers(1, 20),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 9),
    channels=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    size=st.sampled_from([(5, 5), (9, 4), (1, 1), (40, 33)]),
    alpha=st.sampled_from([0.0, 0.2, 2.0]),
)
@settings(deadline=None, max_examples=100)
def test_augmented_shares_form_the_augmented_batch(
    rows: int,
    world_size: int,
    seed: int,
    channels: tuple[int, ...],
    dtype: torch.dtype,
    size: tuple[int, int],
    alpha: float,
) -> None:
    config = ALL_AUGMENTATIONS.model_copy(update={"mixup": alpha})
    images, labels = random_images(rows, *channels, *size, seed=seed).to(dtype), torch.arange(rows) % 4
    partners = sample_mixup_permutation(seed, 3, rows)
    lam = sample_mixup_lambda(alpha, seed, 3, rows) if alpha else np.ones(rows)

    def augment(local_slice: slice) -> tuple[torch.Tensor, torch.Tensor]:
        positions = required_positions(seed, 3, rows, local_slice)
        mixup = MixupParams.from_batch(positions, local_slice, partners, lam)
        augmented = apply_augment(config, images[positions], sample_params(config, seed, 3, rows).select(positions))
        return mixup.mix_images(augmented), mixup.mix_targets(labels[positions], 4)

    shares = [augment(rank_slice(rows, rank, world_size)) for rank in range(world_size)]
    for joined, whole in zip(map(torch.cat, zip(*shares, strict=True)), augment(slice(0, rows)), strict=True):
        assert torch.equal(joined, whole)


@pytest.mark.parametrize("size", [(200, 200), (300, 7)])
def test_large_image_alone_matches_batch(size: tuple[int, int]) -> None:
    # Torch sums a single large image in other blocks than several images, which would change float results.
    images, params = random_images(5, 3, *size), sample_params(ALL_AUGMENTATIONS, 1, 1, 5)
    together = apply_augment(ALL_AUGMENTATIONS, images, params)
    for row in range(5):
        assert torch.equal(
            apply_augment(ALL_AUGMENTATIONS, images[row : row + 1], params.select(np.array([row]))),
            together[row : row + 1],
        )


def test_crops_and_flips_are_uniform_and_independent() -> None:
    crops = sample_crops(AugmentConfig(crop=4, flip=True), 1, 1, 9000)
    for axis in (0, 1):
        counts = np.bincount(crops[:, axis], minlength=9)
        assert len(counts) == 9
        assert (np.abs(counts - 1000) < 150).all()  # five standard deviations
    assert 4250 < crops[:, 2].sum() < 4750
    assert abs(np.corrcoef(crops.T)[np.triu_indices(3, 1)]).max() < 0.05


def test_params_depend_on_seed_and_step() -> None:
    def sample(seed: int, step: int) -> list[np.ndarray]:
        params = sample_params(ALL_AUGMENTATIONS, seed, step, 50)
        tensors = [params.crops, params.rotations, params.color_factors]
        arrays = [values.numpy() for values in tensors if values is not None]
        return [*arrays, sample_mixup_permutation(seed, step, 50), sample_mixup_lambda(0.4, seed, step, 50)]

    for first, again, *others in zip(sample(1, 1), sample(1, 1), sample(1, 2), sample(2, 1), strict=True):
        assert np.array_equal(first, again)
        assert not any(np.array_equal(first, other) for other in others)


def test_rotations_and_color_factors_are_uniform() -> None:
    config = AugmentConfig(rotate=30, jitter=ColorJitterConfig(brightness=0.2, contrast=0.4))
    params = sample_params(config, 1, 1, 20_000)
    assert params.rotations is not None
    assert params.color_factors is not None
    cosine, sine = params.rotations.double().numpy().T
    angles = np.rad2deg(np.arctan2(sine, cosine))
    brightness, contrast, saturation = params.color_factors.numpy().T
    for values, low, high in ((angles, -30, 30), (brightness, 0.8, 1.2), (contrast, 0.6, 1.4)):
        counts = np.histogram(values, bins=10, range=(low, high))[0]
        assert counts.sum() == 20_000
        assert (np.abs(counts - 2000) < 220).all()  # five standard deviations
    assert (saturation == 1).all()
    assert abs(np.corrcoef([angles, brightness, contrast])[np.triu_indices(3, 1)]).max() < 0.04


@pytest.mark.parametrize("config", [AugmentConfig(crop=3), AugmentConfig(flip=True)])
def test_only_enabled_augmentations_are_sampled(config: AugmentConfig) -> None:
    crops = sample_crops(config, 1, 1, 100)
    assert (crops[:, 2].max() == 1) == config.flip
    assert crops[:, :2].max() == 2 * config.crop


@pytest.mark.parametrize(
    ("changes", "enabled"),
    [({}, False), ({"crop": 1}, True), ({"flip": True}, True), ({"rotate": 1}, True), ({"mixup": 0.1}, True)]
    + [({"jitter": {name: 0.1}}, True) for name in ("brightness", "contrast", "saturation")],
)
def test_any_augmentation_counts_as_enabled(changes: dict[str, Any], enabled: bool) -> None:
    assert is_enabled(AugmentConfig(**changes)) == enabled


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    angle = np.deg2rad(degrees)
    rotations = torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float32).expand(len(images), 2)
    return apply_augment(AugmentConfig(rotate=180), images, AugmentParams(rotations=rotations))


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (5, 12)])
def test_quarter_rotations_are_exact(size: tuple[int, int]) -> None:
    images = random_images(2, 3, *size)
    assert torch.allclose(rotate(images, 0), images.float(), atol=1e-3)
    assert torch.allclose(rotate(images, 180), images.flip(2, 3).float(), atol=0.05)
    square = random_images(2, 7, 7)
    assert torch.allclose(rotate(square, 90), square.rot90(1, (1, 2)).float(), atol=0.05)


@pytest.mark.parametrize("degrees", [7.0, -33.0, 120.0])
def test_rotations_match_torchvision(degrees: float) -> None:
    images = random_images(3, 3, 16, 11)
    actual = rotate(images, degrees)
    expected = reference.rotate(images.float(), degrees, v2.InterpolationMode.BILINEAR)
    assert actual.dtype == torch.float32
    assert torch.allclose(actual, expected, atol=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_matches_torchvision(channels: int) -> None:
    images, config = (
        random_images(6, channels, 9, 7),
        AugmentConfig(jitter=ColorJitterConfig(brightness=0.8, contrast=0.8, saturation=0.8)),
    )
    params = sample_params(config, 1, 1, 6)
    assert params.color_factors is not None
    expected = []
    for image, (brightness, contrast, saturation) in zip(
        images.float() / 255, params.color_factors.tolist(), strict=True
    ):
        adjusted = reference.adjust_contrast(reference.adjust_brightness(image, brightness), contrast)
        expected.append(reference.adjust_saturation(adjusted, saturation))
    actual = apply_augment(config, images, params)
    assert torch.allclose(actual, torch.stack(expected) * 255, atol=1e-2)
    assert actual.min() == 0
    assert actual.max() == 255


def test_color_jitter_of_floats_is_unbounded() -> None:
    images = random_images(4, 3, 5, 5).float() * 100
    config = AugmentConfig(jitter=ColorJitterConfig(brightness=1))
    params = sample_params(config, 1, 1, 4)
    assert params.color_factors is not None
    assert torch.allclose(
        apply_augment(config, images, params), images * params.color_factors[:, :1, None, None], rtol=1e-5
    )


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.5, 1.0, 4.0, 100.0])
def test_mixup_lambda_is_beta_distributed(alpha: float) -> None:
    count = 100_000
    lam = sample_mixup_lambda(alpha, 1, 1, count)
    assert np.isfinite(lam).all()
    assert ((lam >= 0) & (lam <= 1)).all()
    central = lam - 0.5
    # Central moments of Beta(a, a): odd ones are 0; E x^2 = 1 / (4 (2a + 1)); E x^4 = 3 / (16 (2a + 1)(2a + 3)).
    second, fourth = 1 / (4 * (2 * alpha + 1)), 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    sixth = 15 / (64 * (2 * alpha + 1) * (2 * alpha + 3) * (2 * alpha + 5))
    for power, expected in ((1, 0.0), (2, second), (3, 0.0), (4, fourth), (6, sixth)):
        values = central**power
        assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(count)


def test_mixup_lambda_with_alpha_one_is_uniform() -> None:
    counts = np.histogram(sample_mixup_lambda(1.0, 1, 1, 50_000), bins=20, range=(0, 1))[0]
    assert (np.abs(counts - 2500) < 250).all()  # five standard deviations


def test_mixup_partners_are_a_permutation() -> None:
    partners = sample_mixup_permutation(1, 1, 100)
    assert sorted(partners) == list(range(100))


def test_mixup_of_images_and_targets() -> None:
    positions, local_slice = np.array([2, 3, 0, 5]), slice(2, 4)
    partners, lam = np.array([0, 0, 5, 0, 0, 0]), np.array([0, 0, 0.75, 0.5, 0, 0])
    mixup = MixupParams.from_batch(positions, local_slice, partners, lam)
    images = torch.tensor([[[0]], [[100]], [[50]], [[200]]], dtype=torch.uint8)
    assert mixup.mix_images(images).flatten().tolist() == [50.0, 75.0]
    assert mixup.mix_targets(torch.tensor([0, 1, 2, 1]), 3).tolist() == [[0.75, 0.25, 0], [0, 0.5, 0.5]]
    numbers = torch.tensor([[1.0, 2], [3, 4], [5, 6], [9, 10]], dtype=torch.float64)
    assert torch.equal(mixup.mix_targets(numbers, 0), torch.tensor([[3.0, 4], [4, 5]], dtype=torch.float64))


def test_invalid_augmentations_are_rejected() -> None:
    check_images(ALL_AUGMENTATIONS, (3, 4, 4))
    check_images(ALL_AUGMENTATIONS, (4, 4))
    check_images(AugmentConfig(crop=1), (7, 4, 4))
    with pytest.raises(DataError, match=r"data\.augment"):
        check_images(AugmentConfig(mixup=1), (5,))
    with pytest.raises(DataError, match=r"data\.augment\.jitter"):
        check_images(ALL_AUGMENTATIONS, (4, 4, 4))
