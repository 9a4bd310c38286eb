"""The format of a checkpoint: its files, and `manifest.json`, which is written last and makes it complete."""

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


CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
PICKLED_STATE = "state.pt"
"""The pickle that earlier versions wrote instead of `state.safetensors`. It is never read."""
ROWS_FILE = "rows.parquet"
PREPROCESS_FILE = "preprocess.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class ManifestFile:
    """Expected size and digest of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; see `Checkpoint` for the meaning of the fields."""

    step: int
    epoch: int
    end: bool
    position: dict[str, Any]
    metrics: dict[str, float]
    best: BestCheckpoint | None
    first_cell: int
    files: dict[str, ManifestFile]
    patience: int | None = None


def write_checkpoint(storage: Storage, name: str, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint: its files, then the manifest that makes it complete.

    Parameters
    ----------
    storage: the run's folder.
    metadata: step, epoch, end, position, metrics, best and first_cell, as plain values.

    Raises
    ------
    StorageFullError: there is not enough space; the files already written are deleted.
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
    except StorageFullError:  # the partial files are useless and take up space
        with suppress(TrainyardError):
            delete_checkpoint(storage, name)
        raise


def delete_checkpoint(storage: Storage, name: str) -> None:
    """Delete a checkpoint, manifest first: if the process is killed, what remains is not a checkpoint."""
    storage.delete(f"{CHECKPOINTS_FOLDER}/{name}/{MANIFEST_FILE}")
    storage.delete_folder(f"{CHECKPOINTS_FOLDER}/{name}")


def parse_manifest(data: bytes) -> Manifest:
    """Parse and validate a manifest.

    Raises
    ------
    ValueError: it was altered, or is not in the format of this version.
    """
    try:
        tree = verify_digest(from_json(data))
        if tree.get("format") != MANIFEST_FORMAT:
            raise ValueError(f"its format {tree.get('format')!r} is not supported by this version")
        tree["metrics"], tree["best"] = to_floats(tree["metrics"]), parse_best(tree["best"])
        manifest = validate_as(Manifest, tree)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if min(manifest.step, manifest.epoch, manifest.first_cell) < 0:
        raise ValueError("a negative number")
    for name in manifest.files:
        validate_name(name)
    return manifest


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file, which preserves dtype, shape and bits of each tensor. Deterministic."""
    from safetensors.torch import save

    pointers: set[int] = set()
    cpu_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        cpu_tensor = tensor.detach().cpu().contiguous()
        if cpu_tensor.untyped_storage().data_ptr() in pointers:
            cpu_tensor = cpu_tensor.clone()  # tied weights or views: the format forbids shared memory
        pointers.add(cpu_tensor.untyped_storage().data_ptr())
        cpu_tensors[name] = cpu_tensor
    return save(cpu_tensors)


def decode_tensors(data: bytes) -> dict[str, Tensor]:
    """Decode `model.safetensors` or `state.safetensors` to tensors by name, on the CPU. The file may be from anybody:
    no code is run, and memory is bounded by its size.

    Raises
    ------
    ValueError: not a safetensors file, or one with tensors that torch cannot create.
    """
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:  # SafetensorError, and what torch raises for invalid types and shapes
        first_line = str(error).partition("\n")[0][:200]
        raise ValueError(f"{type(error).__name__}: {first_line}") from None
