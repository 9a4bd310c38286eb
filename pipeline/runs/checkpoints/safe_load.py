"""Reads tensors from files that anybody may have written: no code is run, and memory is bounded by the file's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def decode_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a `model.safetensors` or `state.safetensors` by name, on the CPU.

    Raises
    ------
    ValueError: not a safetensors file, or one that describes tensors that torch cannot make.
    """
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:  # the format's own error, and what torch makes of impossible types and shapes
        first_line = str(error).partition("\n")[0][:200]
        raise ValueError(f"{type(error).__name__}: {first_line}") from None
