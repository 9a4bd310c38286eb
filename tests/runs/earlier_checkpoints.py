"""Convert a run's checkpoints to the format of versions before `state.safetensors`."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import torch
from safetensors.torch import load

from pipeline.runs.serialization import with_digest


def pickle_states(run: Path) -> None:
    """Replace each checkpoint's `state.safetensors` by the `state.pt` of an earlier version, manifest included."""
    for folder in (run / "checkpoints").iterdir():
        state = folder / "state.safetensors"
        if not state.exists():  # a checkpoint with the best weights only
            continue
        buffer = io.BytesIO()
        torch.save(load(state.read_bytes()), buffer)
        state.unlink()
        put_state(folder, buffer.getvalue())


def put_state(folder: Path, content: bytes) -> None:
    """Write `state.pt` with this content, and a manifest that names it in place of `state.safetensors`."""
    (folder / "state.pt").write_bytes(content)
    path = folder / "manifest.json"
    tree = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    tree["files"].pop("state.safetensors", None)
    tree["files"]["state.pt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(with_digest(tree), indent=1))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
