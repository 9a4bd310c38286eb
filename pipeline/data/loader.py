"""Loaders: a rank's samples as batches on the device, in training order or in the order of a split."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import Mix, augmented, check_images, draw, draw_partners, draw_shares, is_wanted
from pipeline.data.sampler import GlobalBatches, share
from pipeline.data.shares import Shares, fetched
from pipeline.data.sources.arrays import Arrays
from pipeline.data.tensors import Pair, gather, moved, place
from pipeline.job import Augment, Loader

PinMemory = Literal["auto"] | bool


@dataclass(slots=True)
class Batch:
    """One rank's share of a global batch, on the device.

    inputs: raw samples (b, ...), augmented where the job says so. targets: (b,) or (b, T); where labels were mixed,
    probabilities of the classes (b, C). Both may be empty.
    """

    step: int
    inputs: Tensor
    targets: Tensor


class TrainLoader:
    """This rank's shares of the global batches of steps `first_step` to `last_step`, both included.

    What comes out is the same for any number of loader processes, and the ranks' shares of a step, one after another,
    are its global batch for any world size. Can be iterated more than once; each time from `first_step`.

    Parameters
    ----------
    arrays: the part in which the training split lies, with prepared targets.
    rows: the training split within it, int64 (n,).
    batches: the order of positions within `rows`; `batches.rows` is n.
    loader: the job's `data.loader`. Processes are of no use to data that is resident on a GPU, and not started.
    device: where batches come out.
    augment: the job's `data.augment`.
    seed: of the stream "augment".
    classes: C, where targets are labels that mixup mixes.

    Raises
    ------
    DataError: augmentation of what is no image.
    """

    def __init__(
        self,
        arrays: Arrays,
        rows: np.ndarray,
        batches: GlobalBatches,
        *,
        first_step: int,
        last_step: int,
        rank: int,
        world_size: int,
        loader: Loader,
        device: torch.device,
        augment: Augment,
        seed: int,
        classes: int = 0,
    ) -> None:
        assert len(rows) == batches.rows, f"{len(rows)} rows, but batches of {batches.rows}"
        if is_wanted(augment):
            check_images(augment, arrays.inputs.shape[1:])
        tensors = place(arrays, rows, device)
        self._steps = range(first_step, last_step + 1)
        self._device = device
        self._moves = tensors.device.type != device.type
        self._processes = loader.processes if tensors.device.type == "cpu" else 0
        self._pin = self._moves and _pins(loader.pin_memory, device)
        self._shares = Shares(
            *(tensors, batches, rank, world_size),
            pin=self._pin and not self._processes,
            mixing=seed if augment.mixup else None,
        )
        assert not augment.mixup or classes or arrays.targets.dtype.kind == "f", "labels are mixed among known classes"
        self._augment, self._seed, self._classes = augment, seed, classes
        self._fetching: list[Generator[Pair]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        pairs: Iterator[Pair] = (self._shares.gathered(self._shares.rows(step)) for step in self._steps)
        if self._processes and self._steps:
            pairs = fetching = fetched(self._shares, self._steps, self._processes, self._pin)
            self._fetching.append(fetching)
        if self._moves:
            pairs = moved(pairs, self._device)
        changes = is_wanted(self._augment)
        for step, pair in zip(self._steps, pairs, strict=True):
            inputs, targets = self._changed(step, *pair) if changes else pair
            yield Batch(step, inputs, targets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the loader processes of every iteration, finished or not."""
        while self._fetching:
            self._fetching.pop().close()

    def _changed(self, step: int, inputs: Tensor, targets: Tensor) -> Pair:
        config, seed, device = self._augment, self._seed, self._device
        first, end, local_slice = self._shares.bounds(step)
        positions = self._shares.positions(step)
        inputs = augmented(config, inputs, draw(config, seed, step, end - first).of(positions).to(device))
        if not config.mixup:
            return inputs, targets
        partners, lam = draw_partners(seed, step, end - first), draw_shares(config.mixup, seed, step, end - first)
        mixup = Mix.of(positions, local_slice, partners, lam).to(device)
        return mixup.images(inputs), mixup.targets(targets, self._classes)


class EvalLoader:
    """A rank's share of a split in blocks, in order: over all ranks every row exactly once.

    Can be iterated as often as needed. Consecutive rows come as views, without a copy; do not write into them.

    Parameters
    ----------
    arrays: the part in which the split lies, with prepared targets.
    rows: what is evaluated of the split, int64 (n,).
    batch_size: rows of a block, on each rank.
    """

    def __init__(
        self,
        arrays: Arrays,
        rows: np.ndarray,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        device: torch.device,
        pin_memory: PinMemory = "auto",
    ) -> None:
        self._tensors = place(arrays, rows[share(len(rows), rank, world_size)], device)
        self._batch_size = batch_size
        self._device = device
        self._moves = self._tensors.device.type != device.type
        self._pin = self._moves and _pins(pin_memory, device)

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-len(self._tensors.rows) // self._batch_size)

    def __iter__(self) -> Iterator[Pair]:
        blocks = map(self._block, range(len(self)))
        return moved(blocks, self._device) if self._moves else blocks

    def _block(self, number: int) -> Pair:
        tensors = self._tensors
        rows = tensors.rows[number * self._batch_size : (number + 1) * self._batch_size]
        first, end = int(rows[0]), int(rows[-1]) + 1
        if (np.diff(rows) == 1).all() and not self._pin:
            return tensors.block(first, end)
        return gather(tensors, torch.from_numpy(rows).to(tensors.device), self._pin)


def _pins(wanted: PinMemory, device: torch.device) -> bool:
    return device.type == "cuda" and wanted is not False  # there is nothing to pin for elsewhere
