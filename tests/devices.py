"""Devices of tests that run the same body on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch


def require_device(kind: str) -> torch.device:
    """Return the device `cpu` or `cuda`; skip the test if this machine has no CUDA device."""
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return torch.device(kind)
