"""Tensors from files that anybody may have written: no code of theirs runs, and small files stay small in memory."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NAMED = re.compile(r"torch\._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")
"""What a `state.pt` of ours names. torch's own list for weights alone holds more, such as bytearray: of any size."""
_CALLS_BY_NAME = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
"""Other ways of a pickle to name things; torch.save has no use for them."""


def decode_weights(data: bytes) -> dict[str, Tensor]:
    """The tensors of a `model.safetensors`, on the CPU, by name.

    Raises
    ------
    ValueError: no such file.
    """
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:  # the format's own error, and what torch makes of impossible types and shapes
        raise ValueError(_first_line(error)) from None


def decode_state(data: bytes) -> dict[str, Any]:
    """The tensors and plain values of a `state.pt`.

    Raises
    ------
    ValueError: not what `encode_state` wrote: compressed, naming anything but tensors, or broken.
    """
    import torch

    try:
        _check_state(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each have many of their own
        raise ValueError(_first_line(error)) from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("no mapping of names to values")
    return state


def _check_state(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED for one in entries) or (
            sum(one.file_size for one in entries) > len(data)
        ):
            raise ValueError("it is compressed")
        for one in entries:
            if one.filename.endswith(".pkl"):
                _check_names(archive.read(one))


def _check_names(pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        is_foreign = operation.name == "GLOBAL" and not _NAMED.fullmatch(str(argument))
        if is_foreign or operation.name in _CALLS_BY_NAME:
            raise ValueError(f"it names {argument}" if argument else "it names what no tensor needs")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
