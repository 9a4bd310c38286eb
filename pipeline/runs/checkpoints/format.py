"""`manifest.json`: what a checkpoint is, and which bytes belong to it.

Checkpoints as they are written: files, then the manifest that makes them whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import validate_name
from pipeline.errors import StorageFullError, TrainyardError
from pipeline.runs.journal.entries import BestCheckpoint, parse_best, to_floats, validate_as
from pipeline.runs.serialization import from_json, to_json, verify_digest, with_digest
from pipeline.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ManifestFile:
    """What a file of a checkpoint must be, byte for byte."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; see `Checkpoint` for the meaning of each."""

    step: int
    epoch: int
    end: bool
    position: dict[str, Any]
    metrics: dict[str, float]
    best: BestCheckpoint | None
    first_cell: int
    files: dict[str, ManifestFile]
    patience: int | None = None


def parse_manifest(data: bytes) -> Manifest:
    """A manifest from its file.

    Raises
    ------
    ValueError: altered since it was written, or not what a version of Trainyard known here would write.
    """
    try:
        tree = verify_digest(from_json(data))
        if tree.get("format") != MANIFEST_FORMAT:
            raise ValueError(f"its format {tree.get('format')!r} is not known to this version")
        tree["metrics"], tree["best"] = to_floats(tree["metrics"]), parse_best(tree["best"])
        manifest = validate_as(Manifest, tree)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if min(manifest.step, manifest.epoch, manifest.first_cell) < 0:
        raise ValueError("a number below 0")
    for name in manifest.files:
        validate_name(name)
    return manifest


CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
PICKLED_STATE = "state.pt"
"""What earlier versions wrote instead of `state.safetensors`: a pickle, which is never read."""
ROWS_FILE = "rows.parquet"
PREPROCESS_FILE = "preprocess.json"
MANIFEST_FORMAT = 1


def write_checkpoint(storage: Storage, name: str, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint: its files, then the manifest that makes it whole.

    Parameters
    ----------
    storage: the run's folder.
    facts: step, epoch, end, position, metrics, best and first_cell, as plain values.

    Raises
    ------
    StorageFullError: there is no room for it; nothing of it is left.
    """
    folder = storage.subfolder(f"{CHECKPOINTS_FOLDER}/{name}")
    file_entries = {
        file: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()
    }
    tree = with_digest({"format": MANIFEST_FORMAT, **metadata, "files": file_entries})
    try:
        for file, data in files.items():
            folder.replace(file, data, sync=True)
        folder.replace(MANIFEST_FILE, to_json(tree, indent=1).encode(), sync=True)
    except StorageFullError:  # what is there of it is no checkpoint, and others need the room
        with suppress(TrainyardError):
            delete_checkpoint(storage, name)
        raise


def delete_checkpoint(storage: Storage, name: str) -> None:
    """Delete a checkpoint, manifest first: what a kill leaves of it is no checkpoint."""
    storage.delete(f"{CHECKPOINTS_FOLDER}/{name}/{MANIFEST_FILE}")
    storage.delete_folder(f"{CHECKPOINTS_FOLDER}/{name}")


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file, which keeps dtype, shape and bits of each tensor: the same tensors give the same bytes."""
    from safetensors.torch import save

    seen: set[int] = set()
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in seen:  # tied or cut from one piece: the format wants its own memory
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        stored[name] = own
    return save(stored)
