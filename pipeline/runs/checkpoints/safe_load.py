"""Load tensors from untrusted files: no code is run, and memory is bounded by the size of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def decode_tensors(data: bytes) -> dict[str, Tensor]:
    """Decode a `model.safetensors` or `state.safetensors` to tensors by name, on the CPU.

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
