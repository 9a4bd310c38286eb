"""Folders of small images for tests, and the jobs that read them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import JobConfig
from pipeline.config.files import build_job

CLASSES = ("ant", "bee", "cat")


def encode_image(number: int, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    """Encode an image of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def make_image_files(per_class: int = 5, **options: Any) -> dict[str, bytes]:
    """Return image files by path: `per_class` images of each class, one of them in a nested folder."""
    paths = [f"{name}/{'deep/er/' if row == 0 else ''}{row}.png" for name in CLASSES for row in range(per_class)]
    return {path: encode_image(number, **options) for number, path in enumerate(paths)}


def write_files(folder: Path, files: dict[str, bytes]) -> str:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return str(folder)


def make_image_job(url: str, task: str = "multiclass", **data: Any) -> JobConfig:
    tree = {
        "schema": 1,
        "name": "pictures",
        "data": {"source": "image_folder", "url": url, **data},
        "task": task,
        "model": {"kind": "mlp", "hidden": []},
        "train": {"batch_size": 4, "phases": [{"epochs": 1, "lr": 0.1}]},
    }
    return build_job(tree, "a test")
