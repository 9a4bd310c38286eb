"""Jobs on Parquet files, and the sources that they open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources import Source, open_source
from pipeline.job import Job
from pipeline.job_file import build_job


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """One file of some columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def parquet_job(url: object, *, task: str = "multiclass", precision: str = "fp32", **data: Any) -> Job:
    """`label: y` unless said; the cache lies where the test says."""
    tree = {"source": "parquet", "url": str(url), "label": "y", **data}
    best = {"metric": "val/loss"}
    return build_job({"name": "t", "task": task, "data": tree, "train": {"precision": precision}, "best": best}, "test")


def opened(url: object, **options: Any) -> Source:
    return open_source(parquet_job(url, **options))
