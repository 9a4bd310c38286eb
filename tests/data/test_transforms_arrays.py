"""Transforms of arrays and images: statistics of the training rows only, compared with NumPy and torchvision."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data import statistics
from pipeline.data.sources import Dataset, DatasetPart
from pipeline.data.transforms import ArrayTransform, fit_input_transform, input_transform_from_json
from pipeline.errors import DataError

CPU = torch.device("cpu")


def make_job(normalize: Any) -> JobConfig:
    return build_job({"name": "t", "data": {"normalize": normalize}}, "test")


def make_dataset(inputs: np.ndarray) -> Dataset:
    return Dataset(DatasetPart(inputs, np.zeros(len(inputs), np.int64)), None, (), "fingerprint")


def random_inputs(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return (rng.normal(3, 7, shape) * np.arange(1, shape[1] + 1).reshape(-1, *[1] * (len(shape) - 2))).astype(dtype)


def numpy_reference(kind: str, inputs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Compute the same with NumPy in float64, without blocks: (N, *output_shape)."""
    values = inputs.astype(np.float64) / (255 if inputs.dtype == np.uint8 and kind != "none" else 1)
    values = values[:, None] if values.ndim == 3 else values
    if kind in ("none", "unit"):
        return values
    axes = tuple(range(values.ndim)) if kind == "scalar" else (0, *range(2, values.ndim))
    mean, std = (function(values[indices], axis=axes, keepdims=True) for function in (np.mean, np.std))
    scaled: np.ndarray = (values - mean) / np.where(std == 0, 1, std)
    return scaled


@pytest.mark.parametrize("shape", [(40, 5), (40, 6, 4), (40, 3, 6, 4), (40, 2, 3, 2, 2)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("unit", "uint8"), *itertools.product(["none", "scalar", "standard"], ["uint8", "float32", "float64"])],
)
def test_transform_matches_numpy(
    kind: str, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 100)  # several blocks, the last one smaller
    inputs, indices = random_inputs(shape, dtype), np.arange(0, 33)
    transform = fit_input_transform(make_job(kind), make_dataset(inputs), indices)
    expected = numpy_reference(kind, inputs, indices)
    raw = torch.from_numpy(inputs.copy())
    for expected_dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        transformed = transform.make_transform_fn(CPU, expected_dtype)(raw)
        assert transformed.dtype == expected_dtype
        assert tuple(transformed.shape[1:]) == transform.output_shape == expected.shape[1:]
        assert isinstance(transform, ArrayTransform)
        assert transform.channels == expected.shape[1]
        assert (transform.code_sizes, transform.schema) == ((), None)
        np.testing.assert_allclose(transformed.numpy(), expected, rtol=tolerance, atol=tolerance)
        transformed.add_(1)
        assert np.array_equal(raw.numpy(), inputs)  # never shares memory with the data


@given(
    kind=st.sampled_from(["scalar", "standard"]),
    dtype=st.sampled_from(["uint8", "float32"]),
    rows=st.lists(st.integers(0, 29), min_size=1, unique=True),
)
@settings(deadline=None, max_examples=30)
def test_statistics_use_training_rows_only(kind: str, dtype: str, rows: list[int]) -> None:
    inputs, indices = random_inputs((30, 3), dtype), np.array(sorted(rows))
    changed = inputs.copy()
    changed[np.setdiff1d(np.arange(30), indices)] = 99
    fitted = [fit_input_transform(make_job(kind), make_dataset(values), indices) for values in (inputs, changed)]
    assert fitted[0] == fitted[1]
    np.testing.assert_allclose(
        fitted[0].make_transform_fn(CPU, torch.float64)(torch.from_numpy(inputs)),
        numpy_reference(kind, inputs, indices),
        atol=1e-9,
    )


def test_unit_scaling_matches_torchvision() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    transformed = fit_input_transform(make_job("unit"), make_dataset(images), np.array([0])).make_transform_fn(
        CPU, torch.float32
    )(torch.from_numpy(images))
    assert torch.equal(transformed, torch.from_numpy(images)[:, None].to(torch.float32).div(255))


@pytest.mark.parametrize("constant", [0.1, 1e9, -3.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_constant_column_becomes_zero(constant: float, dtype: str) -> None:
    inputs = np.full((1000, 2), constant, dtype=dtype)
    inputs[:, 1] = np.arange(1000)
    transform = fit_input_transform(make_job("standard"), make_dataset(inputs), np.arange(1000))
    assert isinstance(transform, ArrayTransform)
    assert transform.std[0] == 1
    assert transform.make_transform_fn(CPU, torch.float32)(torch.from_numpy(inputs))[:, 0].abs().max() < 1e-6 * abs(
        constant
    )


def test_large_offsets_keep_precision() -> None:
    inputs = (1.7e9 + 128 * np.arange(-512, 513)[:, None]).astype(np.float32)  # seconds since 1970
    transform = fit_input_transform(make_job("standard"), make_dataset(inputs), np.arange(1025))
    expected = numpy_reference("standard", inputs, np.arange(1025))
    np.testing.assert_allclose(
        transform.make_transform_fn(CPU, torch.float32)(torch.from_numpy(inputs)), expected, atol=1e-5
    )


def test_explicit_mean_and_std_are_used() -> None:
    images = random_inputs((5, 3, 4, 4), "uint8")
    transform = fit_input_transform(
        make_job({"mean": [0.1, 0.2, 0.3], "std": [1, 2, 4]}), make_dataset(images), np.arange(5)
    )
    expected = (images / 255 - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)) / np.array([1, 2, 4]).reshape(3, 1, 1)
    np.testing.assert_allclose(transform.make_transform_fn(CPU, torch.float64)(torch.from_numpy(images)), expected)
    columns = random_inputs((5, 3), "float32")
    one_for_all = fit_input_transform(make_job({"mean": 1, "std": 2}), make_dataset(columns), np.arange(5))
    np.testing.assert_allclose(
        one_for_all.make_transform_fn(CPU, torch.float64)(torch.from_numpy(columns)), (columns.astype(float) - 1) / 2
    )


def test_imagenet_normalization_matches_torchvision() -> None:
    from torchvision.models import ResNet18_Weights

    images = random_inputs((5, 3, 8, 8), "uint8")
    transform = fit_input_transform(make_job("imagenet"), make_dataset(images), np.arange(5)).make_transform_fn(
        CPU, torch.float32
    )
    expected = ResNet18_Weights.DEFAULT.transforms(crop_size=8, resize_size=8)(torch.from_numpy(images))
    np.testing.assert_allclose(transform(torch.from_numpy(images)), expected, atol=1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [("uint8", "unit"), ("float32", "standard")])
def test_auto_normalization_depends_on_the_type(dtype: str, expected: str) -> None:
    images = make_dataset(random_inputs((5, 3, 4, 4), dtype))
    auto, explicit = (fit_input_transform(make_job(kind), images, np.arange(5)) for kind in ("auto", expected))
    assert auto == explicit


class IndexOnlyArray:
    """An array that can only be read by indexing with an array of rows."""

    def __init__(self, values: np.ndarray) -> None:
        self.shape, self.dtype, self.ndim, self._values = values.shape, values.dtype, values.ndim, values

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        assert isinstance(rows, np.ndarray)
        decoded: np.ndarray = self._values[rows]
        return decoded


@pytest.mark.parametrize("kind", ["auto", "standard", "scalar"])
def test_lazy_inputs_have_the_same_statistics(kind: str) -> None:
    images = random_inputs((5, 3, 4, 4), "uint8")
    lazy: Any = IndexOnlyArray(images)
    on_demand = Dataset(DatasetPart(lazy, np.zeros(5, np.int64)), None, (), "fingerprint")
    assert fit_input_transform(make_job(kind), on_demand, np.arange(3)) == fit_input_transform(
        make_job(kind), make_dataset(images), np.arange(3)
    )


@pytest.mark.parametrize(
    ("normalize", "dtype", "where", "word"),
    [
        ("unit", "float32", "data.normalize", "float32"),
        ("imagenet", "float32", "data.normalize", "(3,)"),
        ({"mean": [1, 2], "std": 1}, "float32", "data.normalize.mean", "2 numbers for 3"),
        ({"mean": 1, "std": [1, 2]}, "float32", "data.normalize.std", "2 numbers for 3"),
        ({"mean": 1, "std": 0}, "float32", "data.normalize.std", "0.0"),
    ],
)
def test_incompatible_inputs_are_rejected(normalize: Any, dtype: str, where: str, word: str) -> None:
    with pytest.raises(DataError) as error:
        fit_input_transform(make_job(normalize), make_dataset(random_inputs((5, 3), dtype)), np.arange(5))
    assert error.value.where == where
    assert word in error.value.what
    assert error.value.fix


@pytest.mark.parametrize("kind", ["none", "unit", "scalar", "standard"])
def test_serialization_round_trip(kind: str) -> None:
    fitted = fit_input_transform(make_job(kind), make_dataset(random_inputs((20, 3, 4, 4), "uint8")), np.arange(20))
    assert input_transform_from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


@pytest.mark.parametrize("damage", [{"version": 99}, {"kind": "x"}, {"mean": None}, {"sample_shape": ["a"]}])
def test_damaged_statistics_are_rejected(damage: dict[str, Any]) -> None:
    stored = fit_input_transform(
        make_job("standard"), make_dataset(random_inputs((20, 3), "uint8")), np.arange(20)
    ).to_json()
    with pytest.raises(DataError, match=r"preprocess\.json"):
        input_transform_from_json({**stored, **damage})
