"""A program that reads a table larger than its memory limit for some epochs, and prints its memory usage."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas  # noqa: F401  # before the limit is set, since Arrow imports it with the first array
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch

from pipeline.config import AugmentConfig, DataLoaderConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.sampler import GlobalBatchSampler
from pipeline.data.sources.tables import open_table
from tests.data.parquet_jobs import make_parquet_job

WIDTH = 1024


def write_table(folder: Path, megabytes: int) -> None:
    """Write files of embeddings, amounts and a category, whose float32 matrix has `megabytes` x 10^6 bytes in total."""
    rng = np.random.default_rng(1)
    rows = megabytes * 10**6 // (4 * (WIDTH + 3)) // 4
    block = rng.random((rows, WIDTH), np.float32)
    for number in range(4):
        columns = {
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), WIDTH),
            "amount": pa.array(block[:, 0] * 100 + number),
            "age": pa.array(rng.integers(18, 90, rows), pa.int8()),
            "plan": pa.array(np.array(["free", "pro", "team"])[rng.integers(0, 3, rows)]),
            "churned": pa.array(np.array(["no", "yes"])[(block[:, 1] > 0.5).astype(int)]),
        }
        path = folder / f"{number}.parquet"
        pq.write_table(pa.table(columns), path, use_dictionary=["plan", "churned"], compression="none")


def memory_usage() -> dict[str, int]:
    """Return the bytes that count towards RLIMIT_DATA, and the resident bytes that are anonymous or from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmData", "RssAnon", "RssFile")}


def main(folder: str, cache: str, limit: int, epochs: int) -> None:
    """Read the table under a memory limit.

    limit: bytes of RLIMIT_DATA, in addition to the memory that the imports use.
    """
    torch.set_num_threads(1)
    base = memory_usage()["VmData"]
    limit += base
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    began = time.monotonic()
    job = make_parquet_job(folder, label="churned", cache={"folder": cache, "in_memory_mb": 16})
    dataset = open_table(job, lambda text: print(text, file=sys.stderr), float64=False)
    opened = time.monotonic()
    rows = np.arange(len(dataset.train), dtype=np.int64)
    batches = GlobalBatchSampler(len(rows), batch_size=256, seed=1, shuffle=True)
    steps = epochs * batches.steps_per_epoch
    loader = TrainLoader(
        dataset.train, rows, batches, first_step=1, last_step=steps, rank=0, world_size=1,
        loader_config=DataLoaderConfig(), device=torch.device("cpu"), augment_config=AugmentConfig(), seed=1,
    )  # fmt: skip
    num_seen, total, max_anonymous = 0, 0.0, memory_usage()["RssAnon"]
    for batch in loader:
        num_seen += len(batch.inputs)
        total += float(batch.inputs[:, 0].double().sum())
        if batch.step % 100 == 0:
            max_anonymous = max(max_anonymous, memory_usage()["RssAnon"])
    print(
        json.dumps(
            {
                "base": base,
                "limit": limit,
                "matrix": dataset.train.inputs.nbytes,
                "rows": len(rows),
                "seen": num_seen,
                "total": total,
                "open_s": round(opened - began, 2),
                "epochs_s": round(time.monotonic() - opened, 2),
                "max_anonymous": max_anonymous,
                **memory_usage(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
