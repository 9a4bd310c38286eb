"""CIFAR-10 and CIFAR-100, through torchvision, which checks the files against their checksums."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.sources.download import download
from pipeline.errors import DataError

CifarName = Literal["cifar10", "cifar100"]

FOLDERS: dict[CifarName, str] = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def open_cifar(name: CifarName, root: str) -> Dataset:
    """The source from `<root>/cifar-10-batches-py` or `<root>/cifar-100-python`; downloaded where that is absent.

    Images are uint8 (N, 3, 32, 32).

    Raises
    ------
    DataError: files that are damaged, or absent and out of reach.
    """
    from torchvision import datasets  # costs more than all else: only where it is needed

    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root_folder = Path(root).expanduser()
    if not os.path.isdir(root_folder / FOLDERS[name]):
        download(name, root_folder, [FOLDERS[name]], lambda folder: dataset(folder, download=True))
    try:
        with warnings.catch_warnings():
            # NumPy has outgrown the way in which these old files spell their types.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            train, test = (dataset(str(root_folder), train=train) for train in (True, False))
    except Exception as error:  # not only RuntimeError: a damaged pickle raises whatever it likes
        raise DataError(
            f"{name} is damaged or incomplete",
            where=str(root_folder / FOLDERS[name]),
            fix="delete it, and it is downloaded again; or --set data.root=DIR",
        ) from error
    return make_dataset(_to_dataset_part(train), _to_dataset_part(test), tuple(train.classes))


def _to_dataset_part(dataset: Any) -> DatasetPart:
    images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
    return DatasetPart(images, np.asarray(dataset.targets, dtype=np.int64))
