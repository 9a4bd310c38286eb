"""Checkpoints as they are written: files, then the manifest that makes them whole."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.errors import StorageFullError, TrainyardError
from pipeline.record.values import sealed, to_json
from pipeline.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
STATE = "state.pt"
ROWS = "rows.parquet"
PREPROCESS = "preprocess.json"
FORMAT = 1


def write_checkpoint(storage: Storage, name: str, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint: its files, then the manifest that makes it whole.

    Parameters
    ----------
    storage: the run's folder.
    facts: step, epoch, end, position, metrics, best and first_cell, as plain values.

    Raises
    ------
    StorageFullError: there is no room for it; nothing of it is left.
    """
    folder = storage.at(f"{FOLDER}/{name}")
    sums = {file: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()}
    tree = sealed({"format": FORMAT, **facts, "files": sums})
    try:
        for file, data in files.items():
            folder.replace(file, data, sync=True)
        folder.replace(MANIFEST, to_json(tree, indent=1).encode(), sync=True)
    except StorageFullError:  # what is there of it is no checkpoint, and others need the room
        with suppress(TrainyardError):
            delete_checkpoint(storage, name)
        raise


def delete_checkpoint(storage: Storage, name: str) -> None:
    """Delete a checkpoint, manifest first: what a kill leaves of it is no checkpoint."""
    storage.delete(f"{FOLDER}/{name}/{MANIFEST}")
    storage.delete_folder(f"{FOLDER}/{name}")


def encode_weights(weights: Mapping[str, Tensor]) -> bytes:
    """`model.safetensors`: the same tensors give the same bytes."""
    from safetensors.torch import save

    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in seen:  # tied or cut from one piece: the format wants its own memory
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    return save(tensors)


def encode_state(state: Mapping[str, Any]) -> bytes:
    """`state.pt`, which loads with weights_only=True; TypeError for a value that would not."""
    import torch

    _check_plain(state, "state")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _check_plain(value: Any, where: str) -> None:
    import torch

    if isinstance(value, (dict, Mapping)):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (torch.Tensor, int, float, bool, str, bytes):
        raise TypeError(f"{where} is a {type(value).__name__}: only tensors and plain values can be stored")
