"""The time and memory to read a large CSV file: `open_dataset` beside pyarrow's own readers, in turn.

    python tests/bench/csv_reading.py [--megabytes 1000] [--runs 3] [--folder DIR]

Reads a table of numbers and one with text. `dataset` is all that training does before the first batch: hash the file,
parse it, infer one type per column over all rows, and fill the matrix of inputs, in a cache on disk if it is larger
than 256 MB. `read_csv` makes an Arrow table in memory; `open_csv` only passes over the batches and keeps nothing.
Prints wall and CPU seconds and the largest anonymous memory, which does not count pages of files, and medians of the
ratios to `read_csv` and `open_csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
READERS = ("dataset", "read_csv", "open_csv")
ROWS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where the files are written")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(measure(*args.read)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in ("numbers", "text"):
            compare(kind, write_table(Path(folder) / f"{kind}.csv", kind, args.megabytes), args.runs)


def write_table(path: Path, kind: str, megabytes: int) -> Path:
    rng = np.random.default_rng(1)
    columns = {f"f{index}": np.char.mod("%.6g", rng.normal(size=ROWS) * 10.0 ** (index % 4)) for index in range(8)}
    if kind == "numbers":
        columns |= {f"i{index}": rng.integers(0, 10 ** (1 + index), ROWS).astype(str) for index in range(8)}
    else:
        words = np.array([f'"word {index}, of a list"' for index in range(1000)])
        columns |= {f"t{index}": words[rng.integers(0, 10 * (index + 1) ** 3, ROWS)] for index in range(4)}
        columns |= {"city": np.char.add("city", rng.integers(0, 3000, ROWS).astype(str))}
    columns["y"] = np.where(rng.random(ROWS) < 0.5, "no", "yes")
    body = "".join(f"{','.join(row)}\n" for row in zip(*columns.values(), strict=True)).encode()
    with path.open("wb") as file:
        file.write(f"{','.join(columns)}\n".encode())
        while file.tell() < megabytes * 10**6:
            file.write(body)
    return path


def compare(kind: str, path: Path, runs: int) -> None:
    seconds: list[dict[str, dict[str, float]]] = []
    for _ in range(runs):
        results = {}
        for reader in READERS:
            command = [sys.executable, __file__, "--read", reader, str(path)]
            ended = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
            results[reader] = json.loads(ended.stdout.splitlines()[-1])
            shown = ", ".join(f"{value:,.2f} {name}" for name, value in results[reader].items())
            print(f"{kind}, {path.stat().st_size / 1e6:,.0f} MB, {reader}: {shown}", flush=True)
        seconds.append(results)
    for name in ("s wall", "s CPU"):
        ratios = [
            statistics.median(run["dataset"][name] / run[other][name] for run in seconds) for other in READERS[1:]
        ]
        print(f"{kind}: {name} of dataset / read_csv {ratios[0]:.2f}, / open_csv {ratios[1]:.2f}", flush=True)


def measure(reader: str, path: str) -> dict[str, float]:
    """Read the file once in this process."""
    import pyarrow.csv as pa_csv

    sys.path.insert(0, str(REPOSITORY))
    from pipeline.config.files import build_job
    from pipeline.data.sources import open_dataset

    with tempfile.TemporaryDirectory(dir=Path(path).parent) as cache:
        tree = {"source": "csv", "url": path, "label": "y", "cache": {"folder": cache}}
        job = build_job({"name": "t", "task": "multiclass", "data": tree, "best": {"metric": "val/loss"}}, "bench")
        small = Path(cache, "small.csv")
        small.write_text("a,y\n1,no\n2,yes\n")
        open_dataset(job.model_copy(update={"data": job.data.model_copy(update={"url": str(small)})}))  # imports
        base, peak, ended = anonymous_mb(), [0.0], threading.Event()
        watcher = threading.Thread(target=watch, args=(peak, ended))
        watcher.start()
        before, begun = os.times(), time.perf_counter()
        if reader == "dataset":
            open_dataset(job)
        elif reader == "read_csv":
            pa_csv.read_csv(path)
        else:
            sum(batch.num_rows for batch in pa_csv.open_csv(path))
        wall, after = time.perf_counter() - begun, os.times()
        ended.set()
        watcher.join()
    return {"s wall": wall, "s CPU": sum(after[:2]) - sum(before[:2]), "MB": peak[0] - base}


def watch(peak: list[float], ended: threading.Event) -> None:
    while not ended.wait(0.02):
        peak[0] = max(peak[0], anonymous_mb())


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
