"""What every source gives: decoded arrays in memory, and a digest of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Arrays:
    """The rows of one part of a source.

    inputs: images as uint8 (N, H, W) or (N, C, H, W), or numbers as float32 or float64 (N, F) or of any further shape.
    targets: labels as int64 (N,), or numbers as float32 or float64 (N,) or (N, T).
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Source:
    """What a job trains on.

    train: the rows that splits are made of.
    test: the source's own test set, where it has one.
    classes: names of the classes in the order of their labels, where the source knows them.
    fingerprint: SHA-256 of all of the above, in hex.
    """

    train: Arrays
    test: Arrays | None
    classes: tuple[str, ...]
    fingerprint: str

    def part(self, name: str) -> Arrays:
        """The arrays of "train" or "test"."""
        arrays = {"train": self.train, "test": self.test}[name]
        assert arrays is not None, f"the source has no {name} part"
        return arrays


def make_source(train: Arrays, test: Arrays | None, classes: tuple[str, ...]) -> Source:
    """A source with its fingerprint."""
    return Source(train, test, classes, fingerprint(train, test, classes))


def fingerprint(train: Arrays, test: Arrays | None, classes: tuple[str, ...]) -> str:
    """SHA-256 over the names, types, shapes and bytes of the arrays, and the classes, in hex."""
    digest = hashlib.sha256()
    for part, arrays in (("train", train), ("test", test)):
        if arrays is None:
            continue
        for name, values in (("inputs", arrays.inputs), ("targets", arrays.targets)):
            little = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
            digest.update(f"{part}/{name} {little.dtype.str} {little.shape}\n".encode())
            digest.update(little.reshape(-1).view(np.uint8).data)
    digest.update(repr(tuple(classes)).encode())
    return digest.hexdigest()
