"""Assertions on run directories, which are read with pyarrow and safetensors, never with this package."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.dataset
from safetensors.torch import load_file

ATTEMPT_COLUMNS = ["attempt", "seconds", "time"]
"""Columns that depend on the attempt and the time."""


def find_run(storage: Path) -> Path:
    """Return the only run in a folder."""
    (job,) = storage.glob("*/job.yaml")
    return job.parent


def final_state(run: Path) -> dict[str, Any]:
    """Return everything that must not depend on how often the run was interrupted."""
    result = json.loads((run / "result.json").read_text())
    last, chosen = (run / "checkpoints" / result[name] for name in ("last", "chosen"))
    state = load_file(last / "state.safetensors")
    return {
        "last": _sha256(last / "model.safetensors"),
        "chosen": _sha256(chosen / "model.safetensors"),
        "state": {name: tensor.tolist() for name, tensor in sorted(state.items())},
        "result": _without_attempts(result),
        "position": json.loads((last / "manifest.json").read_text())["position"],
        "splits": _sha256(run / "splits.parquet"),
        **{name: read_log(run, name).drop_columns(ATTEMPT_COLUMNS).to_pylist() for name in ("steps", "evals")},
    }


def read_log(run: Path, name: str) -> pa.Table:
    """Return one table of the metric log, sorted by step."""
    return pyarrow.dataset.dataset(run / "metrics" / name, format="parquet").to_table().sort_by("step")


def read_entries(run: Path) -> list[dict[str, Any]]:
    """Return the entries of the journal, in order."""
    return [json.loads(path.read_text()) for path in sorted((run / "journal").glob("*.json"))]


def check_checkpoints(run: Path) -> None:
    """Check that all checkpoints kept by the newest commit and by any end are undamaged. Holds while nothing writes."""
    commits = [entry for entry in read_entries(run) if entry["kind"] == "commit"]
    for commit in commits[-1:] + [commit for commit in commits if commit["end"]]:
        for name in {name for pair in commit["kept"] for name in pair if name is not None}:
            folder = run / "checkpoints" / name
            for file, expected in json.loads((folder / "manifest.json").read_text())["files"].items():
                assert _sha256(folder / file) == expected["sha256"], f"{folder / file} was altered"


def hash_committed_files(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that a zombie must not change: checkpoints, segments, journal and result. It may
    leave heartbeats and live rows."""
    files = [path for path in run.rglob("*") if path.is_file() and ".tmp" not in path.parts]
    return {
        str(path.relative_to(run)): _sha256(path)
        for path in files
        if path.parts[len(run.parts)] not in ("heartbeats", "live")
    }


class RunReader:
    """While entered, reads the metric log continuously; what it finds wrong is raised on exit."""

    def __init__(self, storage: Path) -> None:
        self.reads = 0
        self._storage = storage
        self._previous: dict[str, pa.Table] = {}
        self._listed: dict[str, set[str]] = {"steps": set(), "evals": set()}
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> RunReader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _poll(self) -> None:
        try:
            while not self._stopped.wait(0.005):
                for job in self._storage.glob("*/job.yaml"):
                    self._check(job.parent)
        except BaseException as error:
            self._error = error

    def _check(self, run: Path) -> None:
        steps = self._read_table(run, "steps")
        if steps is None:
            return
        numbers = steps["step"].to_pylist()
        assert numbers == list(range(1, len(numbers) + 1)), f"a step twice, or a gap: {numbers}"
        evaluations = self._read_table(run, "evals")
        assert evaluations is not None, "the steps of a segment before its evaluations"
        keys = list(zip(evaluations["step"].to_pylist(), evaluations["split"].to_pylist(), strict=True))
        assert len(set(keys)) == len(keys), f"an evaluation twice: {keys}"
        self.reads += 1

    def _read_table(self, run: Path, name: str) -> pa.Table | None:
        folder = run / "metrics" / name
        listed = {path.name for path in folder.glob("*")}
        if not listed:
            return None
        assert self._listed[name] <= listed, f"files vanished: {self._listed[name] - listed}"
        self._listed[name] = listed
        table = pyarrow.dataset.dataset(sorted(folder / file for file in listed), format="parquet").to_table()
        before = self._previous.get(name)
        if before is not None:
            assert len(table) >= len(before), "the log became shorter"
            assert table.slice(0, len(before)).equals(before), "a row changed after it was published"
        self._previous[name] = table
        return table


def wait_for(condition: Any, seconds: float, what: str) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.02)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_attempts(tree: Any) -> Any:
    return json.loads(re.sub(r"(step-\d+)-a\d+", r"\1", json.dumps(tree)))
