"""CIFAR-10 and CIFAR-100, read with torchvision, which verifies the checksums of the files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from pipeline.config import JobConfig, NamedDataConfig
from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.sources.download import download
from pipeline.errors import DataError

CifarName = Literal["cifar10", "cifar100"]

FOLDERS: dict[CifarName, str] = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def open_cifar(job: JobConfig, on_progress: object, *, float64: bool) -> Dataset:
    """Open `<root>/cifar-10-batches-py` or `<root>/cifar-100-python`, and download it if it is absent.

    Images are uint8 (N, 3, 32, 32), so `float64` makes no difference.

    Raises
    ------
    DataError: damaged files, or absent files that cannot be downloaded.
    """
    from torchvision import datasets  # imported here because it is slow to import

    assert isinstance(job.data, NamedDataConfig), "a job with a named dataset"
    name = cast(CifarName, job.data.source)
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root_folder = Path(job.data.root).expanduser()
    if not os.path.isdir(root_folder / FOLDERS[name]):
        download(name, root_folder, [FOLDERS[name]], lambda folder: dataset(folder, download=True))
    try:
        with warnings.catch_warnings():
            # These old files write their types in a form that NumPy deprecates.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            train, test = (dataset(str(root_folder), train=train) for train in (True, False))
    except Exception as error:  # not only RuntimeError: a damaged pickle can raise any exception
        raise DataError(
            f"{name} is damaged or incomplete",
            where=str(root_folder / FOLDERS[name]),
            fix="delete it to download it again; or --set data.root=DIR",
        ) from error
    return make_dataset(_to_dataset_part(train), _to_dataset_part(test), tuple(train.classes))


def _to_dataset_part(dataset: Any) -> DatasetPart:
    images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
    return DatasetPart(images, np.asarray(dataset.targets, dtype=np.int64))
