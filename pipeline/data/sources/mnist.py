"""MNIST and Fashion-MNIST: IDX files in torchvision's folder layout, read with NumPy."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Literal, cast

import numpy as np

from pipeline.config import JobConfig, NamedDataConfig
from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.sources.download import download
from pipeline.errors import DataError

MnistName = Literal["mnist", "fashion_mnist"]

FOLDERS: dict[MnistName, str] = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
"""Folders below the root. torchvision's classes have the same names."""

CLASSES: dict[MnistName, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}

FILE_PREFIXES = {"train": "train", "test": "t10k"}
FILES = tuple(f"{part}-{kind}-ubyte" for part in FILE_PREFIXES.values() for kind in ("images-idx3", "labels-idx1"))

UNSIGNED_BYTES = 8
"""The IDX code of uint8, the third byte of a file. The fourth is the number of axes."""


def open_mnist(job: JobConfig, on_progress: object, *, float64: bool) -> Dataset:
    """Open the files in `<root>/<folder>/raw`, plain or .gz, and download those that are absent.

    Images are uint8 (N, 28, 28), so `float64` makes no difference.

    Raises
    ------
    DataError: damaged files, or absent files that cannot be downloaded.
    """
    assert isinstance(job.data, NamedDataConfig), "a job with a named dataset"
    name, root = cast(MnistName, job.data.source), Path(job.data.root).expanduser()
    folder = root / FOLDERS[name] / "raw"
    if any(_find_existing(folder / file) is None for file in FILES):
        _download(name, root)
    parts = {}
    for part, prefix in FILE_PREFIXES.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte", ndim=3)
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(images) != len(labels):
            raise DataError(
                f"{len(images)} images, but {len(labels)} labels", where=str(folder), fix="delete the folder"
            )
        parts[part] = DatasetPart(images, labels.astype(np.int64))
    return make_dataset(parts["train"], parts["test"], CLASSES[name])


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or, if only that exists, as `.gz`: uint8 with `ndim` axes.

    Raises
    ------
    DataError: an absent file, one that is not IDX with `ndim` axes, or whose length does not match its header.
    """
    existing = _find_existing(path)
    fix = "delete it to download it again; or --set data.root=DIR"
    if existing is None:
        raise DataError("no such file", where=str(path), fix="--set data.root=DIR")
    try:
        if existing.suffix == ".gz":
            content = np.frombuffer(bytearray(gzip.decompress(existing.read_bytes())), np.uint8)
        else:
            content = np.fromfile(existing, np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=str(existing), fix=fix) from error
    header = 4 + 4 * ndim
    begins = content[:4].tobytes()
    if len(content) < header or begins != bytes([0, 0, UNSIGNED_BYTES, ndim]):
        raise DataError(
            f"not an IDX file of bytes with {ndim} axes: begins with {begins.hex(' ') or 'nothing'}",
            where=str(existing),
            fix=fix,
        )
    shape = tuple(int(size) for size in content[4:header].view(">u4"))
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{len(content):,} bytes, but its header says {' x '.join(map(str, shape))}, which makes "
            f"{header + math.prod(shape):,}",
            where=str(existing),
            fix=fix,
        )
    return content[header:].reshape(shape)


def _find_existing(path: Path) -> Path | None:
    """Return the plain file, else its .gz, else None."""
    packed = path.with_name(path.name + ".gz")
    return next((candidate for candidate in (path, packed) if os.path.isfile(candidate)), None)


def _download(name: MnistName, root: Path) -> None:
    def fetch(folder: str) -> None:
        from torchvision import datasets  # imported here because it is slow to import

        getattr(datasets, FOLDERS[name])(folder, download=True)

    download(name, root, [f"{FOLDERS[name]}/raw/{file}" for file in FILES], fetch)
