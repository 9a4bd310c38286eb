"""Jobs on Parquet files, and the datasets that they open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.sources import Dataset, open_dataset


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """Write a file with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def make_parquet_job(url: object, *, task: str = "multiclass", precision: str = "fp32", **data: Any) -> JobConfig:
    """Make a job on Parquet files; the default label is `y`."""
    tree = {"source": "parquet", "url": str(url), "label": "y", **data}
    best = {"metric": "val/loss"}
    return build_job({"name": "t", "task": task, "data": tree, "train": {"precision": precision}, "best": best}, "test")


def open_parquet(url: object, **options: Any) -> Dataset:
    return open_dataset(make_parquet_job(url, **options))
