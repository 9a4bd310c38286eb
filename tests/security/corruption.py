"""Changes to stored runs, as another writer or a bad disk could make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.runs.serialization import compute_digest, with_digest

JOB = """
schema: 1
name: victim
data: {source: disc, normalize: scalar, splits: {by: random, val: 0.2}}
model: {kind: mlp, hidden: [6]}
train: {batch_size: 16, optimizer: {kind: sgd, momentum: 0.9}, phases: [{steps: 600, lr: 0.05}]}
evaluate: {every_steps: 25}
checkpoint: {every_steps: 50, keep: 2}
"""


@dataclass(frozen=True)
class ExampleRuns:
    """A job file, a finished run of it, and an interrupted one."""

    job: Path
    finished: Path
    interrupted: Path


def _replace_entry(tree: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    tree["files"][name] = entry


def edit_with_digest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a journal entry or manifest, with a valid digest."""
    tree = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    change(tree)
    path.write_text(json.dumps(with_digest(tree)))


def rewrite_job(run: Path, change: Callable[[dict[str, Any]], Any], metadata: dict[str, Any] | None = None) -> None:
    """Change a stored job, and metadata of the run's creation, with a valid digest."""
    path = run / "job.yaml"
    text = path.read_text().partition("\n")[2]
    tree = yaml.safe_load(text)
    change(tree)
    replace_job(run, yaml.safe_dump(tree), metadata)


def replace_job(run: Path, text: str, metadata: dict[str, Any] | None = None) -> None:
    """Replace the text of a stored job, and metadata of the run's creation, with a valid digest."""
    path = run / "job.yaml"
    header = json.loads(path.read_text().partition("\n")[0].removeprefix("# trainyard: "))
    header = {**header, "facts": {**header["facts"], **(metadata or {})}}
    del header["sha256"]
    header["sha256"] = compute_digest({**header, "job": text})
    path.write_text(f"# trainyard: {json.dumps(header)}\n{text}")


def newest_commit(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of the newest commit and its content."""
    commits = [(path, json.loads(path.read_text())) for path in sorted((run / "journal").glob("*.json"))]
    return [(path, tree) for path, tree in commits if tree["kind"] == "commit"][-1]


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of the newest commit's checkpoint and of its best checkpoint."""
    _, commit = newest_commit(run)
    return [run / "checkpoints" / name for name in {commit["checkpoint"], commit["best"]["checkpoint"]}]


def replace_file(run: Path, name: str, content: bytes) -> None:
    """Replace a file of the newest and the best checkpoint, with manifests that have its digest."""
    for folder in checkpoints(run):
        if not (folder / name).exists():
            continue
        (folder / name).write_bytes(content)
        file_entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit_with_digest(folder / "manifest.json", partial(_replace_entry, name=name, entry=file_entry))


def quick_and_slow(cases: Iterable[str], *quick: str) -> list[Any]:
    """Return the cases as parameters: those in `quick` always run, the others with -m slow."""
    names = list(cases)
    assert set(quick) <= set(names)
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]
