"""Loaders: a rank's samples as batches on the device.

`TrainLoader` yields the rank's share of each global batch in training order, `EvalLoader` its share of a split in the
order of the split. Samples are gathered in this process or by loader processes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.config import AugmentConfig, DataLoaderConfig
from pipeline.data.augment import (
    MixupParams,
    apply_augment,
    check_images,
    copy_to_device_async,
    is_enabled,
    required_positions,
    sample_mixup_lambda,
    sample_mixup_permutation,
    sample_params,
)
from pipeline.data.dataset import DatasetPart
from pipeline.data.device_transfer import DatasetTensors, TensorPair, index_rows, prefetch_to_device, to_tensors
from pipeline.data.loader_workers import map_in_processes
from pipeline.data.sampler import GlobalBatchSampler, rank_slice

FETCH_BYTES = 1 << 20
"""What a loader process returns at once, in whole steps: each transfer costs it and the worker about 2 ms."""

PinMemory = Literal["auto"] | bool


@dataclass(slots=True)
class Batch:
    """One rank's share of a global batch, on the device.

    inputs: raw samples (b, ...), augmented if the job asks for it. targets: (b,) or (b, T); if labels are mixed,
    probabilities of the classes (b, C). Both may be empty. For an ensemble, b is the number of rows times that of
    members, see `GlobalBatchSampler`.
    """

    step: int
    inputs: Tensor
    targets: Tensor


class TrainLoader:
    """Iterate over this rank's shares of the global batches of steps `first_step` to `last_step`, both included.

    The batches are the same for any number of loader processes. For any world size, the ranks' shares of a step, in the
    order of ranks, are its global batch. Can be iterated more than once; each time from `first_step`.

    Parameters
    ----------
    dataset_part: the part that contains the training split, with transformed targets.
    indices: the training split in it, int64 (n,).
    sampler: the order of positions in `indices`; `sampler.num_rows` is n.
    loader_config: the job's `data.loader`. Loader processes are not started for data that is resident on a GPU.
    device: of the batches.
    augment_config: the job's `data.augment`.
    seed: of the stream "augment".
    num_classes: C, if targets are labels that mixup mixes.

    Raises
    ------
    DataError: augmentation of samples that are not images.
    """

    def __init__(
        self,
        dataset_part: DatasetPart,
        indices: np.ndarray,
        sampler: GlobalBatchSampler,
        *,
        first_step: int,
        last_step: int,
        rank: int,
        world_size: int,
        loader_config: DataLoaderConfig,
        device: torch.device,
        augment_config: AugmentConfig,
        seed: int,
        num_classes: int = 0,
    ) -> None:
        assert len(indices) == sampler.num_rows, f"{len(indices)} rows, but batches of {sampler.num_rows}"
        if is_enabled(augment_config):
            check_images(augment_config, dataset_part.inputs.shape[1:])
        tensors = to_tensors(dataset_part, indices, device)
        self._steps = range(first_step, last_step + 1)
        self._device = device
        self._copies_to_device = tensors.device.type != device.type
        self._num_processes = loader_config.processes if tensors.device.type == "cpu" else 0
        self._pin = self._copies_to_device and _uses_pinned_memory(loader_config.pin_memory, device)
        self._rank_batches = RankBatches(
            *(tensors, sampler, rank, world_size),
            pin=self._pin and not self._num_processes,
            mixup_seed=seed if augment_config.mixup else None,
        )
        assert not augment_config.mixup or num_classes or dataset_part.targets.dtype.kind == "f", (
            "mixup of labels needs the number of classes"
        )
        self._augment_config, self._seed, self._num_classes = augment_config, seed, num_classes
        self._open_fetches: list[Generator[TensorPair]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        pairs: Iterator[TensorPair] = (
            self._rank_batches.gather(self._rank_batches.row_indices(step)) for step in self._steps
        )
        if self._num_processes and self._steps:
            pairs = fetching = fetch_batches(self._rank_batches, self._steps, self._num_processes, self._pin)
            self._open_fetches.append(fetching)
        if self._copies_to_device:
            pairs = prefetch_to_device(pairs, self._device)
        augments = is_enabled(self._augment_config)
        for step, pair in zip(self._steps, pairs, strict=True):
            inputs, targets = self._apply_augment(step, *pair) if augments else pair
            yield Batch(step, inputs, targets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the loader processes of every iteration, finished or not."""
        while self._open_fetches:
            self._open_fetches.pop().close()

    def _apply_augment(self, step: int, inputs: Tensor, targets: Tensor) -> TensorPair:
        config, seed, device = self._augment_config, self._seed, self._device
        first, end, local_slice = self._rank_batches.bounds(step)
        positions = self._rank_batches.positions(step)
        inputs = apply_augment(
            config, inputs, sample_params(config, seed, step, end - first).select(positions).to(device)
        )
        if not config.mixup:
            return inputs, targets
        partners = sample_mixup_permutation(seed, step, end - first)
        lam = sample_mixup_lambda(config.mixup, seed, step, end - first)
        mixup = MixupParams.from_batch(positions, local_slice, partners, lam).to(device)
        return mixup.mix_images(inputs), mixup.mix_targets(targets, self._num_classes)


class EvalLoader:
    """Iterate over a rank's share of a split in batches, in order: over all ranks, each sample exactly once.

    Can be iterated more than once. Consecutive samples are returned as views, without a copy; do not write into them.

    Parameters
    ----------
    dataset_part: the part that contains the split, with transformed targets.
    indices: the samples of the split to evaluate, int64 (n,).
    batch_size: samples per batch, on each rank.
    """

    def __init__(
        self,
        dataset_part: DatasetPart,
        indices: np.ndarray,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        device: torch.device,
        pin_memory: PinMemory = "auto",
    ) -> None:
        self._tensors = to_tensors(dataset_part, indices[rank_slice(len(indices), rank, world_size)], device)
        self._batch_size = batch_size
        self._device = device
        self._copies_to_device = self._tensors.device.type != device.type
        self._pin = self._copies_to_device and _uses_pinned_memory(pin_memory, device)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._tensors.indices) // self._batch_size)

    def __iter__(self) -> Iterator[TensorPair]:
        batches = map(self._get_batch, range(len(self)))
        return prefetch_to_device(batches, self._device) if self._copies_to_device else batches

    def _get_batch(self, number: int) -> TensorPair:
        tensors = self._tensors
        indices = tensors.indices[number * self._batch_size : (number + 1) * self._batch_size]
        first, end = int(indices[0]), int(indices[-1]) + 1
        if (np.diff(indices) == 1).all() and not self._pin:
            return tensors.slice_rows(first, end)
        return index_rows(tensors, torch.from_numpy(indices).to(tensors.device), self._pin)


class RankBatches:
    """A rank's share of each global batch, by step; with mixup, the partners of its samples too.

    mixup_seed: the seed of the stream "augment" if samples are mixed, else None.
    """

    def __init__(
        self,
        tensors: DatasetTensors,
        sampler: GlobalBatchSampler,
        rank: int,
        world_size: int,
        *,
        pin: bool,
        mixup_seed: int | None = None,
    ) -> None:
        self._tensors, self._sampler = tensors, sampler
        self._rank, self._world_size = rank, world_size
        self._pin, self._mixup_seed = pin, mixup_seed
        self._epoch_indices: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))

    def bounds(self, step: int) -> tuple[int, int, slice]:
        """Return the first entry and the end of a step's global batch in its epoch's order, and this rank's slice of
        the batch: whole rows, with the entries of all members."""
        first, end = self._sampler.bounds(self._sampler.epoch_and_position(step)[1])
        rows, members = rank_slice(end - first, self._rank, self._world_size), self._sampler.members
        return first * members, end * members, slice(rows.start * members, rows.stop * members)

    def step_bytes(self) -> int:
        """Return the size of this rank's share of a full batch, in bytes."""
        rows = -(-self._sampler.batch_size // self._world_size)
        return self._tensors.sample_bytes * rows * self._sampler.members

    def positions(self, step: int) -> np.ndarray:
        """Return which samples of the global batch this rank reads: int64 (b + e,), the b of its share, then e mixup
        partners from other ranks' shares."""
        first, end, local_slice = self.bounds(step)
        if self._mixup_seed is None:
            return np.arange(local_slice.start, local_slice.stop, dtype=np.int64)
        return required_positions(self._mixup_seed, step, end - first, local_slice)

    def num_samples(self, step: int) -> int:
        """Return how many samples this rank reads."""
        _, _, local_slice = self.bounds(step)
        return local_slice.stop - local_slice.start if self._mixup_seed is None else len(self.positions(step))

    def row_indices(self, step: int) -> Tensor:
        """Return the indices in the tensors of the samples that this rank reads: int64 (b + e,), on their device."""
        epoch, _ = self._sampler.epoch_and_position(step)
        if self._epoch_indices[0] != epoch:
            indices = torch.from_numpy(self._tensors.indices[self._sampler.epoch_permutation(epoch)])
            self._epoch_indices = (epoch, indices.to(self._tensors.device))
        first, _, local_slice = self.bounds(step)
        if self._mixup_seed is None:
            return self._epoch_indices[1][first + local_slice.start : first + local_slice.stop]
        return self._epoch_indices[1][
            copy_to_device_async(torch.from_numpy(first + self.positions(step)), self._tensors.device)
        ]

    def gather(self, indices: Tensor) -> TensorPair:
        return index_rows(self._tensors, indices, self._pin)


def fetch_batches(rank_batches: RankBatches, steps: range, num_processes: int, pin: bool) -> Generator[TensorPair]:
    """Yield batches from loader processes, which run as long as this generator; each returns several steps at once."""
    step_bytes = rank_batches.step_bytes()
    stride = max(1, min(FETCH_BYTES // max(step_bytes, 1), len(steps) // num_processes))
    step_ranges = [steps[first : first + stride] for first in range(0, len(steps), stride)]

    def fetch(step_range: range) -> TensorPair:
        return rank_batches.gather(torch.cat([rank_batches.row_indices(step) for step in step_range]))

    for step_range, (inputs, targets) in zip(
        step_ranges, map_in_processes(fetch, step_ranges, num_processes, pin), strict=True
    ):
        sizes = [rank_batches.num_samples(step) for step in step_range]
        yield from zip(inputs.split(sizes), targets.split(sizes), strict=True)


def _uses_pinned_memory(pin_memory: PinMemory, device: torch.device) -> bool:
    return device.type == "cuda" and pin_memory is not False  # only copies to CUDA use pinned memory
