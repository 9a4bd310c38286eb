"""Run methods on splits, one process at a time and with one thread, and keep one JSON line for each result.

A result that is in the file is not measured again, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from tests.bench.tables import baselines, trainyard_entries
from tests.bench.tables.scoring import Scores, score_classes, score_numbers
from tests.bench.tables.sources import PublicTable
from tests.bench.tables.splits import SplitFiles, write_split

REPOSITORY = Path(__file__).parents[3]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOKY_MAX_CPU_COUNT"), "1")
TIME_LIMIT_S = 3600.0
STOPPED_BY_USER = (-signal.SIGINT, -signal.SIGTERM)
"""Exit codes that say nothing about a method, so that they are no result."""

Row = dict[str, Any]
Key = tuple[str, int, str]


@dataclass(frozen=True)
class Completed:
    """A finished process: what it printed, and the seconds of it and of the processes that it waited for."""

    output: str
    cpu_s: float
    wall_s: float


def read_results(paths: Iterable[Path]) -> dict[Key, Row]:
    """Return the results of several files by (table, split, method); a later line takes the place of an earlier one."""
    rows: dict[Key, Row] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            rows[row["table"], row["split"], row["method"]] = row
    return rows


def measure_all(
    tables: Iterable[PublicTable],
    splits: Iterable[int],
    methods: Iterable[str],
    *,
    folder: Path,
    results: Sequence[Path],
    trainyard: str,
) -> Iterator[Row]:
    """Measure what none of the files `results` holds yet, method by method, and append it to the first."""
    tables, splits = list(tables), list(splits)
    known, written = set(read_results(results)), results[0]
    written.parent.mkdir(parents=True, exist_ok=True)
    for method in methods:
        for table in tables:
            for split in splits:
                if (table.name, split, method) in known:
                    continue
                row = measure(table, split, method, folder=folder, trainyard=trainyard)
                with written.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                yield row


def measure(table: PublicTable, split: int, method: str, *, folder: Path, trainyard: str) -> Row:
    """Fit, predict and score once. A method that fails gets a result too: its `error`, and no score."""
    files = write_split(table, split, folder)
    train_rows = pq.read_metadata(files.train).num_rows
    row: Row = {
        "table": table.name,
        "split": split,
        "method": method,
        "group": table.group,
        "task": table.task,
        "train_rows": train_rows,
        "seed": split,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "error": None,
    }
    with tempfile.TemporaryDirectory(prefix="bench-tables-") as scratch:
        try:
            if method in baselines.METHODS:
                scores = _fit_baseline(row, table, split, files, Path(scratch))
            else:
                scores = _fit_trainyard(row, table, split, files, Path(scratch), trainyard)
            row |= {name: round(value, 6) for name, value in scores.items()}
        except subprocess.CalledProcessError as error:
            if error.returncode in STOPPED_BY_USER:
                raise
            row["error"] = f"exit code {error.returncode}: {error.stderr.strip()[-600:]}"
        except subprocess.TimeoutExpired:
            row["error"] = f"more than {TIME_LIMIT_S:.0f} s"
        except (ValueError, KeyError) as error:
            row["error"] = f"{type(error).__name__}: {error}"
    return row


def _fit_baseline(row: Row, table: PublicTable, split: int, files: SplitFiles, scratch: Path) -> Scores:
    out, label = scratch / "scores.npz", table.clean_label
    module = [sys.executable, "-m", "tests.bench.tables.baselines"]
    done = _run([*module, row["method"], table.task, label, str(split), str(files.train), str(files.test), str(out)])
    row |= {"cpu_s": done.cpu_s, "wall_s": done.wall_s, **json.loads(done.output.splitlines()[-1])}
    row["versions"] = {name: importlib.metadata.version(name) for name in baselines.PACKAGES[row["method"]]}
    labels = pd.read_parquet(files.labels)[label].to_numpy()
    with np.load(out) as saved:
        if table.task == "regression":
            return score_numbers(labels.astype(float), saved["scores"][:, 0])
        return score_classes(labels.astype(str), saved["classes"].tolist(), saved["scores"])


def _fit_trainyard(
    row: Row, table: PublicTable, split: int, files: SplitFiles, scratch: Path, trainyard: str
) -> Scores:
    """`cpu_s` is the time of `trainyard train`; `predict_cpu_s` that of `trainyard predict`."""
    label, out = table.clean_label, scratch / "out.parquet"
    arguments = trainyard_entries.train_arguments(row["method"], table.task, label, split, files.train, scratch)
    done = _run([trainyard, *arguments], in_folder=scratch)
    result = json.loads(done.output.splitlines()[-1])
    row |= {"cpu_s": done.cpu_s, "wall_s": done.wall_s, "versions": {"trainyard": _trainyard_version(trainyard)}}
    row |= {"status": result.get("status"), "steps": result.get("step"), "epochs": result.get("epoch")}
    storage = ["--storage", str(scratch / "runs")]
    done = _run(
        [trainyard, "predict", result["run"], "--input", str(files.test), "--output", str(out), *storage, "--quiet"],
        in_folder=scratch,
    )
    row["predict_cpu_s"] = done.cpu_s
    labels, predicted = pd.read_parquet(files.labels)[label].to_numpy(), pd.read_parquet(out)
    if table.task == "regression":
        return score_numbers(labels.astype(float), predicted["prediction"].to_numpy(dtype=float))
    prefix = "probability_"
    names = sorted(str(name) for name in predicted if str(name).startswith(prefix))
    return score_classes(
        labels.astype(str), [name.removeprefix(prefix) for name in names], predicted[names].to_numpy(dtype=float)
    )


def _run(command: list[str], in_folder: Path = REPOSITORY) -> Completed:
    """Run a command in one thread.

    Raises
    ------
    CalledProcessError: it failed.
    TimeoutExpired: it took more than `TIME_LIMIT_S`.
    """
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command,
        cwd=in_folder,
        env={**os.environ, **ONE_THREAD},
        check=True,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    wall_s, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Completed(done.stdout, round(cpu_s, 3), round(wall_s, 3))


@cache
def _trainyard_version(trainyard: str) -> str:
    done = subprocess.run([trainyard, "--version"], check=True, capture_output=True, text=True)
    return done.stdout.strip()
